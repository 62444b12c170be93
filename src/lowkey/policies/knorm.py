"""L2-norm eviction (arXiv:2406.11430): keys of small norm draw the attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowkey.policies.base import EvictionContext, Policy, norms


@dataclass(frozen=True)
class Knorm(Policy):
    """The smaller a key, the better: the paper finds that small norms go with much attention. A rotation
    leaves norms as they are.
    """

    summary: ClassVar[str] = "small keys"
    paper: ClassVar[str] = "arXiv:2406.11430"
    uses_queries: ClassVar[bool] = False

    def score(self, context: EvictionContext) -> Tensor:
        return -norms(context.keys)
