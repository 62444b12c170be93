"""Documents one after the other, cut into rows of equal length. Nothing leaks from one document into the
next.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # what torch's cross-entropy leaves out


@dataclass(frozen=True)
class Batch:
    """Rows that a model reads at once.

    Args:
        ids: (b, length) int64.
        positions: (b, length) int64. They start anew at every document and every row: without an attention
            mask and a cache, transformers makes a block-diagonal causal mask of that.
        targets: (b, length) int64, the NEXT tokens; `IGNORED` where the next token belongs to another
            document or there is none.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Stream:
    """Documents one after the other.

    Args:
        ids: tokens (n), unsigned, possibly on disk.
        starts: where each document begins, and n (documents + 1).
        text_bytes: bytes of the UTF-8 text.
    """

    ids: np.ndarray
    starts: np.ndarray
    text_bytes: int

    @property
    def predicted(self) -> int:
        """Tokens that are predicted if every row is read: all but the first of each document."""
        return len(self.ids) - (len(self.starts) - 1)

    def rows(self, length: int) -> int:
        """Number of full rows with a next token for their last one."""
        return max(0, (len(self.ids) - 1) // length)

    def targets(self, rows: np.ndarray, length: int) -> int:
        """Number of tokens that these rows (k) predict, without reading them."""
        # A row predicts the tokens from its second to the first of the next row, apart from those that begin
        # a document.
        after = np.minimum((rows + 1) * length + 1, len(self.ids))
        first = np.minimum(rows * length + 1, len(self.ids))
        beginnings = np.searchsorted(self.starts[:-1], after) - np.searchsorted(self.starts[:-1], first)
        return int((after - first - beginnings).sum())

    def batch(self, rows: np.ndarray, length: int) -> Batch:
        """These rows (k). What lies behind the end is filled up and predicts nothing."""
        # One place more than a row has: its last token predicts the first of the next row.
        places = rows[:, None] * length + np.arange(length + 1)
        document = np.searchsorted(self.starts, places, side="right") - 1
        ids = self.ids[np.minimum(places, len(self.ids) - 1)].astype(np.int64)
        positions = places - np.maximum(self.starts[document], places[:, :1])
        crossing = (document[:, 1:] != document[:, :-1]) | (places[:, 1:] >= len(self.ids))
        parts = (ids[:, :-1], positions[:, :-1], np.where(crossing, IGNORED, ids[:, 1:]))
        return Batch(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))


@dataclass(frozen=True)
class Order:
    """Which rows a step reads: a new permutation in every epoch.

    It depends on the seed and the number of the step only, so that there is no state to save, and every model
    sees the same rows at the same step.

    Args:
        rows: number of rows.
        per_step: rows per step.
        seed: the seed.
    """

    rows: int
    per_step: int
    seed: int

    def at(self, step: int) -> np.ndarray:
        """Row numbers (per_step) of a step, counted from 0."""
        epoch, place = np.divmod(np.arange(step * self.per_step, (step + 1) * self.per_step), self.rows)
        return np.concatenate(
            [_permutation(self.rows, self.seed, int(e))[place[epoch == e]] for e in np.unique(epoch)]
        )


@lru_cache(maxsize=2)  # a step may lie in two epochs
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of rows in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(rows)
