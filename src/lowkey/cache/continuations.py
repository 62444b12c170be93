"""What a cache offers to continue one prompt in several ways: more sequences and independent copies."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self

import torch
from transformers.cache_utils import Cache

from lowkey.core.types import LowkeyError
from lowkey.storage.base import StockLayer, StoringLayer
from lowkey.storage.rollback import ForwardPass


class ContinuableCache(Cache):
    """A transformers cache whose sequences can be multiplied and copied.

    Attributes:
        forward_pass: the forward pass under way, to undo it if it fails.
    """

    layers: list[StoringLayer | StockLayer]  # type: ignore[assignment]  # upstream has its own base class
    forward_pass: ForwardPass

    def expand(self, times: int) -> None:
        """Hold every sequence several times, copies side by side, as `num_return_sequences` wants them.

        Each copy takes its own bytes. A cache without tokens stays as it is.

        Args:
            times: how often each sequence is held from now on.

        Raises:
            LowkeyError: for a number below 1.
        """
        if type(times) is not int or times < 1:
            raise LowkeyError(f"times {times!r}: how often every sequence is held; give 1 or more")
        self.batch_repeat_interleave(times)

    def branch(self, sequences: int | Sequence[int] | None = None) -> Self:
        """A copy that goes on by itself, of all sequences or of some.

        What the copy holds is its own, and takes its own bytes. Maps, policies and the model are shared.

        Args:
            sequences: numbers of the sequences to copy, in the order in which the copy holds them; None for
                all.

        Raises:
            LowkeyError: for a sequence that is not held.
        """
        numbers = [sequences] if isinstance(sequences, int) else sequences
        if numbers is not None:
            held = self._sequences_held()
            if not len(numbers) or not all(type(n) is int and 0 <= n < held for n in numbers):
                raise LowkeyError(
                    f"sequences {sequences!r}: the cache holds {held}; give numbers from 0 to "
                    f"{held - 1}, at least one"
                    if held
                    else f"sequences {sequences!r}: the cache holds none yet; leave them out"
                )
        twin = copy.deepcopy(self)
        if numbers is not None:
            twin.batch_select_indices(torch.tensor(numbers))
        return twin

    def _sequences_held(self) -> int:
        """The batch size, 0 while nothing is held."""
        if not self.get_seq_length():
            return 0
        held = self.layers[0].tensors()
        return len(held["offset"] if "offset" in held else held["keys"])
