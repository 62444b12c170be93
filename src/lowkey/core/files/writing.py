"""Files are written beside their name and renamed, so a reader sees the old one or the new one, never half of
one; folders too.
"""

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
from lowkey.core.files.outputs import (
    MANIFEST,
    check_folder,
    check_removable,
    check_replaceable,
    link_target,
    listed,
    manifest,
    marked,
    unchanged,
)
from lowkey.core.files.reading import CHECKSUM, KIND, digest, sealed
from lowkey.core.files.swapping import NEW_NAME, new_folder_beside, steady, swap, sync

if TYPE_CHECKING:
    from torch import Tensor

FREE_SPACE = "choose another place or free some space"


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """A disk that is full, or whatever else keeps `path` from being written, becomes a LowkeyError."""
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
    """safetensors has an error of its own for a full disk, and tokenizers raises plain exceptions that name
    the system's.
    """
    return isinstance(error, OSError | SafetensorError) or "(os error " in str(error)


@contextmanager
def replacing(path: Path, ours: bool = False) -> Iterator[Path]:
    """A temporary path, whose file takes the name `path` when the block ends well and is removed when it does
    not.

    ours: the caller knows that what is there is lowkey's. Errors: LowkeyError when it is not, or cannot be
    written.
    """
    place = link_target(path)
    with explained(path), new_folder_beside(place) as folder:
        new = folder / NEW_NAME / place.name
        new.parent.mkdir()
        yield new
        if os.path.lexists(place) and not ours:
            check_replaceable(place)
        os.chmod(new, folder.stat().st_mode & 0o666)  # safetensors' own files are for nobody else to read
        sync(new)
        os.replace(new, place)
        sync(place.parent)


def write_text(path: Path, text: str, ours: bool = False) -> None:
    with replacing(path, ours) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_marked(path: Path, text: str, kind: str, comment: tuple[str, str]) -> None:
    """A text that is recognised as ours later, by a comment at its end."""
    write_text(path, marked(text, kind, comment))


def write_json(
    path: Path, value: Mapping[str, Any], kind: str, indent: int | None = 2, ours: bool = False
) -> str:
    """A JSON object that says what it is and has a checksum, which is returned. What is not finite becomes
    null.
    """
    whole = sealed(value, kind)
    write_text(path, json.dumps(whole, indent=indent) + "\n", ours)
    return whole[CHECKSUM]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], kind: str) -> str:
    """A safetensors file that says what it is and has a checksum, which is returned. Tensors that share
    memory are written apart.
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
    """A temporary folder that takes the name `path` when the block ends well; what stood there goes last, if
    all of it is lowkey's.

    Errors: LowkeyError when it is not, or cannot be written.
    """
    check_folder(path, force=True)
    place = link_target(path)
    with explained(path), new_folder_beside(place) as folder:
        new = folder / NEW_NAME
        new.mkdir()
        yield new
        finish(new)
        steady(place, lambda: check_removable(place))
        with suppress(FileNotFoundError):
            os.chmod(new, place.stat().st_mode & 0o7777)
        swap(new, place, folder)
        sync(place.parent)


def finish(folder: Path) -> None:
    """What was written into a folder is listed there, readable by whom the folder is, and on the disk."""
    write_json(folder / MANIFEST, manifest(folder), "files")
    mode = folder.stat().st_mode & 0o666
    for place, _, names in os.walk(folder):
        for name in names:
            os.chmod(Path(place) / name, mode)
            sync(Path(place) / name)
        sync(Path(place))


def join_folder(new: Path, path: Path) -> None:
    """The files of `new`, a folder of ours, take their places in `path` one by one. Files that an earlier
    call put there and that `new` does not have are removed. After a kill in between, the same call again
    completes the work; until then the list in `path` says that it is not complete.

    Errors: LowkeyError when lowkey did not write what is in their place.
    """
    fresh, before = listed(new), listed(path) if (path / MANIFEST).exists() else {}
    both = {name: [*before.get(name, ()), *fresh.get(name, ())] for name in (before | fresh)}
    for name in both:
        if os.path.lexists(path / name) and not unchanged(path / name, both[name]):
            raise LowkeyError(
                f"output {str(path / name)!r}: lowkey did not write this, or it was changed since; move it "
                "away"
            )
    with explained(path):
        write_json(path / MANIFEST, {"files": both, "complete": False}, "files")
        for name in fresh:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, path / name)
        for name in before.keys() - fresh.keys():
            (path / name).unlink(missing_ok=True)
        sync(path)
        write_json(path / MANIFEST, {"files": fresh, "complete": True}, "files")
    shutil.rmtree(new)
