"""One self-contained HTML page from result files. It depends on their JSON alone, never on a model.

`results` reads and checks files, `columns` says what each number means, `plots`, `curves`, `heads` and
`diversity` draw, and `page` puts all of it together. May import `core` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowkey.core.files import check_file, write_marked
from lowkey.core.lazy import importer
from lowkey.report.results import load_results

if TYPE_CHECKING:
    from lowkey.report.page import render

REPORT_FILE = "report"

__all__ = ["load_results", "render", "write_report"]

# `render` draws with matplotlib, which takes half a second to import.
__getattr__ = importer(__name__, {"render": "lowkey.report.page"})


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Render results as one page and write it, whole or not at all.

    Args:
        paths: result files, or folders of them.
        out: the page. An earlier page of ours is replaced.

    Returns:
        `out`.

    Raises:
        LowkeyError: a damaged result, another file at `out`, or a file that cannot be written.
    """
    check_file(out, REPORT_FILE)
    results = load_results(paths)  # results that cannot be read are refused before matplotlib is imported
    from lowkey.report.page import render

    write_marked(out, render(results), REPORT_FILE, ("<!-- ", " -->"))
    return out
