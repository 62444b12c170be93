"""KV-Compress (arXiv:2410.00161): squared attention, which favours tokens that someone looks at sharply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowkey.core.options import option
from lowkey.policies.base import EvictionContext, Policy, Pooling, attention_sums, pooled


@dataclass(frozen=True)
class KVCompress(Policy):
    """Squared attention of the newest `window` queries (0: all), summed over them and over the query heads of
    a KV head, then pooled over `kernel` neighbours as in SnapKV.

    Scores add up from eviction to eviction; only what is new is pooled, as decode steps are in the authors'
    code. The method's other half, eviction by whole blocks in one order over all layers and heads, is
    allocator `blocks`; their optional bias by head and position is left out. Queries of decode steps are only
    recorded when `every` is set.
    """

    summary: ClassVar[str] = "squared attention of the last prompt tokens"
    paper: ClassVar[str] = "arXiv:2410.00161"
    stateful: ClassVar[bool] = True

    window: int = option(8, at_least=0, at_most=2**24)
    # odd, so that a token is in the middle of its neighbours
    kernel: int = option(7, odd=True, at_least=1, at_most=4095)
    pooling: Pooling = "max"

    def score(self, context: EvictionContext) -> Tensor:
        new = attention_sums(context, self.window, squared=True).sum(2)
        return context.previous_scores + pooled(context, new, self.kernel, self.pooling, self.window)
