"""Chunks of prompts over latents beside exact tokens, by the engine's own kernel for CPUs; see `reading`.

Tokens leave the window a unit at a time, so the new tokens between two such moments see the same latents, and
exactly what follows. They are a sequence of their own to the kernel: its first pages hold what was rebuilt
from latents, and its last ones exact tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .reading import Reading, groups


@dataclass
class WindowedReading(Reading):
    """See `Reading`; the kernel's pages are units, first all of latents, then exact ones.

    Args:
        exact: (2, n), sequence and place of the exact tokens.
        sinks: (3, m), sequence and place of first tokens, and where they lie among those of latents.
    """

    exact: Tensor
    sinks: Tensor


def windowed_readings(
    starts: Sequence[int],
    lengths: Sequence[int],
    table: Tensor,
    size: int,
    window: tuple[int, int, int],
) -> list[WindowedReading]:
    """Group the sequences of a batch that have more than one new token.

    Args:
        starts: (b + 1), where the new tokens of each sequence begin.
        lengths: (b), tokens of each.
        table: (b, n), the blocks of latents of each.
        size: tokens of such a block.
        window: first tokens that are exact, newest ones, and tokens of a unit.
    """
    return [_reading(rows, starts, lengths, table, size, window) for rows in groups(starts, lengths)]


def _reading(
    rows: Sequence[int],
    starts: Sequence[int],
    lengths: Sequence[int],
    table: Tensor,
    size: int,
    window: tuple[int, int, int],
) -> WindowedReading:
    """The sequences `rows` of a batch; see `windowed_readings`."""
    first, recent, unit = window
    left = [
        [max(at + 1 - recent, 0) // unit * unit for at in (_before(i, starts, lengths), lengths[i] - 1)]
        for i in rows
    ]
    blocks = [table[i, : -(-stop // size)] for i, (_, stop) in zip(rows, left, strict=True)]
    begins, page = [], 0
    for own in blocks:
        begins.append(page)
        page += len(own) * size // unit
    pieces: list[tuple[int, int, list[int]]] = []  # new tokens, tokens and pages of each
    exact, sinks = [], []
    for i, (start, stop), begin in zip(rows, left, begins, strict=True):
        count = -(-(lengths[i] - start) // unit)
        index = torch.arange(start, start + count * unit).clamp_max(lengths[i] - 1)
        exact.append(torch.stack([torch.full_like(index, i), index]))
        index = torch.arange(min(first, stop))
        sinks.append(torch.stack([torch.full_like(index, i), index, begin * unit + index]))
        at = _before(i, starts, lengths)
        for behind in range(start, stop + 1, unit):
            end = min(lengths[i], behind + unit + recent - 1)
            known = range(begin, begin + behind // unit)
            near = range(page + (behind - start) // unit, page + -(-(end - start) // unit))
            pieces.append((end - at, end, [*known, *near]))
            at = end
        page += count
    own = torch.zeros(len(pieces), max(len(pages) for *_, pages in pieces), dtype=torch.int32)
    for row, (*_, pages) in zip(own, pieces, strict=True):
        row[: len(pages)] = torch.tensor(pages, dtype=torch.int32)
    new = torch.tensor([0, *(n for n, *_ in pieces)], dtype=torch.int32)
    return WindowedReading(
        slice(starts[rows[0]], starts[rows[-1] + 1]),
        torch.cat(blocks).long().unsqueeze(0),
        torch.cat([torch.arange(len(x) * size) for x in blocks]).unsqueeze(0),
        page,
        unit,
        own,
        new.cumsum(0, dtype=torch.int32),
        torch.tensor([n for _, n, _ in pieces], dtype=torch.int32),
        exact=torch.cat(exact, 1),
        sinks=torch.cat(sinks, 1),
    )


def _before(i: int, starts: Sequence[int], lengths: Sequence[int]) -> int:
    """Tokens of a sequence before its new ones."""
    return lengths[i] - (starts[i + 1] - starts[i])
