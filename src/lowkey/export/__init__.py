"""Compressed models as plain checkpoints, which need no lowkey to run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lowkey.export.hf import export_hf

FORMATS: dict[str, Callable[..., Path]] = {"hf": export_hf}

__all__ = ["FORMATS", "export_hf"]
