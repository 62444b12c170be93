"""SnapKV (arXiv:2404.14469): keeps what the last prompt tokens attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowkey.core.options import option
from lowkey.policies.base import (
    EvictionContext,
    Policy,
    Pooling,
    attention_maxima,
    attention_sums,
    pooled_scores,
    prompt_tokens,
)

Aggregation = Literal["mean", "max", "defensive"]


@dataclass(frozen=True)
class SnapKV(Policy):
    """SnapKV: attention of an observation window at the end of the prompt, pooled over neighbouring tokens.

    Score of token j: `pool(mean over g, q of a[g, q, j])`, with a the attention weights of query head g of
    the KV head and query q of the window. The tokens of the window itself are not pooled.

    Args:
        window: number of recent queries whose attention scores the tokens (default 8).
        kernel: number of neighbouring positions that are pooled, an odd number (default 7).
        pooling: `max` or `mean` over the kernel (default `max`).
        aggregation: how the weights of the window's queries and of the query heads become one: `mean`; `max`,
            the worst case of losing the token; or `defensive`, the maximum, pooled, and raised to the mean
            over the prompt where it is below (arXiv:2510.13334), so that tokens which nobody asked for yet
            differ little (default `mean`).

    Source: arXiv:2404.14469. Where we differ: the paper's window is 32; 8 is the window of PyramidKV and
    HeadKV, which use this score. The paper scores every query head by itself; the mean over the query heads
    of a KV head lets a KV head store each token once. SnapKV's published code and kvpress pool with `mean`
    and a kernel of 5.
    """

    summary: ClassVar[str] = "attention of the last prompt tokens"
    paper: ClassVar[str] = "arXiv:2404.14469"

    window: int = option(8, at_least=1, at_most=2**24)
    # odd, so that a token is in the middle of its neighbours
    kernel: int = option(7, odd=True, at_least=1, at_most=4095)
    pooling: Pooling = "max"
    aggregation: Aggregation = "mean"

    def score(self, context: EvictionContext) -> Tensor:
        """Attention of the window, pooled (b, h, s); see `Policy.score`."""
        if self.aggregation != "mean":
            largest = attention_maxima(context, self.window)
            pooled = pooled_scores(context, largest, self.kernel, self.pooling, self.window)
            if self.aggregation == "max":
                return pooled
            prompt = prompt_tokens(context, self.window)
            count = prompt.sum(-1, keepdim=True).clamp_min(1)
            mean = pooled.masked_fill(~prompt, 0.0).sum(-1, keepdim=True) / count
            return torch.where(prompt, pooled.maximum(mean), pooled)
        # A row may have fewer queries than the window.
        queries = (context.newest_query_positions(self.window) >= 0).sum(1).clamp_min(1)
        mean = attention_sums(context, self.window).mean(2) / queries[:, None, None]
        return pooled_scores(context, mean, self.kernel, self.pooling, self.window)
