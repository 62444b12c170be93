"""One self-contained HTML page from Result files: a pure function of their JSON, never of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowkey.core.files import check_file, write_marked
from lowkey.report.page import render
from lowkey.report.results import load_results

REPORT_FILE = "report"

__all__ = ["load_results", "render", "write_report"]


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Render the results under `paths` and write the page to `out`, whole or not at all; an earlier page of
    ours is replaced.

    Errors: LowkeyError for a damaged result, and when something else is at `out` or it cannot be written.
    """
    check_file(out, REPORT_FILE)
    write_marked(out, render(load_results(paths)), REPORT_FILE, ("<!-- ", " -->"))
    return out
