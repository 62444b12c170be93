"""StreamingLLM (arXiv:2309.17453): the first tokens and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowkey.policies.base import EvictionContext, Policy


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """The newer, the better; `sinks` holds the first ones (the paper finds four enough).

    Kept keys stay at the positions they were made for. The paper renumbers them by their place in the cache,
    so that positions never exceed those of training: here texts longer than those still meet positions the
    model does not know. The paper evicts at every step: `every=1`; a larger number holds up to so many tokens
    more and copies the cache as much less often.
    """

    summary: ClassVar[str] = "the first tokens and the newest"
    paper: ClassVar[str] = "arXiv:2309.17453"
    uses_queries: ClassVar[bool] = False

    def score(self, context: EvictionContext) -> Tensor:
        return context.positions.float()
