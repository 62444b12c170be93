"""One self-contained HTML page from Result files: a pure function of their JSON, never of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowkey.files import write_text
from lowkey.report.page import render
from lowkey.report.results import load_results

__all__ = ["load_results", "render", "write_report"]


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Render the results under `paths` and write the page to `out`, whole or not at all."""
    write_text(out, render(load_results(paths)))
    return out
