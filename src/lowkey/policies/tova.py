"""TOVA (arXiv:2401.06104): keeps what the newest token attends to, alike in all heads of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowkey.policies.base import EvictionContext, Policy, attention_sums


@dataclass(frozen=True)
class TOVA(Policy):
    """TOVA (token omission via attention): an attention score of the newest query, shared by a layer's heads.

    Score of token j: `mean over all query heads of the layer of a[newest query, j]`, with a the attention
    weights. So every head of a layer ranks the tokens alike. It has no options of its own.

    Heads hold different tokens under an allocator that gives them different numbers; a head that has lost a
    token counts as paying it no attention. Allocator `uniform` gives the heads of a layer the same number, or
    one more where the layer's share is no multiple of its heads.

    Source: arXiv:2401.06104. The paper evicts at every step, which is `every=1`.
    """

    summary: ClassVar[str] = "attention of the newest token, the same for all heads of a layer"
    paper: ClassVar[str] = "arXiv:2401.06104"

    def score(self, context: EvictionContext) -> Tensor:
        """Attention of the newest query, averaged over all heads (b, h, s); see `Policy.score`."""
        newest = attention_sums(context, 1).mean(2)
        # Heads may hold different tokens, so their weights are brought together by position. Slot 0 collects
        # what is not valid.
        slot = (context.positions + 1).masked_fill(~context.valid, 0)
        by_position = newest.new_zeros(*newest.shape[:2], int(slot.max()) + 1).scatter(2, slot, newest)
        return by_position.mean(1, keepdim=True).expand_as(by_position).gather(2, slot)
