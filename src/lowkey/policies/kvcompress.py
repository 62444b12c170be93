"""KV-Compress (arXiv:2410.00161): squared attention, in which few strong weights outweigh many weak ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowkey.core.options import option
from lowkey.policies.base import EvictionContext, Policy, Pooling, attention_sums, pooled_scores


@dataclass(frozen=True)
class KVCompress(Policy):
    """KV-Compress: squared attention of recent queries, pooled and summed from eviction to eviction.

    Score of token j: `previous score of j + pool(sum over g, q of a[g, q, j]^2)`, with a the attention
    weights of query head g of the KV head and query q of the window. Only the new sum is pooled, as in decode
    steps of the authors' code.

    Args:
        window: number of recent queries of each round that score the tokens; 0 for all (default 8).
        kernel: number of neighbouring positions that are pooled, an odd number (default 7).
        pooling: `max` or `mean` over the kernel (default `max`).

    Queries of decode steps are recorded only if `every` is set.

    Source: arXiv:2410.00161. The other half of the method, eviction of whole blocks in one order over all
    layers and heads, is allocator `blocks`, which policy `kv-compress` uses. Where we differ: the authors'
    optional bias by head and position is left out.
    """

    summary: ClassVar[str] = "squared attention of the last prompt tokens"
    paper: ClassVar[str] = "arXiv:2410.00161"
    stateful: ClassVar[bool] = True

    window: int = option(8, at_least=0, at_most=2**24)
    # odd, so that a token is in the middle of its neighbours
    kernel: int = option(7, odd=True, at_least=1, at_most=4095)
    pooling: Pooling = "max"

    def score(self, context: EvictionContext) -> Tensor:
        """Squared attention, pooled, summed since the first eviction (b, h, s); see `Policy.score`."""
        new = attention_sums(context, self.window, squared=True).sum(2)
        return context.previous_scores + pooled_scores(context, new, self.kernel, self.pooling, self.window)
