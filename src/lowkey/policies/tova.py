"""TOVA (arXiv:2401.06104): what the newest token looks at, for all heads of a layer together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowkey.policies.base import EvictionContext, Policy, attention_sums


@dataclass(frozen=True)
class TOVA(Policy):
    """Attention of the newest query, averaged over all query heads of the layer: every head keeps the same
    tokens.

    Under an allocator that gives heads different numbers, a head that lost a token counts as not looking at
    it; `uniform` gives heads the same number, or one more where a layer's share is no multiple of its heads.
    The paper evicts at every step: `every=1`.
    """

    summary: ClassVar[str] = "attention of the newest token, the same for all heads of a layer"
    paper: ClassVar[str] = "arXiv:2401.06104"

    def score(self, context: EvictionContext) -> Tensor:
        newest = attention_sums(context, 1).mean(2)
        # heads may hold different tokens: they meet by position
        slot = (context.positions + 1).masked_fill(~context.valid, 0)
        by_position = newest.new_zeros(*newest.shape[:2], int(slot.max()) + 1).scatter(2, slot, newest)
        return by_position.mean(1, keepdim=True).expand_as(by_position).gather(2, slot)
