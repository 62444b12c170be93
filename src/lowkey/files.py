"""Files are written beside their name and renamed, so a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowkey.types import LowkeyError


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
        temporary.unlink(missing_ok=True)


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
    except FileNotFoundError:
        raise LowkeyError(f"{what} {str(path)!r} does not exist; give the folder that lowkey compress wrote") from None
    except (OSError, struct.error, SafetensorError, ValueError) as error:
        raise LowkeyError(
            f"{what} {str(path)!r} cannot be read ({type(error).__name__}); it is truncated or damaged: make it again"
        ) from None


def check_output(path: Path, force: bool) -> None:
    """A folder that does not exist, is empty, or may be replaced because the user said so."""
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not force):
        raise LowkeyError(f"output {str(path)!r} already holds files; choose another folder or pass --force")


def publish(folder: Path, path: Path) -> None:
    """Move a finished folder to its name. What stood there goes only when the new one is in place."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(folder, path)
    except OSError as error:
        if old.exists():
            os.replace(old, path)
        raise LowkeyError(f"cannot write {str(path)!r}: {error.strerror}") from error
    shutil.rmtree(old, ignore_errors=True)
