"""What a cache offers to continue one prompt in several ways: copies, and taking tokens back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from torch import LongTensor, Tensor
from transformers.cache_utils import Cache

from lowkey.core.types import LowkeyError
from lowkey.storage.base import StockLayer, StoringLayer
from lowkey.storage.recording import Recording
from lowkey.storage.rollback import ForwardPass


class ContinuableCache(Cache):
    """A transformers cache whose sequences can be multiplied, copied and shortened.

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

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Put the sequences (b) into another order, as beam search does."""
        self.forward_pass.settle()
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences with these indices."""
        self.forward_pass.settle()
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold every sequence so many times, copies side by side."""
        self.forward_pass.settle()
        super().batch_repeat_interleave(repeats)

    # -- taking tokens back

    def activate_past_recording(self) -> None:
        """Record the next call, so that `crop` can take back any of its tokens.

        transformers' prompt-lookup and assisted decoding call this, and then `crop` behind every call, after
        which the next call is recorded. The tokens of a call that stay count as steps of decoding. A call
        that is not followed by `crop` is an ordinary one, and ends the recording.

        A recorded call is held in full (keys, values and queries of its tokens, and what it replaced) until
        `crop` or the next call, and counted by `nbytes`.

        Raises:
            LowkeyError: for a cache over which a call with guesses would not give what single steps give.
        """
        self.forward_pass.undo()
        for layer in self.layers:
            if flaw := layer.flaw_of_guesses():
                raise LowkeyError(f"activate_past_recording: {flaw}")
        self.forward_pass.recording = Recording()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record all calls inside the block, until `crop`, so that it can take back any of their tokens."""
        self.forward_pass.undo()
        self.forward_pass.recording = Recording(all_passes=True)
        try:
            yield
        finally:
            self.forward_pass.undo()
            self.forward_pass.recording = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens, as if the cache had never seen them.

        Tokens of calls that were recorded can always be removed, whatever was compressed or evicted since.
        Other tokens can if nothing was evicted since, and no token that stays would have to be exact again.

        Args:
            tokens_to_remove: minus the number of tokens to remove; 0 to keep what was recorded. A positive
                number is, as in transformers, the number of tokens that stay.

        Raises:
            LowkeyError: if tokens that are gone would have to come back. The cache is then as it was.
        """
        self.forward_pass.undo()
        seen, recording = self.get_seq_length(), self.forward_pass.recording
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, seen - tokens_to_remove)
        if removed > seen:
            raise LowkeyError(f"crop({tokens_to_remove}): {seen} tokens were seen; give 0 to {-seen}")
        before = [dict(vars(layer)) for layer in self.layers]
        try:
            recorded = sum(recording.lengths()) if recording is not None else 0
            if recording is not None and recorded:
                self._shorten(recording, min(removed, recorded), seen > recorded)
            if removed > recorded:
                for layer in self.layers:
                    layer.crop(recorded - removed)
        except BaseException:
            for layer, held in zip(self.layers, before, strict=True):
                vars(layer).clear()
                vars(layer).update(held)
            raise
        self.forward_pass.recording = recording and recording.emptied()

    def _shorten(self, recording: Recording, removed: int, begun: bool) -> None:
        """Give the layers what recorded passes leave when their newest tokens are removed.

        Args:
            recording: the passes.
            removed: how many tokens are removed of them.
            begun: whether there were tokens before them.
        """
        lengths = recording.lengths()
        if not removed and (sum(lengths) == len(lengths) or not begun):
            return  # single tokens, or a prompt
        if not removed and all(layer.calls_are_steps for layer in self.layers):
            return
        for layer in self.layers:
            layer.restore(recording.before[layer])
        kept = sum(lengths) - removed
        for given, length in zip(recording.passes, lengths, strict=True):
            stays = min(length, kept)
            kept -= stays
            # what stays of a prompt is a prompt; other tokens count as steps of decoding
            step = 1 if begun else max(1, stays)
            begun = True
            for start in range(0, stays, step):
                for layer in self.layers:
                    part = given[layer].part(start, start + step)
                    if part.call is not None:
                        layer.update(part.keys, part.values)
                    layer.replay(part.keys, part.values, part.call)
