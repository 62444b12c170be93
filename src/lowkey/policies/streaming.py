"""StreamingLLM (arXiv:2309.17453): keeps the first tokens and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowkey.policies.base import EvictionContext, Policy


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """StreamingLLM: attention sinks and a sliding window. A policy of positions; it reads no keys and no
    queries.

    Score of the token at position p: `p`. Together with the protected `sinks` this keeps the first tokens and
    the newest ones. It has no options of its own; the paper finds four sinks enough.

    Source: arXiv:2309.17453. Where we differ: kept keys stay at the positions they were made for. The paper
    renumbers them by their place in the cache, so that positions never exceed those of training; here a text
    that is longer than those reaches positions the model does not know. The paper evicts at every step, which
    is `every=1`; a larger number holds up to that many more tokens and copies the cache less often.
    """

    summary: ClassVar[str] = "the first tokens and the newest"
    paper: ClassVar[str] = "arXiv:2309.17453"
    uses_queries: ClassVar[bool] = False

    def score(self, context: EvictionContext) -> Tensor:
        """The position of each candidate (b, h, s): the newest are kept; see `Policy.score`."""
        return context.positions.float()
