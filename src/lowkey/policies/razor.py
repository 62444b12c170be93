"""RazorAttention (arXiv:2407.15891): retrieval heads keep everything, the others what is near, and a mean of
what they dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowkey.policies.base import EvictionContext, Policy


@dataclass(frozen=True)
class Razor(Policy):
    """Score: how new a token is. With the `classes` allocator the retrieval heads (echo and induction, found
    with `lowkey heads --kind induction` and `--kind echo`) keep all they can within the budget, the others
    share the rest equally, as sinks and newest tokens.

    The paper fixes the local window (at least 4000 tokens or a fifth of the prompt) and lets memory follow;
    here the budget rules. All that a head drops becomes one token, the mean key and value, that counts as
    often as tokens were dropped; every eviction updates it.
    """

    summary: ClassVar[str] = "retrieval heads keep all, the others the newest and a mean of the rest"
    paper: ClassVar[str] = "arXiv:2407.15891"
    uses_queries: ClassVar[bool] = False
    layer: ClassVar[str] = "compensating"

    def score(self, context: EvictionContext) -> Tensor:
        return context.positions.float()
