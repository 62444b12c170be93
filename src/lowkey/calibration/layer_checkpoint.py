"""The finished layers of an unfinished calibration on disk: they are read back, never fitted again."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lowkey.core import files
from lowkey.core.types import Basis, LayerBases

Surface = list[list[float]]  # errors at (r_K, r_V): one row per rank of keys; empty if none were measured


def save_layer(work: Path | None, name: str, bases: LayerBases, surface: Surface) -> None:
    """Save the bases and the error surface of one layer.

    Args:
        work: the folder of this very job; None saves nothing.
        name: of the file, without its ending.
        bases: the layer's bases.
        surface: its error surface.
    """
    if work is None:
        return
    tensors = {"surface": torch.tensor(surface, dtype=torch.float64)}
    if bases.order is not None:
        tensors["order"] = bases.order
    for side in ("keys", "values"):
        b: Basis = getattr(bases, side)
        parts = {"columns": b.columns, "rows": b.rows, "spectrum": b.spectrum, "mean": b.mean}
        parts |= {f"exact.{r}": t for r, t in b.exact}
        tensors |= {f"{side}.{part}": t for part, t in parts.items() if t is not None}
        tensors |= {f"{side}.merge": torch.tensor(b.merge), f"{side}.unit": torch.tensor(b.unit)}
    files.write_work(work, name, tensors)


def load_layer(work: Path | None, name: str) -> tuple[LayerBases, Surface] | None:
    """Return what `save_layer` saved, or None if there is no such file.

    Raises:
        LowkeyError: if the file is damaged.
    """
    tensors = files.read_work(work, name)
    if work is None or tensors is None:
        return None

    def basis(side: str) -> Basis:
        # Ranks with maps of their own are stored as `keys.exact.16` and so on.
        prefix = f"{side}.exact."
        exact = tuple(
            (int(key.removeprefix(prefix)), t) for key, t in sorted(tensors.items()) if key.startswith(prefix)
        )
        optional = {part: tensors.get(f"{side}.{part}") for part in ("rows", "spectrum", "mean")}
        merge, unit = (int(tensors[f"{side}.{part}"]) for part in ("merge", "unit"))
        return Basis(tensors[f"{side}.columns"], exact=exact, merge=merge, unit=unit, **optional)

    try:
        bases = LayerBases(basis("keys"), basis("values"), tensors.get("order"))
        surface = tensors["surface"].tolist()
    except (KeyError, ValueError, RuntimeError) as error:
        raise files.damaged_work(work, f"{name} is incomplete or unreadable: {error}") from None
    if flaw := _flaw(bases, tensors["surface"]):
        raise files.damaged_work(work, f"{name}: {flaw}")
    return bases, surface


def _flaw(bases: LayerBases, surface: Tensor) -> str | None:
    """Return what is impossible about bases and surface, such as maps that do not fit one another."""
    # An empty surface is saved as a vector of length 0.
    if surface.dtype != torch.float64 or surface.ndim not in (1, 2) or (surface.ndim == 1 and len(surface)):
        return "surface is not a table of numbers"
    for side, basis in (("keys", bases.keys), ("values", bases.values)):
        if flaw := _flaw_of_basis(basis):
            return f"{side} have {flaw}"
    if bases.order is not None and sorted(bases.order.tolist()) != list(range(len(bases.order))):
        return "order does not name each head once"
    return None


def _flaw_of_basis(b: Basis) -> str | None:
    t, c = b.merge, b.columns
    square = c.ndim == 3 and c.shape[1] == c.shape[2] and c.is_floating_point()
    if not square or not 1 <= t <= c.shape[1] or c.shape[1] % t:
        return f"no square maps of {t} heads"
    if b.rows is not None and b.rows.shape != c.shape:
        return "maps back of another shape"
    if not 1 <= b.unit <= c.shape[1]:
        return f"no columns by {b.unit}"
    for rank, columns in b.exact:
        # As many columns as `Basis.at` takes for this rank.
        width = t * rank // b.unit * b.unit
        if columns.ndim != 3 or columns.shape[:2] != c.shape[:2] or columns.shape[2] != width:
            return "maps of single ranks that do not fit"
    if b.mean is not None and (b.mean.ndim != 2 or b.mean.shape[1] != c.shape[1] // t):
        return "means that do not fit"
    return None
