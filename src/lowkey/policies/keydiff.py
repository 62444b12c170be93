"""KeyDiff (arXiv:2504.15364): keys unlike the others draw the attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from lowkey.policies.base import EvictionContext, Policy


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Minus the cosine between a key and the head's mean key direction (its anchor), over all that the head
    holds.

    Keys are taken rotated, as they lie in the cache. In a chunked prefill the anchor is that of the kept
    tokens and the chunk, which is the paper's block-wise processing.
    """

    summary: ClassVar[str] = "keys unlike the others"
    paper: ClassVar[str] = "arXiv:2504.15364"
    uses_queries: ClassVar[bool] = False

    def score(self, context: EvictionContext) -> Tensor:
        directions = normalize(context.keys.float(), dim=-1)
        anchor = normalize(directions.masked_fill(~context.valid.unsqueeze(-1), 0.0).sum(2), dim=-1)
        return -(directions @ anchor.unsqueeze(-1)).squeeze(-1)
