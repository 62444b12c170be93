"""StiefAttention's two parametrisations in one run: fitting time and the layer error each reaches.

    python benchmarks/fitting.py [MODEL] [--length 128 --windows 16 --epochs 50]

`mlp` is the paper's protocol (a network per candidate rank, keys and values apart, at most 50 epochs,
patience 5); `free` trains one matrix per basis, from the PCA solution, with a departure for each rank.
Seconds are of fitting alone: the second moments before it and the error surface after it are the same for
all. Errors are means over layers of the held-out layer-output error, at equal ranks for K and V and at the
ranks that the greedy allocator chooses under a byte budget; `mean` is their geometric mean.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Annotated

import typer

from lowkey.allocation.allocators import Greedy
from lowkey.allocation.profile import Profile
from lowkey.allocation.rank_grid import grid, multiples
from lowkey.calibration.calibrate import fit_layers
from lowkey.core import text
from lowkey.core.progress import bars
from lowkey.core.text import encode, sample_windows
from lowkey.core.types import LayerBases, LayerStatistics
from lowkey.methods import PCA, CalibrationContext, Method, StiefAttention
from lowkey.models.families import geometry
from lowkey.models.loading import load
from lowkey.probes.layer_probe import LayerProbe

BUDGETS = (75, 50, 37.5)


@dataclass
class Timed(Method):
    """A method that counts the seconds it spends in `fit`."""

    method: Method
    seconds: float = 0.0

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        start = time.perf_counter()
        bases = self.method.fit(statistics, probe, ranks, seed)
        self.seconds += time.perf_counter() - start
        return bases


def mean_error(profile: Profile, chosen: list[tuple[int, int]]) -> float:
    """Held-out layer error at these ranks, averaged over layers."""
    return sum(profile.error(i, pair) for i, pair in enumerate(chosen)) / profile.layer_count


def main(
    model: Annotated[str, typer.Argument()] = "tiny",
    length: int = 128,
    windows: int = 16,
    epochs: int = 50,
    calibration: str = "",
) -> None:
    """Fit both ways on the same windows and print a Markdown table."""
    loaded, tokenizer = load(model, "float32", "cpu")
    corpus = text.read_text(calibration, "calibration") if calibration else text.embedded_text("calibration")
    rows = sample_windows(encode(tokenizer, corpus), tokenizer, length, windows, 0, "calibration")
    ranks = grid(8, multiples(geometry(loaded).head_dim, 1))
    arms = {
        "pca (K shared), the start": PCA(key_bases="shared"),
        **{f"free, {n} epochs": StiefAttention("free", epochs=n, patience=n) for n in (60, 100, 160)},
        "mlp (paper)": StiefAttention(epochs=epochs),
    }
    shown = [r for r in ranks if r < ranks[-1]]
    heads = [f"r={r}" for r in shown] + [f"greedy {share}%" for share in BUDGETS] + ["mean"]
    print("| parametrisation | seconds | " + " | ".join(heads) + " |\n|---|---" + "|---" * len(heads) + "|")
    for name, method in arms.items():
        timed = Timed(method)
        _, profile = fit_layers(
            timed,
            CalibrationContext(loaded, rows, round(windows / 4), "post_rope", ranks, seed=0, progress=bars),
        )
        errors = [mean_error(profile, [(r, r)] * profile.layer_count) for r in shown]
        whole = profile.bytes_per_token([(ranks[-1],) * 2] * profile.layer_count)
        errors += [
            mean_error(profile, Greedy().under_bytes(profile, share / 100 * whole)) for share in BUDGETS
        ]
        errors.append(geometric_mean(errors))
        print(
            f"| {name} | {timed.seconds:.1f} | " + " | ".join(f"{e:.4f}" for e in errors) + " |", flush=True
        )


if __name__ == "__main__":
    typer.run(main)
