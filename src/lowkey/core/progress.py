"""Progress of long work, shown by a function that wraps an iterable.

The library uses `silent` unless it is given another; the command line uses `bars`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from lowkey.core.printable import printable

_T = TypeVar("_T")
SECONDS_BETWEEN_LINES = 30.0  # where stderr is no terminal


class Progress(Protocol):
    """Yields items one by one, and may tell the user how far the work is."""

    def __call__(
        self, items: Iterable[_T], label: str | Callable[[_T], str], total: int | None = None
    ) -> Iterator[_T]:
        """Yield the items.

        Args:
            items: what is worked on.
            label: what is done, in words; or a function that says what is done to an item.
            total: number of items, if `items` does not know it.
        """
        ...


def silent(items: Iterable[_T], label: str | Callable[[_T], str], total: int | None = None) -> Iterator[_T]:
    """Yield the items and show nothing; see `Progress`."""
    return iter(items)


def bars(items: Iterable[_T], label: str | Callable[[_T], str], total: int | None = None) -> Iterator[_T]:
    """Yield the items, with a bar and the time left on stderr; see `Progress`.

    Where stderr is no terminal, a line of text is printed every half minute instead.
    """
    from rich.console import Console

    # known sizes allow an estimate of the time left
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
    began = last_line = time.monotonic()
    for done, item in enumerate(items):
        if (now := time.monotonic()) - last_line >= SECONDS_BETWEEN_LINES:
            last_line = now
            if size is None:
                state = f"{done}"
            else:
                left = _time_left((now - began) / done * (size - done)) if done else ""
                state = f"{done} of {size}{left}"
            with suppress(OSError):  # stderr may have been closed
                print(f"{words(item)}: {state}", file=sys.stderr, flush=True)
        yield item


def _time_left(seconds: float) -> str:
    """The time left in words, like `, about 4 min left`."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f", about {minutes // 60} h {minutes % 60} min left"
    return f", about {minutes} min left" if minutes else f", about {round(seconds)} s left"
