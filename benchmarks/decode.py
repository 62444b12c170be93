"""A decode step of attention over full and over evicted storage: milliseconds, bandwidth, and against torch's
own attention.

    python benchmarks/decode.py [OUT.json] [--context 8192 --repeats 15 --budget 10% --threads N]

All backends of a row of the table took turns in one run; ratios are medians over rounds. Run it on an idle
machine.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer

from lowkey.core.files import write_json
from lowkey.evaluate.decode_bench import decode_bench

HEADS = ((32, 32), (32, 8))
COLUMNS = (
    "dtype",
    "head dim",
    "heads",
    "backend",
    "ms",
    "GB/s",
    "of read bandwidth",
    "torch's ms / ms",
    "ms at budget",
    "of its full step",
)


def main(
    out: Annotated[Path | None, typer.Argument(help="where to write all figures")] = None,
    context: int = 8192,
    repeats: int = 15,
    budget: str = "10%",
    threads: int = 0,
) -> None:
    """Print a Markdown table, write JSON."""
    torch.set_num_threads(threads or torch.get_num_threads())
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    found = []
    for dtype, head_dim, (heads, kv_heads) in product(("float32", "bfloat16"), (64, 128), HEADS):
        found.append(decode_bench(context, head_dim, heads, kv_heads, dtype, budget, repeats))
        for name, row in found[-1]["backends"].items():
            print("| " + " | ".join(cells(found[-1], name, row)) + " |", flush=True)
    if out:
        write_json(out, {"rows": found}, "benchmark", ours=True)


def cells(run: dict, name: str, row: dict) -> list[str]:
    shape = [run["dtype"], str(run["head_dim"]), f"{run['heads']}/{run['kv_heads']}", name]
    full = [
        f"{row['ms']:.2f}",
        f"{row['gbs']:.1f}",
        f"{row['share_of_read_bandwidth']:.0%}",
        f"{row['ratio_to_sdpa_full']:.2f}",
    ]
    kept = (
        ["-", "-"]
        if row["budget_ms"] is None
        else [f"{row['budget_ms']:.3f}", f"{row['budget_to_full']:.3f}"]
    )
    return shape + full + kept


if __name__ == "__main__":
    typer.run(main)
