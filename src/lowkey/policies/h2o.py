"""H2O (arXiv:2306.14048): heavy hitters, the tokens that were looked at most so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowkey.core.options import option
from lowkey.core.types import LowkeyError
from lowkey.policies.base import EvictionContext, Policy, attention_sums


@dataclass(frozen=True)
class H2O(Policy):
    """Attention summed over all queries (algorithm 1), in the mean over the query heads of a KV head. Sums go
    on from eviction to eviction, each query over what was there when it came.

    window: 0 for all queries, as in the paper: the whole attention matrix is computed again, quadratic in
    time though not in memory; else the newest so many of each round. per_query: divide by the number of
    queries that could see a token. The paper's sum favours early tokens, since more queries came after them;
    published code keeps the sum too. (With a window, tokens before it are seen by all its queries and there
    is nothing to divide by.) The paper evicts at every step: `every=1`. Queries of decode steps are only
    recorded when `every` is set.
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
        new = attention_sums(context, self.window).mean(2)
        return _averaged(context, new) if self.per_query else context.previous_scores + new


def _averaged(context: EvictionContext, new: Tensor) -> Tensor:
    """The carried mean and the new sum (b, h, s) as one mean over the queries that saw each token. Those of
    earlier rounds are all that came from its position on."""
    queries = (context.query_positions >= 0).sum(1)[:, None, None]
    could = context.query_positions.amax(1)[:, None, None] + 1 - context.positions
    before, now = (could - queries).clamp_min(0), could.minimum(queries).clamp_min(0)
    if context.visible is not None:
        saw = (context.visible & (context.query_positions >= 0).unsqueeze(2)).sum(1)  # (b, c)
        now = torch.cat(
            [now[..., : now.shape[2] - saw.shape[1]], saw.unsqueeze(1).expand(-1, now.shape[1], -1)], 2
        )
    return (context.previous_scores * before + new) / (before + now).clamp_min(1)
