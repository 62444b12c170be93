"""Rules that what a layer was given out of a file must keep: shapes, and rows of different length."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowkey.ops.ragged import row_of
from lowkey.storage.file_names import file_name


def unlike(name: str, t: Tensor, *shape: int) -> str | None:
    """What is wrong with a tensor that should have this shape, or None."""
    return (
        None if tuple(t.shape) == shape else f"{file_name(name)} is of shape {tuple(t.shape)} and not {shape}"
    )


def first_flaw(*rules: str | None) -> str | None:
    """The first rule that is broken, or None."""
    return next((rule for rule in rules if rule), None)


def rows_flaw(layer: Any, heads: int, starts: Tensor, where: Tensor, kept: int) -> str | None:
    """Check that rows lie one behind another, with tokens from before the tail, each once and in order."""
    where = where.long()
    if int(starts[0]) != 0 or int(starts[-1]) != kept or bool((starts.diff() < 0).any()):
        return "rows do not begin one behind the other"
    if not kept:
        return None
    row = row_of(starts)
    index = where + layer.offset[:, 0][row // heads]
    if bool(((index < 0) | (index >= layer.seen - layer.tail_length)).any()):
        return "positions are not among those of the tokens seen"
    together = row[1:] == row[:-1]
    return "positions of a row do not rise" if bool((together & (where.diff() <= 0)).any()) else None
