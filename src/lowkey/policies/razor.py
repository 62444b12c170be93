"""RazorAttention (arXiv:2407.15891): retrieval heads keep everything, other heads the newest tokens and one
token that stands for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowkey.policies.base import EvictionContext, Policy


@dataclass(frozen=True)
class Razor(Policy):
    """RazorAttention: a policy of positions and head classes; it reads no queries.

    Score of the token at position p: `p`. With allocator `classes`, which policy `razor` uses, retrieval
    heads keep as many tokens as the budget allows and the other heads share the rest equally, as sinks and
    newest tokens. The head scores come from `lowkey heads --kind induction` and `--kind echo`. It has no
    options of its own.

    All tokens that a head has dropped are stored as one token, their mean key and mean value. In attention it
    counts as often as tokens were dropped: log(number dropped) is added to its logit. Every eviction updates
    it.

    Source: arXiv:2407.15891. Where we differ: the paper fixes the local window (at least 4000 tokens or a
    fifth of the prompt) and memory follows; here the budget is fixed and the window follows.
    """

    summary: ClassVar[str] = "retrieval heads keep all, the others the newest and a mean of the rest"
    paper: ClassVar[str] = "arXiv:2407.15891"
    uses_queries: ClassVar[bool] = False
    layer: ClassVar[str] = "compensating"
    compensates: ClassVar[bool] = True

    def score(self, context: EvictionContext) -> Tensor:
        """The position of each candidate (b, h, s): the newest are kept; see `Policy.score`."""
        return context.positions.float()
