"""Unfinished work beside an output, in `OUT.partial`.

Each job has a folder there. What a stopped job left in it is read and not computed again. Work of several
stages has a folder for each stage, with the folders of its jobs inside.
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
from lowkey.core.files.atomic import is_staging_folder
from lowkey.core.files.outputs import check_folder, check_writable, kind_of, link_target
from lowkey.core.files.reading import read_json, read_tensors
from lowkey.core.files.writing import write_json, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

JOB_KIND, WORK_KIND = "job", "work"  # kinds of files
WRITE_TRIES = 3
STAGES = ("fit", "costs", "held-out", "recall")  # of planning
# the names of the files of one job
WORK_FILES = (
    r"(job|measured(-\d+)?)\.json|"
    r"(statistics|gradients|gates|solved|training|(layer|tuned|window)-\d+)\.safetensors"
)


@overload
def job_folder(work: None, job: Mapping) -> None: ...
@overload
def job_folder(work: Path, job: Mapping) -> Path: ...
@overload
def job_folder(work: Path | None, job: Mapping) -> Path | None: ...
def job_folder(work: Path | None, job: Mapping) -> Path | None:
    """The folder of a job inside `work`; the folders of other jobs are removed.

    Its name depends on the job, so two jobs at once do not read each other's files.

    Args:
        work: the folder for unfinished work, or None.
        job: everything that decides what the job computes, as plain JSON.

    Returns:
        The folder, or None if there is no `work`.

    Raises:
        LowkeyError: if the folder belongs to another job.
    """
    if work is None:
        return None
    plain, folder = json.loads(json.dumps(job)), work / job_name(job)
    # what other jobs left is of no use for this output any more
    for other in set(work.iterdir() if work.is_dir() else ()) - {folder}:
        remove_job(other)
    if not (folder / "job.json").exists():
        write_json(folder / "job.json", {"job": plain}, JOB_KIND)
    elif read_json(folder / "job.json", "unfinished work", JOB_KIND).get("job") != plain:
        raise LowkeyError(f"unfinished work {str(folder)!r}: is another job's than its name says; delete it")
    return folder


def job_name(job: Mapping) -> str:
    """The name of a job's folder."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]


def write_work(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into a job's folder, as `name`.safetensors."""
    _trying(lambda: write_tensors(folder / f"{name}.safetensors", tensors, WORK_KIND))


def write_work_json(folder: Path, name: str, value: Mapping) -> None:
    """Write plain JSON into a job's folder, as the file `name`."""
    _trying(lambda: write_json(folder / name, value, WORK_KIND, indent=None))


def _trying(write: Callable[[], object]) -> None:
    """Write, and again if the folder disappears: another process at the same job may end and remove it."""
    for tries_left in reversed(range(WRITE_TRIES)):
        try:
            write()
            return
        except LowkeyError as error:
            if not (tries_left and isinstance(error.__cause__, FileNotFoundError)):
                raise


def read_work(folder: Path | None, name: str) -> dict[str, Tensor] | None:
    """The tensors that `write_work` wrote, or None. Raises: LowkeyError if they are damaged."""
    path = folder / f"{name}.safetensors" if folder is not None else None
    if path is None or not path.exists():
        return None
    return read_tensors(path, "unfinished work", WORK_KIND, remedy="delete it and start anew")


def read_work_json(folder: Path, name: str) -> dict:
    """The JSON that `write_work_json` wrote. Raises: LowkeyError if it is damaged."""
    return read_json(folder / name, "unfinished work", WORK_KIND, source="delete it and start anew")


def checked_tensor(
    tensors: Mapping[str, Tensor], name: str, like: Tensor | tuple[int, ...], folder: Path
) -> Tensor:
    """A tensor of unfinished work that must have a certain shape.

    Args:
        tensors: the tensors that were read.
        name: of the one wanted.
        like: its shape; or a tensor, whose dtype must agree, too.
        folder: where it was read, for messages.

    Raises:
        LowkeyError: if it is missing or of another shape or dtype.
    """
    t = tensors.get(name)
    shape, dtype = (like, None) if isinstance(like, tuple) else (tuple(like.shape), like.dtype)
    if t is None or tuple(t.shape) != shape or (dtype is not None and t.dtype != dtype):
        raise damaged_work(folder, f"{name!r} is missing or not of shape {shape}")
    return t


def damaged_work(folder: Path, rule: str) -> LowkeyError:
    """The error for unfinished work that breaks a rule."""
    return LowkeyError(f"unfinished work {str(folder)!r}: {rule}; it is damaged: delete it and start anew")


def check_output(path: Path, force: bool) -> Path:
    """Check that a folder can be written at `path`, and unfinished work beside it.

    Returns:
        The folder for unfinished work, `path`.partial.

    Raises:
        LowkeyError: see `check_folder` and `work_beside`.
    """
    check_folder(path, force)
    return work_beside(path)


def work_beside(path: Path) -> Path:
    """The folder for unfinished work beside an output, `path`.partial.

    Raises:
        LowkeyError: if it cannot be written, or holds anything that lowkey did not write.
    """
    work = link_target(path).with_name(f"{link_target(path).name}.partial")
    check_writable(work)
    if os.path.lexists(work) and (
        work.is_symlink() or not work.is_dir() or not all(_is_job(p) or _is_stage(p) for p in work.iterdir())
    ):
        raise LowkeyError(
            f"output {str(path)!r}: {str(work)!r}, where unfinished work goes, holds other or damaged files; "
            "choose another place, or delete it to begin damaged work again"
        )
    return work


def _is_job(folder: Path) -> bool:
    """Whether this is the folder of one job, by its names and contents."""
    if folder.is_symlink() or not folder.is_dir() or not re.fullmatch(r"[0-9a-f]{16}", folder.name):
        return False
    return all(_is_work(p) for p in folder.iterdir())


def _is_stage(folder: Path) -> bool:
    """Whether this is the folder of one stage, with jobs inside."""
    plain = folder.name in STAGES and folder.is_dir() and not folder.is_symlink()
    return plain and all(map(_is_job, folder.iterdir()))


def _is_work(path: Path) -> bool:
    return is_staging_folder(path) or (
        bool(re.fullmatch(WORK_FILES, path.name)) and kind_of(path) in (JOB_KIND, WORK_KIND)
    )


def remove_work(work: Path) -> None:
    """Remove the folders of all jobs, once the work is finished. Anything else stays."""
    for job in work.iterdir() if work.is_dir() else ():
        if _is_stage(job):
            remove_work(job)
        else:
            remove_job(job)
    with suppress(OSError):
        work.rmdir()


def remove_job(job: Path) -> None:
    """Remove the folder of one job; anything else stays."""
    if _is_job(job):
        shutil.rmtree(job, ignore_errors=True)
