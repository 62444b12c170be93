"""Reads files without trusting them.

What is accepted is a regular file of a plausible size, strict JSON or safetensors, with the checksum that it
was written with. All kinds of files are read here. Whether their contents fit together, the loader of each
kind checks.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
import tomllib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowkey.core.errors import LowkeyError
from lowkey.core.files.atomic import read_consistently

if TYPE_CHECKING:
    from torch import Tensor

MOST_JSON, MOST_HEADER, MOST_TOML, MOST_TEXT = 2**26, 2**24, 2**20, 2**32  # bytes
ANY_SIZE = 2**63
LARGEST_NUMBER = 2**64  # whole numbers are smaller
DEEPEST = 64  # tables inside tables
# fields of our JSON files and of our tensors' metadata: the kind of file, and a checksum of all the rest
KIND, CHECKSUM = "lowkey", "checksum"
FILE_TYPES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
OURS = "give one that lowkey wrote"
MAKE_AGAIN = "make it again"


# -- bytes


@contextmanager
def opened_file(path: Path, what: str, most: int, remedy: str = OURS) -> Iterator[BufferedReader]:
    """Open a regular file for reading.

    Args:
        path: the file.
        what: what it is, for messages.
        most: the most bytes that it may have.
        remedy: what the user should do instead, for messages.

    Raises:
        LowkeyError: for anything else, at once: pipes and devices are not waited for.
    """
    try:
        # before opening, since opening a pipe waits for its writer; and after, for what was opened
        _check_regular(os.stat(path), path, what, most, remedy)
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            _check_regular(os.fstat(file.fileno()), path, what, most, remedy)
            yield file
    except (FileNotFoundError, NotADirectoryError):
        raise LowkeyError(f"{what} {str(path)!r} does not exist; {remedy}") from None
    except LowkeyError:
        raise
    except (OSError, ValueError, MemoryError, RecursionError) as error:
        raise LowkeyError(
            f"{what} {str(path)!r} cannot be read ({_reason(error)}); it is damaged or not one of ours"
        ) from None


def _check_regular(status: os.stat_result, path: Path, what: str, most: int, remedy: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        file_type = FILE_TYPES.get(stat.S_IFMT(status.st_mode), "no regular file")
        raise LowkeyError(f"{what} {str(path)!r} is {file_type}; {remedy}")
    if status.st_size > most:
        raise LowkeyError(f"{what} {str(path)!r} is larger than {most / 2**20:.0f} MiB; {remedy}")


def _reason(error: BaseException) -> str:
    """What an error says, on one short line."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(reason).split())[:120].rstrip(". ")


def read_bytes(path: Path, what: str, most: int, remedy: str = OURS) -> bytes:
    """The contents of a regular file; see `opened_file`."""
    with opened_file(path, what, most, remedy) as file:
        return file.read(most + 1)  # the file may have grown since its size was checked


def file_checksum(path: Path, what: str = "file") -> str:
    """The checksum of a file: its size in bytes, a colon, and its sha256."""
    with opened_file(path, what, ANY_SIZE) as file:
        return _size(file) + hashlib.file_digest(file, "sha256").hexdigest()


def has_checksum(path: Path, sums: Collection[str], what: str = "file") -> bool:
    """Whether a file has one of these checksums.

    A file of another size is not read: a sparse file can take hours.

    Args:
        path: the file.
        sums: checksums; each begins with the size that a file must have.
        what: kind of file, for errors.
    """
    with opened_file(path, what, ANY_SIZE) as file:
        size = _size(file)
        known = any(str(wanted).startswith(size) for wanted in sums)
        return known and size + hashlib.file_digest(file, "sha256").hexdigest() in sums


def _size(file: BufferedReader) -> str:
    """The size of a file as checksums begin with it."""
    return f"{os.fstat(file.fileno()).st_size}:"


# -- JSON and TOML


