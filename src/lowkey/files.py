"""Files are written beside their name and renamed, so a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowkey.types import LowkeyError

WORK = r"job\.json|statistics\.safetensors|(layer|tuned)-\d+\.safetensors|training\.safetensors|\..*\.tmp"  # the files of unfinished work


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise LowkeyError(f"cannot write {str(path)!r}: {error.strerror or error}; choose another place or free some space") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with replacing(path) as temporary:
        try:
            save_file({name: t.contiguous() for name, t in tensors.items()}, temporary)
        except SafetensorError as error:
            raise LowkeyError(f"cannot write {str(path)!r}: {error}; choose another place or free some space") from error


def read_json(path: Path, what: str) -> dict:
    """A JSON object of at most 16 MiB."""
    try:
        if path.stat().st_size > 2**24:
            raise LowkeyError(f"{what} {str(path)!r} is larger than 16 MiB; it is not one of ours")
        value = json.loads(path.read_text(encoding="utf-8"))
    except LowkeyError:
        raise
    except FileNotFoundError:
        raise LowkeyError(f"{what} {str(path)!r} does not exist; give the folder that lowkey compress wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise LowkeyError(f"{what} {str(path)!r} cannot be read ({type(error).__name__}); it is damaged or not one of ours") from None
    if not isinstance(value, dict):
        raise LowkeyError(f"{what} {str(path)!r} holds no JSON object; it is damaged or not one of ours")
    return value


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file; its header's size is checked before it is believed."""
    try:
        with path.open("rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
        if size > min(path.stat().st_size, 2**24):
            raise LowkeyError(f"{what} {str(path)!r} has an impossible header of {size} bytes; it is damaged or not one of ours")
        return load_file(path)
    except LowkeyError:
        raise
    except FileNotFoundError:
        raise LowkeyError(f"{what} {str(path)!r} does not exist; give the folder that lowkey compress wrote") from None
    except (OSError, struct.error, SafetensorError, ValueError) as error:
        raise LowkeyError(
            f"{what} {str(path)!r} cannot be read ({type(error).__name__}); it is truncated or damaged: make it again"
        ) from None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_ours(folder: Path, names: set[str]) -> None:
    """A folder that does not exist or holds nothing but files of these names."""
    if folder.is_file() or (folder.is_dir() and not {p.name for p in folder.iterdir()} <= names):
        raise LowkeyError(f"output {str(folder)!r} holds other files; choose another folder")


def check_output(path: Path, force: bool) -> Path:
    """`path` must not exist, be empty, or may be replaced because the user said so. Returns the folder for unfinished work beside
    it, `path`.partial, which must be ours."""
    if path.name in ("", ".."):
        raise LowkeyError(f"output {str(path)!r} has no name of its own; give the name of a new folder")
    if path.exists() and not path.is_dir():
        raise LowkeyError(f"output {str(path)!r} is a file; choose a folder")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise LowkeyError(f"output {str(path)!r} already holds files; choose another folder or pass --force")
    work = path.with_name(f"{path.name}.partial")
    if work.exists() and not (work.is_dir() and all(re.fullmatch(WORK, p.name) for p in work.iterdir())):
        raise LowkeyError(f"output {str(path)!r}: {str(work)!r}, where unfinished work goes, holds other files; choose another folder")
    return work


def check_file(path: Path, force: bool = True) -> None:
    """A file that may be written: told before the work, not after it."""
    if path.is_dir():
        raise LowkeyError(f"output {str(path)!r} is a folder; give the name of a file")
    if path.exists() and not force:
        raise LowkeyError(f"output {str(path)!r} already exists; choose another name or pass --force")


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well; what stood there goes last. Errors: LowkeyError
    when it cannot be written."""
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _swap(temporary, path, old)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        what = getattr(error, "strerror", None) or error
        raise LowkeyError(f"cannot write {str(path)!r}: {what}; choose another place or free some space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _swap(new: Path, path: Path, old: Path) -> None:
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
