"""Progress is a function that wraps an iterable; the library is silent, the command line draws bars on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

from lowkey.printable import printable

T = TypeVar("T")
EVERY = 30.0  # seconds between two lines


class Progress(Protocol):
    def __call__(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]: ...


def silent(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    return iter(items)


def bars(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """A rich progress bar on stderr; where that is no terminal, a line of text every half minute."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track

    size = total if total is not None else len(items) if isinstance(items, Sequence) else None
    console, label = Console(stderr=True), printable(label)
    yield from track(items, escape(label), total=size, console=console) if console.is_terminal else _lines(items, label, size)


def _lines(items: Iterable[T], label: str, size: int | None) -> Iterator[T]:
    told = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - told >= EVERY:
            told = time.monotonic()
            with suppress(OSError):  # nobody need be listening
                print(f"{label}: {done}" if size is None else f"{label}: {done} of {size}", file=sys.stderr, flush=True)
        yield item
