"""Write lines to stdout and stderr. Tables are in `lowkey.cli.tables`."""

from __future__ import annotations

import sys
from contextlib import suppress

from lowkey.core.printable import printable


def say(line: str) -> None:
    """Write a line of the result to stdout."""
    print(printable(line))


def note(line: str) -> None:
    """Write a line about the result to stderr. It is no error if stderr is closed."""
    with suppress(BrokenPipeError):
        print(printable(line), file=sys.stderr, flush=True)
