"""StiefAttention's two parametrisations in one run: fitting time and the layer error each reaches.

    python benchmarks/fitting.py [MODEL] [--length 128 --windows 16 --epochs 50]

`mlp` is the paper's protocol (a network per candidate rank, keys and values apart); `free` is one matrix per basis, from
the PCA solution, for all ranks. The errors are means over layers of the held-out layer-output error, at equal ranks for K and
V and at the ranks that the greedy allocator chooses under a byte budget.
"""

from __future__ import annotations

import time

import typer

from lowkey import text
from lowkey.allocate import Greedy, Profile
from lowkey.calibrate import Sample, candidates, fit_layers
from lowkey.families import geometry
from lowkey.loading import load
from lowkey.methods import PCA, StiefAttention
from lowkey.progress import bars
from lowkey.text import encode, sample_windows

BUDGETS = (75, 50, 37.5)


def mean_error(profile: Profile, chosen: list[tuple[int, int]]) -> float:
    """Held-out layer error at these ranks, averaged over layers."""
    return sum(profile.error(i, pair) for i, pair in enumerate(chosen)) / profile.layers


def main(model: str = "tiny", length: int = 128, windows: int = 16, epochs: int = 50, calibration: str = "") -> None:
    """Fit both ways on the same windows and print a Markdown table."""
    loaded, tokenizer = load(model, "float32", "cpu")
    corpus = text.read_text(calibration, "calibration") if calibration else text.embedded("calibration")
    rows = sample_windows(encode(tokenizer, corpus), tokenizer, length, windows, 0, "calibration")
    ranks = candidates(geometry(loaded).head_dim, 1)
    arms = {
        "pca (K shared), the start": PCA(key_bases="shared"),
        "free": StiefAttention(),
        "mlp": StiefAttention(parametrisation="mlp", epochs=epochs, patience=5),
    }
    shown = [r for r in ranks if r < ranks[-1]]
    heads = [f"r={r}" for r in shown] + [f"greedy {share}%" for share in BUDGETS]
    print("| parametrisation | seconds | " + " | ".join(heads) + " |\n|---|---" + "|---" * len(heads) + "|")
    for name, method in arms.items():
        start = time.perf_counter()
        _, profile = fit_layers(loaded, rows, method, "post_rope", ranks, Sample(windows, length), None, bars)
        seconds = time.perf_counter() - start
        errors = [mean_error(profile, [(r, r)] * profile.layers) for r in shown]
        whole = profile.bytes([(ranks[-1],) * 2] * profile.layers)
        errors += [mean_error(profile, Greedy().under_bytes(profile, share / 100 * whole)) for share in BUDGETS]
        print(f"| {name} | {seconds:.1f} | " + " | ".join(f"{e:.4f}" for e in errors) + " |", flush=True)


if __name__ == "__main__":
    typer.run(main)