def parse_json(text: str, infinite: bool = False) -> Any:
    """Parse JSON strictly.

    Names must differ, whole numbers must be smaller than 2^64, and nesting must end.

    Args:
        text: the JSON.
        infinite: whether NaN and Infinity are allowed.

    Raises:
        ValueError: for anything else.
    """

    def number(written: str) -> float:
        parsed = float(written)
        if not (infinite or math.isfinite(parsed)):
            raise ValueError(f"{written[:20]} is no number of JSON")
        return parsed

    try:
        value = json.loads(
            text, object_pairs_hook=_once, parse_int=_whole, parse_float=number, parse_constant=number
        )
    except RecursionError:
        raise ValueError("it is nested without end") from None
    _check_depth(value)
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML as strictly as `parse_json`. Dates, nan and inf are refused: no file of ours has any.

    Raises:
        ValueError: for anything else.
    """
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested without end") from None
    _check_depth(table, finite=True)
    return table


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which no name stands twice."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return table


def _whole(written: str) -> int:
    """A whole number of JSON. One of many digits is refused before it is computed, which takes long."""
    if len(written) > len(str(LARGEST_NUMBER)):
        raise ValueError(f"a whole number of {len(written)} digits")
    return int(written)


def _check_depth(value: object, left: int = DEEPEST, finite: bool = False) -> None:
    """Refuse deep nesting, huge numbers and unknown types. Raises: ValueError."""
    if isinstance(value, dict | list):
        if not left:
            raise ValueError("it is nested without end")
        for inside in value.values() if isinstance(value, dict) else value:
            _check_depth(inside, left - 1, finite)
    elif isinstance(value, int) and abs(value) >= LARGEST_NUMBER:
        raise ValueError("a whole number is larger than any that is meant")
    elif finite and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number that can be meant")
    elif not (value is None or isinstance(value, str | int | float)):
        raise ValueError(f"{value} is neither text nor a number")


def with_checksum(value: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A value as JSON holds it, with the kind of file and a checksum of all the rest.

    Numbers that are not finite become null.
    """
    # through JSON, so that the checksum is of what a reader will get
    plain = {KIND: kind, **json.loads(json.dumps(jsonable(value)))}
    return plain | {CHECKSUM: json_digest(plain)}


def jsonable(value: Any) -> Any:
    """A value as JSON holds it. Numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {name: jsonable(inside) for name, inside in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inside) for inside in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_digest(plain: Mapping[str, Any]) -> str:
    """The checksum of a JSON object, without its own checksum."""
    kept = {name: value for name, value in plain.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_json(
    path: Path, what: str, kind: str, newest: int | None = None, *, loose: bool = False, source: str = OURS
) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Args:
        path: the file.
        what: what it is, for messages.
        kind: the kind that it was written as.
        newest: the newest format that is known; None if this kind has no formats.
        loose: whether to accept files that others wrote, without a checksum and with infinite numbers.
        source: the remedy in the message if there is no such file.

    Returns:
        The object, without kind and checksum.

    Raises:
        LowkeyError: for a file that does not exist, is damaged, of a newer format or of another kind.
    """

    def refuse(rule: str) -> LowkeyError:
        return LowkeyError(f"{what} {str(path)!r} {rule}; it is damaged or not one of ours: {MAKE_AGAIN}")

    try:
        content = parse_json(read_bytes(path, what, MOST_JSON, source).decode(), infinite=loose)
    except LowkeyError:
        raise
    except (ValueError, MemoryError) as error:
        raise refuse(f"cannot be read ({_reason(error)})") from None
    if not isinstance(content, dict):
        raise refuse("holds no JSON object")
    if newest is not None:
        version = content.get("format")
        if type(version) is not int or version < 1:
            raise refuse(f"has format {version!r:.40}, which is not a number")
        if version > newest:
            raise LowkeyError(
                f"{what} {str(path)!r}: format {version} is newer than {newest}, the newest known here; "
                "upgrade lowkey"
            )
    if not (loose and CHECKSUM not in content):
        if content.get(KIND) != kind:
            raise refuse(f"is not marked as {kind!r}")
        if content.get(CHECKSUM) != json_digest(content):
            raise refuse("is not what was written there: its checksum differs")
    return {name: value for name, value in content.items() if name not in (KIND, CHECKSUM)}


