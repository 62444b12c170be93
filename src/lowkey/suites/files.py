"""Files of suites, read without trust: each record is checked, and a message names the file and the line."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowkey.core import files
from lowkey.core.errors import LowkeyError
from lowkey.core.options import shown

MOST_BYTES = 2**33  # of a file, also once it is unpacked
MOST_LINE = 2**28  # characters of a line; the longest published sample has some millions
FORMAT_REMEDY = "give a file of the format that the suite publishes"


@dataclass(frozen=True)
class Record:
    """One record of a file.

    Args:
        values: the record.
        place: file and line, for messages.
    """

    values: dict[str, Any]
    place: str

    def refuse(self, what: str) -> LowkeyError:
        """The error for a record, as one line."""
        return LowkeyError(f"{self.place}: {what}; {FORMAT_REMEDY}")

    def get(self, name: str) -> Any:
        """A field that must be there. Raises: LowkeyError."""
        if name not in self.values:
            raise self.refuse(f"has no field {name!r}")
        return self.values[name]

    def text(self, name: str, empty: bool = False) -> str:
        """A field that must be text.

        Args:
            name: of the field.
            empty: whether the text may be empty.

        Raises:
            LowkeyError: it is missing or something else.
        """
        value = self.get(name)
        if not isinstance(value, str) or not (empty or value.strip()):
            wanted = "text" if empty else "text that is not empty"
            raise self.refuse(f"{name} is {shown(value)} and must be {wanted}")
        return value

    def whole(self, name: str, least: int = 0) -> int:
        """A field that must be a whole number of at least `least`. Raises: LowkeyError."""
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.refuse(f"{name} is {shown(value)} and must be a whole number of at least {least}")
        return value

    def texts(self, name: str, least: int = 1) -> tuple[str, ...]:
        """A field that must be a list of at least `least` texts. Raises: LowkeyError."""
        value = self.get(name)
        if not isinstance(value, list) or len(value) < least or not all(isinstance(v, str) for v in value):
            raise self.refuse(f"{name} is {shown(value)} and must be a list of at least {least} texts")
        return tuple(value)


def find_file(folder: Path, names: tuple[str, ...], what: str) -> Path:
    """The first of several files that a folder has.

    Args:
        folder: the folder.
        names: paths inside it.
        what: the suite or task, for messages.

    Raises:
        LowkeyError: it is no folder, or it has none of them.
    """
    if not folder.is_dir():
        raise LowkeyError(f"data-dir {str(folder)!r}: is no folder; give the folder with the files of {what}")
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise LowkeyError(f"data-dir {str(folder)!r}: has no {' or '.join(names)}; {what} needs it")


def read_records(path: Path, what: str) -> Iterator[Record]:
    """The records of a `.jsonl` file, one a line, or of a `.json` file with one list. Either may be packed
    with gzip (`.gz`). Numbers of records and lines begin at 1.

    Args:
        path: the file.
        what: the suite or task, for messages.

    Raises:
        LowkeyError: the file is missing, no UTF-8 text, or a record is no object of JSON.
    """
    if path.name.removesuffix(".gz").endswith(".json"):
        yield from _listed(path, what)
        return
    empty = True
    with files.opened_file(path, f"{what}:", MOST_BYTES, FORMAT_REMEDY) as raw:
        packed = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
        stream = io.BufferedReader(packed)
        for number in range(1, 2**62):
            place = f"{path}, line {number}"
            try:
                line = stream.readline(MOST_LINE + 1)
            except (OSError, EOFError, zlib.error) as error:
                raise LowkeyError(f"{place}: cannot be unpacked ({error}); {FORMAT_REMEDY}") from None
            if not line:
                break
            if len(line) > MOST_LINE:
                raise LowkeyError(f"{place}: is longer than {MOST_LINE} bytes; {FORMAT_REMEDY}")
            if line.strip():
                empty = False
                yield _record(line, place)
    if empty:
        raise LowkeyError(f"{path}: has no records; {FORMAT_REMEDY}")


def _parsed(content: bytes, place: str) -> Any:
    """JSON of some bytes. Raises: LowkeyError."""
    try:
        return files.parse_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise LowkeyError(f"{place}: is no UTF-8 text; {FORMAT_REMEDY}") from None
    except ValueError as error:
        reason = " ".join(str(error).split())[:120]
        raise LowkeyError(f"{place}: is no JSON ({reason}); {FORMAT_REMEDY}") from None


def _record(line: bytes, place: str) -> Record:
    """A line of a file as a record. Raises: LowkeyError."""
    values = _parsed(line, place)
    if not isinstance(values, dict):
        raise LowkeyError(f"{place}: is {shown(values)} and must be an object of JSON; {FORMAT_REMEDY}")
    return Record(values, place)


def _listed(path: Path, what: str) -> Iterator[Record]:
    """The records of a file with one list of JSON. Raises: LowkeyError."""
    content = files.read_bytes(path, f"{what}:", MOST_BYTES, FORMAT_REMEDY)
    if path.name.endswith(".gz"):
        try:
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MOST_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            raise LowkeyError(f"{path}: cannot be unpacked ({error}); {FORMAT_REMEDY}") from None
    listed = _parsed(content, str(path))
    if not isinstance(listed, list) or not listed:
        raise LowkeyError(f"{path}: is {shown(listed)} and must be a list of objects; {FORMAT_REMEDY}")
    for number, values in enumerate(listed, 1):
        if not isinstance(values, dict):
            raise LowkeyError(
                f"{path}, record {number}: is {shown(values)} and must be an object; {FORMAT_REMEDY}"
            )
        yield Record(values, f"{path}, record {number}")
