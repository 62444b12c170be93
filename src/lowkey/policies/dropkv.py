"""DropKV (kvpress pull request 285): keeps tokens whose loss alone would change attention's output most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowkey.core.options import option
from lowkey.policies.base import EvictionContext, Policy


@dataclass(frozen=True)
class DropKV(Policy):
    """DropKV: the exact change of attention's output if this one token were dropped.

    Without token j, the softmax over the others gives an output that differs from `o_q` by
    `p_qj / (1 - p_qj) * (v_j - o_q)`. Score of token j: the mean over the query heads g of the KV head of
    `sum over q of (p_gqj / (1 - p_gqj))^2 * |v_j - o_gq|^2`, with p the attention weights of the window's
    queries and o their outputs. Scores of all heads have the same unit, so they may compete for the budget
    (`allocator=ada`).

    Args:
        window: number of recent queries that are asked; 0 for all (default 8).

    Source: NVIDIA/kvpress pull request 285 (https://openreview.net/forum?id=MqfNzH3TVH).
    """

    summary: ClassVar[str] = "change of the output if the token alone were dropped"
    paper: ClassVar[str] = "openreview:MqfNzH3TVH"

    window: int = option(8, at_least=0, at_most=2**24)

    def score(self, context: EvictionContext) -> Tensor:
        """Squared change of the window's outputs (b, h, s); see `Policy.score`."""
        b, h, g, _ = context.queries.shape[:4]
        total = torch.zeros(b, h, context.keys.shape[2], device=context.keys.device)
        # in fp64: a weight near 1 leaves the others, and the change, as differences of nearly equal numbers
        values = context.values.double().masked_fill(~context.valid.unsqueeze(-1), 0.0)
        squares = values.square().sum(-1)[:, :, None, None]  # (b, h, 1, 1, s)
        for weights in context.attention(self.window):
            n, p = weights.shape[-1], weights.double()
            p = p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            seen = values[:, :, None, :n]
            out = p @ seen
            # |v - o|^2 without the differences themselves, which would be d times as large
            change = squares[..., :n] - 2 * (out @ seen.mT) + out.square().sum(-1, keepdim=True)
            odds = torch.where(p < 1, p / (1 - p), 0.0)  # a query that sees one token cannot lose it
            total[..., :n] += (odds.square() * change.clamp_min(0.0)).sum((2, 3)).float() / g
        return total
