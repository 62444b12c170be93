"""Seconds of calibration for closed-form bases: one pass that sums second moments, against storing
activations and decomposing them.

    python benchmarks/calibration_time.py [MODEL --windows 8,32,128 --length 512 --rounds 3]

`stored` is what published code does (arXiv:2408.05646): keep every key, query and value, then one SVD per
layer and head. Both give the same bases (checked). Rounds take turns; medians are shown. Held: what is kept
at the end of the pass.
"""

from __future__ import annotations

import statistics as stats
import time
from collections.abc import Callable

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from lowkey.calibration.statistics import gather_statistics
from lowkey.core import text
from lowkey.core.types import head_blocks
from lowkey.models.families import geometry
from lowkey.models.loading import load
from lowkey.ops.bases import principal_basis

BATCH = 4
Bases = dict[int, tuple[Tensor, Tensor]]


def moments(model: PreTrainedModel, rows: Tensor) -> tuple[Bases, int]:
    """Key and value bases per head, and the bytes held."""
    found = gather_statistics(model, rows.split(BATCH))
    held = sum(t.nbytes for s in found.values() for t in vars(s).values() if isinstance(t, Tensor))
    per_head: Callable[[Tensor], Tensor] = lambda m: principal_basis(m, "per_head").columns  # noqa: E731
    return {
        i: (per_head(s.keys("post_rope")), per_head(head_blocks(s.values, s.heads))) for i, s in found.items()
    }, held


@torch.no_grad()
def stored(model: PreTrainedModel, rows: Tensor) -> tuple[Bases, int]:
    """The same from activations, which are all held until the end."""
    caches = []
    for batch in rows.split(BATCH):
        cache = DynamicCache()
        model(batch, past_key_values=cache, logits_to_keep=1)
        caches.append(cache)
    found: Bases = {}
    for i in geometry(model).compressible:
        keys, values = (
            torch.cat([getattr(c.layers[i], n) for c in caches]).transpose(0, 1).flatten(1, 2).float()
            for n in ("keys", "values")
        )
        found[i] = _right(keys), _right(values)
    return found, sum(
        getattr(c.layers[i], n).nbytes
        for c in caches
        for i in geometry(model).compressible
        for n in ("keys", "values")
    )


def _right(x: Tensor) -> Tensor:
    """Right singular vectors (h, d, d) of (h, n, d)."""
    return torch.linalg.svd(x, full_matrices=False).Vh.mT


def main(model: str = "tiny", windows: str = "8,32,128", length: int = 512, rounds: int = 3) -> None:
    """Print a Markdown table."""
    loaded, tokenizer = load(model, "float32", "cpu")
    ids = text.windows(text.encode(tokenizer, text.embedded_text("calibration")), tokenizer, length, "text")
    print(
        "| tokens | moments, s | stored, s | stored / moments | moments held, MiB | stored held, MiB |\n"
        + "|---" * 6
        + "|"
    )
    for count in map(int, windows.split(",")):
        rows = ids.repeat(-(-count // len(ids)), 1)[:count]
        times: dict[str, list[float]] = {"moments": [], "stored": []}
        results = {}
        for _ in range(rounds):
            for name, run in (("moments", moments), ("stored", stored)):
                start = time.perf_counter()
                results[name] = run(loaded, rows)
                times[name].append(time.perf_counter() - start)
        _same(results["moments"][0], results["stored"][0])
        ratio = stats.median(b / a for a, b in zip(*times.values(), strict=True))
        held = [results[n][1] / 2**20 for n in times]
        seconds = [stats.median(t) for t in times.values()]
        print(
            f"| {rows.numel()} | {seconds[0]:.2f} | {seconds[1]:.2f} | {ratio:.2f} | {held[0]:.1f} | "
            f"{held[1]:.1f} |",
            flush=True,
        )


def _same(a: Bases, b: Bases) -> None:
    """The leading half of the directions spans the same space."""
    for i in a:
        for x, y in zip(a[i], b[i], strict=True):
            r = x.shape[-1] // 2
            overlap = torch.linalg.svdvals(x[..., :r].float().mT @ y[..., :r]).min()
            if overlap < 0.9:
                raise SystemExit(f"layer {i}: the two ways disagree (cosine {overlap:.3f})")


if __name__ == "__main__":
    typer.run(main)
