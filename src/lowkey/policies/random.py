"""Random tokens, the control that every score has to beat (arXiv:2609.03430)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowkey.core.options import option
from lowkey.ops.hashing import drawn_uniformly
from lowkey.policies.base import EvictionContext, Policy


@dataclass(frozen=True)
class Random(Policy):
    """Random: every head keeps tokens that are drawn uniformly, besides sinks and recent ones. A control.

    Score of token j: a number in [0, 1) that depends on the seed, the layer, the head and the position of j
    alone. So a token keeps its score at later evictions, every token that was ever seen has the same chance,
    and a row does not depend on the other rows of its batch.

    Args:
        seed: of the draw (default 0).

    Source: arXiv:2609.03430 keeps the prompt, a uniformly random subset of each head and the newest tokens.
    """

    summary: ClassVar[str] = "tokens drawn at random, a control"
    paper: ClassVar[str] = "arXiv:2609.03430"
    uses_queries: ClassVar[bool] = False

    seed: int = option(0, at_least=0, at_most=2**31 - 1)

    def score(self, context: EvictionContext) -> Tensor:
        """A hash of where each token is (b, h, s); see `Policy.score`."""
        return drawn_uniformly(context.positions, context.layer, self.seed)
