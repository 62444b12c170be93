"""StiefAttention's two parametrisations in one run: fitting time and the layer error each reaches.

    python benchmarks/fitting.py [MODEL] [--length 128 --windows 16 --epochs 50]

`mlp` is the paper's protocol (a network per candidate rank, keys and values apart); `free` is one matrix per basis, from
the PCA solution, for all ranks. The error is the mean over layers of the held-out error at equal ranks for K and V.
"""

from __future__ import annotations

import time

import typer

from lowkey import text
from lowkey.calibrate import Sample, candidates, fit_layers
from lowkey.families import geometry
from lowkey.loading import load
from lowkey.methods import PCA, StiefAttention
from lowkey.progress import bars
from lowkey.text import encode, sample_windows


def main(model: str = "tiny", length: int = 128, windows: int = 16, epochs: int = 50, calibration: str = "") -> None:
    """Fit both ways on the same windows and print a Markdown table."""
    loaded, tokenizer = load(model, "float32", "cpu")
    corpus = text.read_text(calibration, "calibration") if calibration else text.embedded("calibration")
    rows = sample_windows(encode(tokenizer, corpus), tokenizer, length, windows, 0, "calibration")
    ranks = candidates(geometry(loaded).head_dim, 1)
    arms = {
        "pca (K shared), the start": PCA(key_bases="shared"),
        "free": StiefAttention(),
        "mlp": StiefAttention(parametrisation="mlp", epochs=epochs),
    }
    shown = [r for r in ranks if r < ranks[-1]]
    print("| parametrisation | seconds | " + " | ".join(f"error at r={r}" for r in shown) + " |\n|---|---" + "|---" * len(shown) + "|")
    for name, method in arms.items():
        start = time.perf_counter()
        _, profile = fit_layers(loaded, rows, method, "post_rope", ranks, Sample(windows, length), None, bars)
        seconds = time.perf_counter() - start
        errors = [sum(profile.error(i, (r, r)) for i in range(profile.layers)) / profile.layers for r in shown]
        print(f"| {name} | {seconds:.1f} | " + " | ".join(f"{e:.4f}" for e in errors) + " |", flush=True)


if __name__ == "__main__":
    typer.run(main)
