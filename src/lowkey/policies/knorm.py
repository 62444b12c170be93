"""L2-norm eviction (arXiv:2406.11430): keeps keys of small norm, which tend to get the most attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowkey.policies.base import EvictionContext, Policy, norms


@dataclass(frozen=True)
class Knorm(Policy):
    """L2-norm eviction: a score of the keys alone; it reads no queries.

    Score of token j: `-|k_j|`. The paper finds that keys of small norm get much attention. It has no options
    of its own.

    Source: arXiv:2406.11430. Keys are taken rotated, which does not matter: a rotation keeps norms.
    """

    summary: ClassVar[str] = "small keys"
    paper: ClassVar[str] = "arXiv:2406.11430"
    uses_queries: ClassVar[bool] = False

    def score(self, context: EvictionContext) -> Tensor:
        """Minus the norm of each key (b, h, s); see `Policy.score`."""
        return -norms(context.keys)