def stated_checksum(path: Path, what: str) -> str | None:
    """The checksum that a JSON file of ours says it has. (`read_json` checks it.) Raises: LowkeyError."""
    try:
        content = parse_json(read_bytes(path, what, MOST_JSON).decode())
    except ValueError as error:
        raise LowkeyError(
            f"{what} {str(path)!r} cannot be read ({_reason(error)}); it is damaged: {MAKE_AGAIN}"
        ) from None
    return content.get(CHECKSUM) if isinstance(content, dict) else None


# -- tensors


def read_tensors(
    path: Path,
    what: str,
    kind: str,
    checksum: str | None = None,
    *,
    finite: bool = True,
    remedy: str = MAKE_AGAIN,
) -> dict[str, Tensor]:
    """Read all tensors that `write_tensors` wrote.

    Args:
        path: the file.
        what: what it is, for messages.
        kind: the kind that it was written as.
        checksum: that it must have, or None.
        finite: whether to refuse NaN and infinite numbers.
        remedy: what the user should do about a damaged file, for messages.

    Raises:
        LowkeyError: for a file that does not exist, is damaged or of another kind.
    """
    return read_consistently(path, lambda: _tensors(path, what, kind, checksum, finite, remedy))


def _tensors(
    path: Path, what: str, kind: str, checksum: str | None, finite: bool, remedy: str
) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    def refuse(rule: str) -> LowkeyError:
        return LowkeyError(
            f"{what} {str(path)!r} {rule}; it is truncated, damaged or not one of ours: {remedy}"
        )

    marked, summed = tensor_marks(path, what, remedy)
    if marked != kind:
        raise refuse(f"is not marked as {kind!r}")
    if checksum is not None and summed != checksum:
        raise refuse("is not the file that the JSON beside it describes")
    try:
        tensors = load_file(path)
    except (Exception, MemoryError) as error:  # safetensors has several kinds, for damage alone
        raise refuse(f"cannot be read ({_reason(error)})") from None
    if summed != digest(tensors):
        raise refuse("is not what was written there: its checksum differs")
    if finite and not all_finite(tensors.values()):
        raise refuse("holds NaN or infinite numbers")
    return tensors


def tensor_marks(path: Path, what: str, remedy: str = MAKE_AGAIN) -> tuple[str, str]:
    """What a safetensors file says it is.

    The size of its header is checked before the header is read.

    Args:
        path: the file.
        what: kind of file, for errors.
        remedy: what to do about a damaged one, for errors.

    Returns:
        (kind, checksum); empty texts if it says nothing.

    Raises:
        LowkeyError: for what is no safetensors file.
    """

    def refuse(rule: str) -> LowkeyError:
        return LowkeyError(
            f"{what} {str(path)!r} {rule}; it is truncated, damaged or not one of ours: {remedy}"
        )

    with opened_file(path, what, _memory()) as file:
        length = file.read(8)
        size = struct.unpack("<Q", length)[0] if len(length) == 8 else 0
        if not 2 <= size <= min(os.fstat(file.fileno()).st_size - 8, MOST_HEADER):
            raise refuse(f"has an impossible header of {size} bytes")
        header = file.read(size)
    try:
        content = parse_json(header.decode())
    except ValueError as error:
        raise refuse(f"has a header that is none ({_reason(error)})") from None
    known = content.get("__metadata__") if isinstance(content, dict) else None
    kind, _, checksum = str(known.get(KIND, "")).partition(" ") if isinstance(known, dict) else ("", "", "")
    return kind, checksum


def _memory() -> int:
    """The memory of this machine in bytes; a larger file cannot be loaded."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of the names, dtypes, shapes and numbers of tensors."""
    import torch

    sha256 = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        sha256.update(json.dumps([name, str(t.dtype), list(t.shape)]).encode())
        # as bytes, since numpy has no bfloat16
        sha256.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def all_finite(tensors: Any) -> bool:
    """Whether tensors of real or complex numbers hold neither NaN nor infinite numbers."""
    return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point() or t.is_complex())
