"""Lines on stdout and stderr. Tables are in `lowkey.cli.tables`."""

from __future__ import annotations

import sys
from contextlib import suppress

from lowkey.core.printable import printable


def say(line: str) -> None:
    """A line of the result, on stdout."""
    print(printable(line))


def note(line: str) -> None:
    """A line about the result, on stderr. A reader that has closed stderr is no error."""
    with suppress(BrokenPipeError):
        print(printable(line), file=sys.stderr, flush=True)
