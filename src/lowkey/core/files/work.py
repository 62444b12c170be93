"""Unfinished work beside an output, `OUT`.partial: a folder for each job, whose files are read back, never
recomputed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, overload

from lowkey.core.errors import LowkeyError
from lowkey.core.files.outputs import check_folder, check_writable, kind_of, link_target
from lowkey.core.files.reading import read_json, read_tensors
from lowkey.core.files.swapping import is_passing
from lowkey.core.files.writing import write_json, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

JOB_KIND, WORK_KIND = "job", "work"  # kinds of files
READ_TRIES = 3
# of one job
WORK_FILES = r"(job|measured)\.json|(statistics|gradients|gates|training|(layer|tuned)-\d+)\.safetensors"


@overload
def job_folder(work: None, job: Mapping) -> None: ...
@overload
def job_folder(work: Path, job: Mapping) -> Path: ...
@overload
def job_folder(work: Path | None, job: Mapping) -> Path | None: ...
def job_folder(work: Path | None, job: Mapping) -> Path | None:
    """The folder of this very job below `work`; those of other jobs go. Two jobs at once do not read each
    other's files.
    """
    if work is None:
        return None
    plain, folder = json.loads(json.dumps(job)), work / job_name(job)
    for other in set(work.iterdir() if work.is_dir() else ()) - {folder}:
        remove_job(other)
    if not (folder / "job.json").exists():
        write_json(folder / "job.json", {"job": plain}, JOB_KIND)
    elif read_json(folder / "job.json", "unfinished work", JOB_KIND).get("job") != plain:
        raise LowkeyError(f"unfinished work {str(folder)!r}: is another job's than its name says; delete it")
    return folder


def job_name(job: Mapping) -> str:
    """Of a job's folder."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]


def write_work(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Another process at the same job may end first and clear the folder away: then once more."""
    _trying(lambda: write_tensors(folder / f"{name}.safetensors", tensors, WORK_KIND))


def write_work_json(folder: Path, name: str, value: Mapping) -> None:
    """As `write_work`, of plain JSON; name: of the file."""
    _trying(lambda: write_json(folder / name, value, WORK_KIND, indent=None))


def _trying(write: Callable[[], object]) -> None:
    for left in reversed(range(READ_TRIES)):
        try:
            write()
            return
        except LowkeyError as error:
            if not (left and isinstance(error.__cause__, FileNotFoundError)):
                raise


def read_work(folder: Path | None, name: str) -> dict[str, Tensor] | None:
    """What was written there, or None. Errors: LowkeyError for a damaged file."""
    path = folder / f"{name}.safetensors" if folder is not None else None
    if path is None or not path.exists():
        return None
    return read_tensors(path, "unfinished work", WORK_KIND, remedy="delete it and start anew")


def read_work_json(folder: Path, name: str) -> dict:
    """What `write_work_json` wrote. Errors: LowkeyError for a damaged file."""
    return read_json(folder / name, "unfinished work", WORK_KIND, source="delete it and start anew")


def checked_tensor(
    found: Mapping[str, Tensor], name: str, like: Tensor | tuple[int, ...], folder: Path
) -> Tensor:
    """The tensor of this name, of the shape (and dtype) of another. Errors: LowkeyError when it is not."""
    t = found.get(name)
    shape, dtype = (like, None) if isinstance(like, tuple) else (tuple(like.shape), like.dtype)
    if t is None or tuple(t.shape) != shape or (dtype is not None and t.dtype != dtype):
        raise damaged_work(folder, f"{name!r} is missing or not of shape {shape}")
    return t


def damaged_work(folder: Path, rule: str) -> LowkeyError:
    return LowkeyError(f"unfinished work {str(folder)!r}: {rule}; it is damaged: delete it and start anew")


def check_output(path: Path, force: bool) -> Path:
    """As `check_folder`. Returns the folder for unfinished work beside it, `path`.partial, which must be
    ours.
    """
    check_folder(path, force)
    return work_beside(path)


def work_beside(path: Path) -> Path:
    """`path`.partial, where unfinished work goes. Errors: LowkeyError when it cannot be written, or holds
    anything that is not ours.
    """
    work = link_target(path).with_name(f"{link_target(path).name}.partial")
    check_writable(work)
    if os.path.lexists(work) and (
        work.is_symlink() or not work.is_dir() or not all(map(_is_job, work.iterdir()))
    ):
        raise LowkeyError(
            f"output {str(path)!r}: {str(work)!r}, where unfinished work goes, holds other files; choose "
            "another place"
        )
    return work


def _is_job(folder: Path) -> bool:
    """The unfinished work of one job, by names and by contents."""
    if folder.is_symlink() or not folder.is_dir() or not re.fullmatch(r"[0-9a-f]{16}", folder.name):
        return False
    return all(_is_work(p) for p in folder.iterdir())


def _is_work(path: Path) -> bool:
    return is_passing(path) or (
        bool(re.fullmatch(WORK_FILES, path.name)) and kind_of(path) in (JOB_KIND, WORK_KIND)
    )


def remove_work(work: Path) -> None:
    """What unfinished work has left, once it is finished; anything else stays."""
    for job in work.iterdir() if work.is_dir() else ():
        remove_job(job)
    with suppress(OSError):
        work.rmdir()


def remove_job(job: Path) -> None:
    if _is_job(job):
        shutil.rmtree(job, ignore_errors=True)
