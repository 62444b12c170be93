"""R-KV (arXiv:2505.24133): keeps tokens that recent queries look at and whose keys are unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lowkey.core.options import option
from lowkey.policies.base import EvictionContext, Policy


@dataclass(frozen=True)
class RKV(Policy):
    """After R-KV: attention of recent queries, less how much a key is like the others of its head.

    Score of token j: `w I_j - (1 - w) R_j`. The importance I is the mean over the window's queries q of the
    largest weight `a[g, q, j]` over the query heads g of the KV head. The redundancy R is the softmax over
    all tokens j of `mean over i != j of cos(k_i, k_j)`. Both sum to about 1 over the tokens of a head.

    Args:
        window: number of recent queries whose attention counts (default 8).
        weight: w, what importance counts for beside redundancy (default 0.1).

    Source: arXiv:2505.24133, made for long reasoning. Where we differ: the paper does not call the newest of
    several similar tokens redundant. Here all of them are alike, except for the recent ones that every policy
    keeps, so that time and memory are linear in the number of tokens.
    """

    summary: ClassVar[str] = "attention of recent queries, less redundancy of keys"
    paper: ClassVar[str] = "arXiv:2505.24133"

    window: int = option(8, at_least=1, at_most=2**24)
    weight: float = option(0.1, at_least=0.0, at_most=1.0)

    def score(self, context: EvictionContext) -> Tensor:
        """Importance less redundancy (b, h, s); see `Policy.score`."""
        importance = context.keys.new_zeros(context.keys.shape[:3], dtype=torch.float32)
        for weights in context.attention(self.window):
            importance[..., : weights.shape[-1]] += weights.amax(2).sum(2)
        # A row may have fewer queries than the window.
        queries = (context.newest_query_positions(self.window) >= 0).sum(1).clamp_min(1)
        directions = normalize(context.keys.float(), dim=-1).masked_fill(~context.valid.unsqueeze(-1), 0.0)
        # a key with itself adds the same to all tokens, which the softmax does not see
        alike = (directions @ directions.sum(2).unsqueeze(-1)).squeeze(-1)
        others = (context.valid.sum(-1, keepdim=True) - 1).clamp_min(1)
        redundancy = (alike / others).masked_fill(~context.valid, -torch.inf).softmax(-1).nan_to_num(0.0)
        return self.weight * importance / queries[:, None, None] - (1 - self.weight) * redundancy
