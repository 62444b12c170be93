"""SnapKV (arXiv:2404.14469): what the last prompt tokens look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowkey.core.options import option
from lowkey.policies.base import EvictionContext, Policy, Pooling, attention_sums, pooled


@dataclass(frozen=True)
class SnapKV(Policy):
    """Mean attention of the last `window` queries, over them and over the query heads of a KV head, pooled
    over `kernel` neighbours.

    The paper has window 32 and kernel 7 per query head; the mean over the group keeps storage at KV heads.
    PyramidKV and HeadKV use this score with window 8, and so do we. pooling: `max` in the paper, PyramidKV
    and HeadKV; `mean` in SnapKV's published code and in kvpress, with kernel 5. Attention to the window's own
    tokens is not pooled into the prompt.
    """

    summary: ClassVar[str] = "attention of the last prompt tokens"
    paper: ClassVar[str] = "arXiv:2404.14469"

    window: int = option(8, at_least=1, at_most=2**24)
    # odd, so that a token is in the middle of its neighbours
    kernel: int = option(7, odd=True, at_least=1, at_most=4095)
    pooling: Pooling = "max"

    def score(self, context: EvictionContext) -> Tensor:
        looking = (context.newest_query_positions(self.window) >= 0).sum(1).clamp_min(1)
        mean = attention_sums(context, self.window).mean(2) / looking[:, None, None]
        return pooled(context, mean, self.kernel, self.pooling, self.window)
