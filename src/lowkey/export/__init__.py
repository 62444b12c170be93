"""Compressed models as plain checkpoints that need no lowkey to run. `FORMATS` has the exporters by name. May
import the rooms up to `plan`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lowkey.export.hf import export_hf

FORMATS: dict[str, Callable[..., Path]] = {"hf": export_hf}

__all__ = ["FORMATS", "export_hf"]
