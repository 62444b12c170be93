"""What a cache does about a small model that reads every token before its own model does."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import LongTensor, Tensor

from lowkey.cache.continuations import ContinuableCache
from lowkey.cache.refusals import check_small
from lowkey.core import text
from lowkey.core.types import LowkeyError
from lowkey.models import families
from lowkey.policies.base import Policy
from lowkey.storage.base import StoringLayer
from lowkey.storage.evicting import EvictingLayer
from lowkey.storage.observed import ObservedLayer
from lowkey.storage.rollback import Snapshot, storage_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowkey.cache.cache import LowkeyCache


def checked_small(
    model: PreTrainedModel,
    policy: Policy | None,
    small: weakref.ReferenceType[PreTrainedModel] | None,
) -> PreTrainedModel | None:
    """The small model that reads along, or None. Raises: LowkeyError for one that cannot."""
    found = small() if small is not None else None
    check_small(model, policy, found)
    return found


class CompanionCache(ContinuableCache):
    """A cache that may have another beside it: that of a small model.

    Attributes:
        small: the small model's cache, which holds all tokens; None without such a model.
        small_model: a weak reference to that model.
    """

    small: LowkeyCache | None = None
    small_model: weakref.ReferenceType[PreTrainedModel] | None = None

    def small_nbytes(self) -> int:
        """The part of `nbytes` that the small model's cache takes; its weights come on top of both."""
        return 0 if self.small is None else self.small.nbytes()

    def small_weights_nbytes(self) -> int:
        """The bytes of the small model's weights, which no cache holds; 0 without such a model."""
        model = self.small_model() if self.small_model is not None else None
        return 0 if model is None else storage_bytes(model.parameters())

    def host_nbytes(self) -> int:
        """The part of `nbytes` that was moved to host memory (`-O offload=true` of `smallkv-tokens`)."""
        return sum(layer.host_nbytes() for layer in self.layers if isinstance(layer, StoringLayer))

    @contextmanager
    def reading(self, ids: Tensor) -> Iterator[None]:
        """Let the small model read tokens that the model is about to read; without one, do nothing.

            with cache.reading(ids):
                logits = model(ids, past_key_values=cache).logits

        If the block fails, the small model has not read them either. A cache that neither evicts any more nor
        holds values without keys leaves the small model alone.

        Args:
            ids: (b, t), token ids without padding.

        Raises:
            LowkeyError: for tokens or a length that the small model does not have, a small model that is
                gone, or tokens that only one of both has read.
        """
        if self.small is None or not self._asks_small_model():
            yield
            return
        model, seen, stored = self._small_model(ids), self.get_seq_length(), ids.shape[1]
        guided = self._guided()
        stored -= guided[0].score_only_tokens  # the others will be forgotten
        before = after = [layer.snapshot() for layer in self.small.layers]
        try:
            self._let_read(model, ids[:, :stored])
            after = [layer.snapshot() for layer in self.small.layers]
            self._let_read(model, ids[:, stored:])
            yield
        except BaseException:
            # an error that arose behind the last layer leaves the tokens in the cache
            self._restore_small(before if self.get_seq_length() == seen else after)
            raise
        if stored < ids.shape[1]:
            self._restore_small(after)
        matched = all(layer.is_matched for layer in guided)
        for layer in self.small.layers:
            if isinstance(layer, ObservedLayer):
                layer.forget(matched)

    def _guided(self) -> list[Any]:
        """The layers that evict; beside a small model they are those that it guides."""
        return [layer for layer in self.layers if isinstance(layer, EvictingLayer)]

    def _asks_small_model(self) -> bool:
        """Whether the next tokens have to be read by the small model, too."""
        return any(layer.asks_small_model for layer in self._guided())

    def _small_model(self, ids: Tensor) -> PreTrainedModel:
        """The small model, if it can read these tokens (b, t) next. Raises: LowkeyError if it cannot."""
        small, model = self.small, self.small_model() if self.small_model is not None else None
        if small is None or model is None:
            raise LowkeyError("small: the small model is gone; keep it for as long as the cache is filled")
        seen, read = self.get_seq_length(), small.get_seq_length()
        if read != seen:
            raise LowkeyError(
                f"small: has read {read} tokens, and the model {seen}; let both read every token: "
                "with cache.reading(ids): model(ids, past_key_values=cache)"
            )
        text.check_ids(ids, model)
        longest = families.max_positions(model)
        if longest is not None and seen + ids.shape[1] > longest:
            raise LowkeyError(
                f"ids: {seen + ids.shape[1]} tokens exceed the {longest} positions of the small model; give "
                "fewer, or another small model"
            )
        return model

    @torch.no_grad()
    def _let_read(self, model: PreTrainedModel, ids: Tensor) -> None:
        """Let the small model read tokens (b, t), if there are any."""
        if ids.shape[1]:
            model(ids.to(model.device), past_key_values=self.small, logits_to_keep=1)

    def _restore_small(self, states: list[Snapshot]) -> None:
        """Put the small model's cache back into a state from before."""
        if self.small is not None:
            self.small.forward_pass.settle()
            for layer, state in zip(self.small.layers, states, strict=True):
                layer.restore(state)

    def reset(self) -> None:
        """Forget all tokens, also those that the small model has read."""
        super().reset()
        if self.small is not None:
            self.small.reset()

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Put the sequences (b) into another order, as beam search does."""
        super().reorder_cache(beam_idx)
        if self.small is not None:
            self.small.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences with these indices."""
        super().batch_select_indices(indices)
        if self.small is not None:
            self.small.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold every sequence so many times, copies side by side."""
        super().batch_repeat_interleave(repeats)
        if self.small is not None:
            self.small.batch_repeat_interleave(repeats)
