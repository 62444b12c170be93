"""Progress is a function that wraps an iterable; the library is silent, the command line draws bars on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    def __call__(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]: ...


def silent(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    return iter(items)


def bars(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """A rich progress bar on stderr; plain text when stderr is no terminal."""
    from rich.console import Console
    from rich.progress import track

    size = total if total is not None else len(items) if isinstance(items, Sequence) else None
    console = Console(stderr=True)
    yield from track(items, label, total=size, console=console, disable=not console.is_terminal)
