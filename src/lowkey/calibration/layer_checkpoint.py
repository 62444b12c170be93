"""Unfinished calibration on disk: layers that are read back, never recomputed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lowkey.core import files
from lowkey.core.types import Basis, LayerBases

Surface = list[list[float]]


def save_layer(work: Path | None, name: str, bases: LayerBases, surface: Surface) -> None:
    if work is None:
        return
    tensors = {"surface": torch.tensor(surface, dtype=torch.float64)}
    if bases.order is not None:
        tensors["order"] = bases.order
    for side in ("keys", "values"):
        b: Basis = getattr(bases, side)
        parts = {"columns": b.columns, "rows": b.rows, "spectrum": b.spectrum, "mean": b.mean} | {
            f"exact.{r}": t for r, t in b.exact
        }
        tensors |= {f"{side}.{part}": t for part, t in parts.items() if t is not None}
        tensors |= {f"{side}.merge": torch.tensor(b.merge), f"{side}.unit": torch.tensor(b.unit)}
    files.write_work(work, name, tensors)


def load_layer(work: Path | None, name: str) -> tuple[LayerBases, Surface] | None:
    tensors = files.read_work(work, name)
    if work is None or tensors is None:
        return None

    def basis(side: str) -> Basis:
        exact = tuple(
            (int(n.rsplit(".", 1)[1]), t)
            for n, t in sorted(tensors.items())
            if n.startswith(f"{side}.exact.")
        )
        known = {part: tensors.get(f"{side}.{part}") for part in ("rows", "spectrum", "mean")}
        merge, unit = (int(tensors[f"{side}.{part}"]) for part in ("merge", "unit"))
        return Basis(tensors[f"{side}.columns"], exact=exact, merge=merge, unit=unit, **known)

    try:
        bases = LayerBases(basis("keys"), basis("values"), tensors.get("order"))
        surface = tensors["surface"].tolist()
    except (KeyError, ValueError, RuntimeError) as error:
        raise files.damaged_work(work, f"{name} lacks or garbles {error}") from None
    if rule := _flaw(bases, tensors["surface"]):
        raise files.damaged_work(work, f"{name}: {rule}")
    return bases, surface


def _flaw(bases: LayerBases, surface: Tensor) -> str | None:
    """What cannot be: maps that do not fit one another."""
    if surface.dtype != torch.float64 or surface.ndim not in (1, 2) or (surface.ndim == 1 and len(surface)):
        return "surface is no table of numbers"
    for name, b in (("keys", bases.keys), ("values", bases.values)):
        t, c = b.merge, b.columns
        if (
            c.ndim != 3
            or not 1 <= t <= c.shape[1]
            or c.shape[1] != c.shape[2]
            or c.shape[1] % t
            or not c.is_floating_point()
        ):
            return f"{name} have no square maps of {t} heads"
        if b.rows is not None and b.rows.shape != c.shape:
            return f"{name} have maps back of another shape"
        if not 1 <= b.unit <= c.shape[1]:
            return f"{name} have no columns by {b.unit}"
        if any(
            e.ndim != 3 or e.shape[:2] != c.shape[:2] or e.shape[2] != t * r // b.unit * b.unit
            for r, e in b.exact
        ):
            return f"{name} have maps of single ranks that do not fit"
        if b.mean is not None and (b.mean.ndim != 2 or b.mean.shape[1] != c.shape[1] // t):
            return f"{name} have means that do not fit"
    if bases.order is not None and sorted(bases.order.tolist()) != list(range(len(bases.order))):
        return "order does not name each head once"
    return None
