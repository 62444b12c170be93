"""Self-contained HTML pages from result files. They depend on their JSON alone, never on a model.

`results` reads and checks files, `columns` says what each number means, `plots`, `curves`, `heads` and
`diversity` draw, and `page` puts all of it together. `comparison` makes the page that compares settings
sample by sample, from `measures` and `scatter`. May import `core` only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from lowkey.core.files import check_file, write_marked
from lowkey.core.lazy import importer
from lowkey.report.results import load_results, result_files

if TYPE_CHECKING:
    from lowkey.report.comparison import render_comparison
    from lowkey.report.page import render

REPORT_FILE = "report"

__all__ = ["load_results", "render", "render_comparison", "write_comparison", "write_report"]

# `render` draws with matplotlib, which takes half a second to import.
__getattr__ = importer(
    __name__, {"render": "lowkey.report.page", "render_comparison": "lowkey.report.comparison"}
)


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


def write_comparison(paths: Sequence[Path], out: Path) -> Path:
    """Compare the settings of results on one page and write it, whole or not at all.

    The page links to the files, so both should be moved together.

    Args:
        paths: result files, or folders of them.
        out: the page. An earlier page of ours is replaced.

    Returns:
        `out`.

    Raises:
        LowkeyError: a damaged result, results with nothing to compare, another file at `out`, or a file that
            cannot be written.
    """
    check_file(out, REPORT_FILE)
    results = load_results(paths)
    from lowkey.report.comparison import render_comparison

    links = [quote(Path(os.path.relpath(file, out.parent)).as_posix()) for file in result_files(paths)]
    write_marked(out, render_comparison(results, links), REPORT_FILE, ("<!-- ", " -->"))
    return out
