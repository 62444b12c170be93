"""H2O (arXiv:2306.14048): keeps heavy hitters, the tokens that got the most attention so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowkey.core.errors import LowkeyError
from lowkey.core.options import option
from lowkey.policies.base import EvictionContext, Policy, attention_sums


@dataclass(frozen=True)
class H2O(Policy):
    """H2O (heavy-hitter oracle): attention accumulated over all queries, from eviction to eviction.

    Score of token j: `previous score of j + sum over q of (mean over g of a[g, q, j])`, with a the attention
    weights of query head g of the KV head and query q. Each query is normalised over the tokens that were
    there when it came.

    Args:
        window: number of recent queries of each round that are summed; 0 for all, as in the paper (default
            0). With all of them the whole attention matrix is computed again: time is quadratic in the
            length, memory is not.
        per_query: divide each sum by the number of queries that could see the token (default False). The sum
            favours early tokens, since more queries came after them. Needs `window=0`: with a window, all its
            queries see the tokens before it and there is nothing to divide by.

    Queries of decode steps are recorded only if `every` is set.

    Source: arXiv:2306.14048, algorithm 1. The paper and its published code keep the plain sum. The paper
    evicts at every step, which is `every=1`. Where we differ: the mean over the query heads of a KV head lets
    a KV head store each token once.
    """

    summary: ClassVar[str] = "attention summed over all queries"
    paper: ClassVar[str] = "arXiv:2306.14048"
    stateful: ClassVar[bool] = True

    window: int = option(0, at_least=0, at_most=2**24)
    per_query: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_query and self.window:
            raise LowkeyError(
                f"per_query with window {self.window}: the division needs all queries; set window to 0"
            )

    def score(self, context: EvictionContext) -> Tensor:
        """Attention summed since the first eviction (b, h, s); see `Policy.score`."""
        new = attention_sums(context, self.window).mean(2)
        return _mean_per_query(context, new) if self.per_query else context.previous_scores + new


def _mean_per_query(context: EvictionContext, new: Tensor) -> Tensor:
    """Mean attention (b, h, s) over all queries that saw each token, those of earlier rounds included.

    Args:
        context: its `previous_scores` are such means of earlier rounds.
        new: sums (b, h, s) over the queries of this round.
    """
    queries = (context.query_positions >= 0).sum(1)[:, None, None]
    # Every token from a candidate's position on has been a query that could see it; the last `queries` of
    # them belong to this round.
    could_see = context.query_positions.amax(1)[:, None, None] + 1 - context.positions
    before, now = (could_see - queries).clamp_min(0), could_see.minimum(queries).clamp_min(0)
    if context.visible is not None:
        # Attention is not causal within the newest tokens: count which queries really saw them.
        saw = (context.visible & (context.query_positions >= 0).unsqueeze(2)).sum(1)  # (b, c)
        now = torch.cat(
            [now[..., : now.shape[2] - saw.shape[1]], saw.unsqueeze(1).expand(-1, now.shape[1], -1)], 2
        )
    return (context.previous_scores * before + new) / (before + now).clamp_min(1)
