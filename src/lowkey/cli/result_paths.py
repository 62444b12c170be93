"""Where a result is written if nobody says so."""

from __future__ import annotations

import glob
import itertools
import time
from pathlib import Path

from lowkey.core import files

RESULTS = Path("results")


def unused_result_path(name: str) -> Path:
    """The path of a result file, named by the time. No finished or interrupted work uses it yet."""
    stamp = f"{name}{time.strftime('%Y%m%d-%H%M%S')}"
    names = (
        RESULTS / f"{stamp}{more}.json"
        for more in itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
    )
    return next(p for p in names if not (p.exists() or p.with_name(f"{p.name}.partial").exists()))


def interrupted_result(name: str, job: dict) -> tuple[Path, Path] | None:
    """The result file that an interrupted run of the same job would have written, with the folder of its
    work; None if there is none.
    """
    for work in sorted(RESULTS.glob(f"{glob.escape(name)}*.json.partial")):
        if (work / files.job_name(job)).is_dir() and not (begun := work.with_suffix("")).exists():
            return begun, files.work_beside(begun)
    return None
