"""Unfinished calibration on disk. A work folder belongs to one job; its layers are read back, never recomputed."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lowkey import files
from lowkey.types import Basis, LayerBases

Surface = list[list[float]]


def job_folder(work: Path | None, job: dict) -> Path | None:
    """The folder, emptied of another job's layers."""
    if work is None:
        return None
    text_now = json.dumps(job, sort_keys=True)
    marker = work / "job.json"
    if not (marker.exists() and marker.read_text(encoding="utf-8") == text_now):
        for stale in work.glob("*.safetensors"):
            stale.unlink()
        files.write_text(marker, text_now)
    return work


def save_layer(work: Path | None, name: str, bases: LayerBases, surface: Surface) -> None:
    if work is None:
        return
    tensors = {"surface": torch.tensor(surface, dtype=torch.float64)}
    if bases.order is not None:
        tensors["order"] = bases.order
    for side in ("keys", "values"):
        b: Basis = getattr(bases, side)
        parts = {"columns": b.columns, "rows": b.rows, "spectrum": b.spectrum, "mean": b.mean} | {f"exact.{r}": t for r, t in b.exact}
        tensors |= {f"{side}.{part}": t for part, t in parts.items() if t is not None} | {f"{side}.merge": torch.tensor(b.merge)}
    files.write_tensors(work / f"{name}.safetensors", tensors)


def load_layer(work: Path | None, name: str) -> tuple[LayerBases, Surface] | None:
    path = work / f"{name}.safetensors" if work is not None else None
    if path is None or not path.exists():
        return None
    tensors = files.read_tensors(path, "unfinished layer")

    def basis(side: str) -> Basis:
        exact = tuple((int(n.rsplit(".", 1)[1]), t) for n, t in sorted(tensors.items()) if n.startswith(f"{side}.exact."))
        known = {part: tensors.get(f"{side}.{part}") for part in ("rows", "spectrum", "mean")}
        return Basis(tensors[f"{side}.columns"], exact=exact, merge=int(tensors[f"{side}.merge"]), **known)

    return LayerBases(basis("keys"), basis("values"), tensors.get("order")), tensors["surface"].tolist()
