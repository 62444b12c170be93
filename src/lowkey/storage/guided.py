"""An evicting layer whose tokens are chosen by a small model's attention (SmallKV, arXiv:2508.02751)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowkey.core.types import LowkeyError
from lowkey.models.attention_interface import Call
from lowkey.ops.matching import top_tokens
from lowkey.policies.base import EvictionContext, attention_sums
from lowkey.storage.cache_wide_eviction import Candidates
from lowkey.storage.evicting import EvictingLayer


class GuidedLayer(EvictingLayer):
    """An `EvictingLayer` beside a small model that has read the same tokens before.

    Attributes:
        head_map: (b, h g), for each query head in the model's order the number of the small model's head that
            is matched with it; (b, 0) before the first eviction.
        groups: g, query heads of a KV head.
    """

    head_map: Tensor
    policy: Any  # one that reads along
    groups = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty tensors for this batch size, device and dtype."""
        super().lazy_initialization(key_states, value_states)
        self.head_map = torch.zeros(len(key_states), 0, dtype=torch.int32, device=self.device)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are held, by attribute name."""
        return super().tensors() | ({"head_map": self.head_map} if self.is_initialized else {})

    # -- bytes

    def index_bytes(self) -> int:
        """The bytes that are held whatever is kept, the matched heads and the small model's cache included.

        The small model's cache counts in equal parts in all layers.
        """
        heads = self.row_heads * self.codec.heads_per_row * self.groups
        small = -(-self.observed.nbytes(self.is_matched) // self.cache_eviction.layers)
        return super().index_bytes() + len(self.offset) * heads * self.head_map.element_size() + small

    def predicted_nbytes(self) -> int:
        """As `EvictingLayer`'s, with the matched heads."""
        if not self.is_initialized:
            return 0
        return super().predicted_nbytes() + self.head_map.numel() * self.head_map.element_size()

    @property
    def is_matched(self) -> bool:
        """Whether the heads have been matched."""
        return self.is_initialized and bool(self.head_map.shape[1])

    @property
    def asks_small_model(self) -> bool:
        """Whether the next tokens have to be read by the small model, too."""
        return not self.frozen

    # -- attending

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Answer the call, store the new tokens, and evict if it is time; see `StoringLayer.attend`."""
        self.groups = call.query.shape[2]
        return super().attend(keys, values, call)

    def _check_read(self) -> None:
        """Raises: LowkeyError unless the small model has read the same tokens, without padding."""
        if self.observed.seen != self.seen:
            raise LowkeyError(
                f"small: the small model has read {self.observed.seen} tokens and the model "
                f"{self.seen}; let both read: with cache.reading(ids): model(ids, past_key_values=cache)"
            )
        if bool((self.first_index > 0).any()):
            raise LowkeyError(
                "attention_mask: a small model reads along only without padding; give rows of one length, or "
                "a cache for each"
            )

    # -- evicting

    def _context(
        self,
        call: Call,
        candidates: Candidates,
        chunk: tuple[Tensor, Tensor] | None,
        repetition_lse: Tensor | None,
    ) -> EvictionContext:
        """What the policy's score is given, with the attention of the matched heads."""
        self._check_read()
        context = super()._context(call, candidates, chunk, repetition_lse)
        if not self.is_matched:
            self._match(context)
        return replace(context, small=self._small_attention())

    def _match(self, context: EvictionContext) -> None:
        """Match every query head by what it attends to now."""
        own = attention_sums(context, self.policy.matched_queries)
        b, h, g, _ = own.shape
        places = context.positions.clamp(0, self.seen - 1).unsqueeze(2).expand_as(own)
        own = own.masked_fill(~context.valid.unsqueeze(2), 0.0)
        by_position = own.new_zeros(b, h, g, self.seen).scatter_add_(3, places, own)
        top = top_tokens(by_position.flatten(1, 2), self.policy.matched_share)
        self.head_map = self.policy.match(top, self.observed.top(), self.seen).int()

    def _small_attention(self) -> Tensor:
        """(b, h, g, n): what the matched heads attend to at every position; see `EvictionContext.small`."""
        found = self.observed.attention(self.head_map, self.policy.window)
        return found.unflatten(1, (-1, self.groups))
