"""Peak memory of the statistics pass: does it grow with the amount of text, and how does it compare with the
formula?

    python benchmarks/calibration_memory.py [MODEL]

Each line is a fresh process: peak resident memory after the same number of plain forward passes, and after
the pass.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch
import typer

from lowkey.calibration.statistics import gather_statistics
from lowkey.core import text
from lowkey.models.families import geometry
from lowkey.models.loading import load

BATCH, LENGTH = 2, 256


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(model: str, batches: int) -> None:
    """One measurement, printed as a table line."""
    loaded, tokenizer = load(model, "float32", "cpu")
    ids = text.windows(text.encode(tokenizer, text.embedded_text("calibration")), tokenizer, LENGTH, "text")[
        :BATCH
    ]
    with torch.no_grad():
        for _ in range(3):
            loaded(ids, output_hidden_states=True)
    before = peak_mib()
    statistics = gather_statistics(loaded, (ids for _ in range(batches)))
    held = sum(t.nbytes for s in statistics.values() for t in vars(s).values() if isinstance(t, torch.Tensor))
    shape = geometry(loaded)
    width = shape.kv_heads * shape.head_dim
    formula = (
        len(shape.compressible)
        * (3 * width**2 + 2 * shape.kv_heads * shape.head_dim**2 + shape.hidden**2 + 3 * width)
        * 8
    )
    print(
        f"| {batches * BATCH * LENGTH} | {before:.0f} | {peak_mib() - before:.1f} | {held / 2**20:.2f} | "
        f"{formula / 2**20:.2f} |",
        flush=True,
    )


def main(model: str = "tiny", batches: int = 0) -> None:
    if batches:
        child(model, batches)
        return
    print(
        "| tokens | peak of plain forward passes, MiB | more during the pass, MiB | statistics held, MiB | "
        "formula, MiB |"
    )
    print("|---|---|---|---|---|", flush=True)
    for count in (4, 32, 128):
        subprocess.run([sys.executable, __file__, "--model", model, "--batches", str(count)], check=True)


if __name__ == "__main__":
    typer.run(main)
