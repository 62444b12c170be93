"""Progress is a function that wraps an iterable; the library is silent, the command line draws bars on
stderr.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from lowkey.core.printable import printable

_T = TypeVar("_T")
SECONDS_BETWEEN_LINES = 30.0  # seconds between two lines


class Progress(Protocol):
    """label: what is done, or what is done to each item, in words."""

    def __call__(
        self, items: Iterable[_T], label: str | Callable[[_T], str], total: int | None = None
    ) -> Iterator[_T]: ...


def silent(items: Iterable[_T], label: str | Callable[[_T], str], total: int | None = None) -> Iterator[_T]:
    return iter(items)


def bars(items: Iterable[_T], label: str | Callable[[_T], str], total: int | None = None) -> Iterator[_T]:
    """A bar on stderr with the time that is left; where that is no terminal, a line of text every half
    minute.
    """
    from rich.console import Console

    size = total if total is not None else len(items) if isinstance(items, Sequence) else None
    console = Console(stderr=True)

    def words(item: _T) -> str:
        return printable(label(item) if callable(label) else label)

    yield from _bar(items, words, size, console) if console.is_terminal else _lines(items, words, size)


def _bar(items: Iterable[_T], words: Callable[[_T], str], size: int | None, console: Any) -> Iterator[_T]:
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Bars(*columns, console=console) as drawn:
        bar = drawn.add_task("", total=size, visible=size != 0)
        for item in items:
            drawn.update(bar, description=escape(words(item)))
            yield item
            drawn.advance(bar)


def _lines(items: Iterable[_T], words: Callable[[_T], str], size: int | None) -> Iterator[_T]:
    began = told = time.monotonic()
    for done, item in enumerate(items):
        if (now := time.monotonic()) - told >= SECONDS_BETWEEN_LINES:
            told = now
            far = (
                f"{done}"
                if size is None
                else f"{done} of {size}{_left((now - began) / done * (size - done)) if done else ''}"
            )
            with suppress(OSError):  # nobody need be listening
                print(f"{words(item)}: {far}", file=sys.stderr, flush=True)
        yield item


def _left(seconds: float) -> str:
    """`, about 4 min left`"""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f", about {minutes // 60} h {minutes % 60} min left"
    return f", about {minutes} min left" if minutes else f", about {round(seconds)} s left"
