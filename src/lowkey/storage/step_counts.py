"""What the queries of plain steps see, as counts and not as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

NEVER = 2**62  # a slot that no token reaches
ALIGNED = 32  # rows of a kernel begin at a multiple of it, which every packing's block divides


@dataclass(frozen=True)
class Sequences:
    """Where the tokens of a batch's sequences lie in a layer, looked at once for many steps.

    Args:
        first: (b), the index of each sequence's first real token.
        offset: (b), index less position.
        slot: (b), the index from which each sequence's tokens are stored; slots are counted from there.
        sinks: (b, n), ascending, the index of the token in each sink slot; NEVER where there is none.
    """

    first: np.ndarray
    offset: np.ndarray
    slot: np.ndarray
    sinks: np.ndarray

    def runs(self) -> tuple[np.ndarray, np.ndarray]:
        """The dense slots that queries see as they are stored, once they are: real tokens but sinks.

        Returns:
            (the first slot of each run (k, b), the slot behind its last (k, b)), both 0 for runs that a
            sequence does not have; the last run of each ends at NEVER.
        """
        begin = np.maximum(self.first - self.slot, 0)
        sinks = np.where(self.sinks < NEVER, self.sinks - self.slot[:, None], NEVER).T
        starts = np.maximum(np.concatenate([begin[None], np.minimum(sinks + 1, NEVER)]), begin)
        stops = np.concatenate([sinks, np.full((1, len(begin)), NEVER)])
        full = starts < stops
        starts, stops = (np.where(full, x, 0) for x in (starts, stops))
        return starts[full.any(1)], stops[full.any(1)]


@dataclass(frozen=True)
class View:
    """What the newest query of each sequence sees.

    Args:
        dense: (b), how many dense slots have left the window.
        window: (b), the first slot of the window's tensors that it sees.
        stop: the slot behind the last.
        sinks: (b), how many sinks have left the window.
    """

    dense: np.ndarray
    window: np.ndarray
    stop: int
    sinks: np.ndarray


def aligned(starts: np.ndarray) -> np.ndarray:
    """The slots at which rows of a kernel begin for runs that start at these; what is between is hidden."""
    return starts // ALIGNED * ALIGNED


def shows_all_from(mask: Tensor | None, first: np.ndarray, seen: int) -> bool:
    """Whether a step's mask (b|1, 1, seen) shows every token from each sequence's first (b) on, and no other.

    On the CPU this takes no tensor operation; on another device it waits for it.
    """
    if mask is None:
        return not first.any()
    if mask.shape[2] != seen:
        return False
    return bool((_numbers(mask)[:, 0] == (np.arange(seen) >= first[:, None])).all())


def are_at(positions: Tensor | None, expected: np.ndarray, seen: int) -> bool:
    """Whether a step's positions (b|1, 1) are these (b); None for positions that count all tokens."""
    if positions is None:
        return bool((expected == seen - 1).all())
    return bool((_numbers(positions)[:, 0] == expected).all())


def _numbers(x: Tensor) -> np.ndarray:
    """What a tensor without gradients holds; a view of its memory on the CPU."""
    return (x if x.device.type == "cpu" else x.cpu()).numpy()


def copied(x: Tensor) -> np.ndarray:
    """What a tensor without gradients holds."""
    return _numbers(x).copy()


@dataclass(frozen=True)
class PlainStep:
    """A step that one layer has found plain, so that the others of its forward pass need not look at it.

    Args:
        mask: of the step.
        positions: of the step.
        first: (b), from which tokens on the mask was found to show all.
        offset: (b), the offsets that the positions were found to have.
    """

    mask: Tensor | None
    positions: Tensor | None
    first: np.ndarray
    offset: np.ndarray

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that are held."""
        yield from (t for t in (self.mask, self.positions) if t is not None)

    def covers(self, mask: Tensor | None, positions: Tensor | None, sequences: Sequences) -> bool:
        """Whether the same holds of this step, without a look at it."""
        return (
            _same_memory(self.mask, mask)
            and _same_memory(self.positions, positions)
            and np.array_equal(self.first, sequences.first)
            and np.array_equal(self.offset, sequences.offset)
        )


def _same_memory(x: Tensor | None, y: Tensor | None) -> bool:
    """Whether two tensors, of which the first is kept alive, are views of the same numbers."""
    if x is None or y is None:
        return x is y
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
