"""Records of a suite: from the user's folder if one is given, otherwise from the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from lowkey.core.errors import LowkeyError, on_one_line
from lowkey.suites.files import Record, find_file, read_records
from lowkey.suites.sample import Source


@dataclass(frozen=True)
class Published:
    """Where a task is published.

    Args:
        names: paths of its file in a folder, the first one that exists counts.
        dataset: name of the data set on the hub.
        config: name of its configuration; None if it has one only.
        split: name of the split.
    """

    names: tuple[str, ...]
    dataset: str
    config: str | None = None
    split: str = "test"


def published_records(what: str, place: Published, source: Source) -> Iterator[Record]:
    """The first records of a task, as many as the source asks for.

    Args:
        what: the suite and task, for messages.
        place: where they are published.
        source: says how many, and names the folder.

    Raises:
        LowkeyError: the folder has no such file, the file is damaged, or the hub cannot be reached.
    """
    every = _from_hub(what, place) if source.folder is None else _from_folder(what, place, source)
    return islice(every, source.cases)


def _from_folder(what: str, place: Published, source: Source) -> Iterator[Record]:
    assert source.folder is not None
    return read_records(find_file(source.folder, place.names, what), what)


def _from_hub(what: str, place: Published) -> Iterator[Record]:
    """Rows of a data set, streamed, so that a few cases do not fetch all of it."""
    remedy = f"give --data-dir, a folder that has {place.names[0]}"
    try:
        import datasets
    except ImportError:
        raise LowkeyError(
            f"{what}: fetching it needs the library datasets; run pip install 'lowkey[eval]', or {remedy}"
        ) from None
    where = f"{place.dataset}{f' ({place.config})' if place.config else ''}"
    try:
        rows = datasets.load_dataset(place.dataset, place.config, split=place.split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield Record(dict(row), f"{where}, row {number}")
    except LowkeyError:
        raise
    except Exception as error:  # datasets raises many kinds; each means that the data cannot be had here
        raise LowkeyError(
            f"{what}: {where} cannot be fetched from the hub ({on_one_line(error, 100)}); {remedy}"
        ) from None
