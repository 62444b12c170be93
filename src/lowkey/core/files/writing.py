"""Writes files and folders beside their final name and renames them, so no reader ever sees half of one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from lowkey.core.errors import LowkeyError
from lowkey.core.files.atomic import NEW_NAME, new_folder_beside, read_consistently, swap, sync
from lowkey.core.files.outputs import (
    MANIFEST,
    check_folder,
    check_removable,
    check_replaceable,
    link_target,
    listed_files,
    manifest,
    unchanged,
    with_mark,
)
from lowkey.core.files.reading import CHECKSUM, KIND, digest, with_checksum

if TYPE_CHECKING:
    from torch import Tensor

FREE_SPACE = "choose another place or free some space"


@contextmanager
def disk_errors_explained(path: Path) -> Iterator[None]:
    """Turn a full disk, or whatever else keeps `path` from being written, into a LowkeyError."""
    try:
        yield
    except (LowkeyError, KeyboardInterrupt):
        raise
    except Exception as error:
        if not _of_the_disk(error):
            raise
        what = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise LowkeyError(f"cannot write {str(path)!r}: {what}; {FREE_SPACE}") from error


def _of_the_disk(error: Exception) -> bool:
    """Whether an error is of the disk.

    safetensors has an error of its own for a full disk, and tokenizers raises plain exceptions that quote the
    system's.
    """
    return isinstance(error, OSError | SafetensorError) or "(os error " in str(error)


@contextmanager
def replacing(path: Path, ours: bool = False) -> Iterator[Path]:
    """A temporary path to write to, whose file takes the name `path` if the block ends well.

    If it does not, the file is removed.

    Args:
        path: the final name.
        ours: whether the caller knows that lowkey wrote what is there.

    Raises:
        LowkeyError: if lowkey did not write what is there, or it cannot be written.
    """
    place = link_target(path)
    with disk_errors_explained(path), new_folder_beside(place) as folder:
        new = folder / NEW_NAME / place.name
        new.parent.mkdir()
        yield new
        if os.path.lexists(place) and not ours:
            check_replaceable(place)
        os.chmod(new, folder.stat().st_mode & 0o666)  # safetensors' own files are for nobody else to read
        # on the disk before it has its name, so that a power failure cannot leave an empty file there
        sync(new)
        os.replace(new, place)
        sync(place.parent)


def write_text(path: Path, text: str, ours: bool = False) -> None:
    """Write a text file in one step; see `replacing`."""
    with replacing(path, ours) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_marked(path: Path, text: str, kind: str, comment: tuple[str, str]) -> None:
    """Write a text that is recognised as lowkey's later, by a comment at its end; see `with_mark`."""
    write_text(path, with_mark(text, kind, comment))


def write_json(
    path: Path, value: Mapping[str, Any], kind: str, indent: int | None = 2, ours: bool = False
) -> str:
    """Write a JSON object that says what kind of file it is and has a checksum.

    Args:
        path: the file.
        value: the object. Numbers that are not finite become null.
        kind: what kind of file it is.
        indent: as in `json.dumps`.
        ours: as in `replacing`.

    Returns:
        The checksum.
    """
    whole = with_checksum(value, kind)
    write_text(path, json.dumps(whole, indent=indent) + "\n", ours)
    return whole[CHECKSUM]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], kind: str) -> str:
    """Write a safetensors file that says what kind of file it is and has a checksum.

    Tensors that share memory are written separately.

    Args:
        path: the file, which appears whole or not at all.
        tensors: its tensors by name.
        kind: the kind of file that a reader must ask for.

    Returns:
        The checksum.
    """
    import torch
    from safetensors.torch import save_file

    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, t in tensors.items():
        place = t.untyped_storage().data_ptr()
        whole[name] = t.contiguous() if place not in seen else t.clone(memory_format=torch.contiguous_format)
        seen.add(place)
    checksum = digest(whole)
    with replacing(path) as temporary:
        save_file(whole, temporary, metadata={KIND: f"{kind} {checksum}"})
    return checksum


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to write to, which takes the name `path` if the block ends well.

    What stood there is removed last.

    Raises:
        LowkeyError: if lowkey did not write all that is there, or it cannot be written.
    """
    check_folder(path, force=True)
    place = link_target(path)
    with disk_errors_explained(path), new_folder_beside(place) as folder:
        new = folder / NEW_NAME
        new.mkdir()
        yield new
        finish(new)
        # somebody may have put something there while the block ran
        read_consistently(place, lambda: check_removable(place))
        with suppress(FileNotFoundError):
            os.chmod(new, place.stat().st_mode & 0o7777)
        swap(new, place, folder)
        sync(place.parent)


def finish(folder: Path) -> None:
    """Complete a new folder: list its files, set their permissions, and write all to the disk."""
    write_json(folder / MANIFEST, manifest(folder), "files")
    mode = folder.stat().st_mode & 0o666
    for place, _, names in os.walk(folder):
        for name in names:
            os.chmod(Path(place) / name, mode)
            sync(Path(place) / name)
        sync(Path(place))


def join_folder(new: Path, path: Path) -> None:
    """Move the files of `new`, a folder of lowkey's, into `path` one by one.

    Files that an earlier call put there and that `new` does not have are removed. After a kill in between,
    the same call completes the work. Until then, the list in `path` says that it is not complete.

    Raises:
        LowkeyError: if lowkey did not write what stands in their places.
    """
    fresh, before = listed_files(new), listed_files(path) if (path / MANIFEST).exists() else {}
    # a call that was killed may have moved some files already: either checksum will do
    both = {name: [*before.get(name, ()), *fresh.get(name, ())] for name in (before | fresh)}
    for name in both:
        if os.path.lexists(path / name) and not unchanged(path / name, both[name]):
            raise LowkeyError(
                f"output {str(path / name)!r}: lowkey did not write this, or it was changed since; move it "
                "away"
            )
    with disk_errors_explained(path):
        write_json(path / MANIFEST, {"files": both, "complete": False}, "files")
        for name in fresh:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, path / name)
        for name in before.keys() - fresh.keys():
            (path / name).unlink(missing_ok=True)
        sync(path)
        write_json(path / MANIFEST, {"files": fresh, "complete": True}, "files")
    shutil.rmtree(new)
