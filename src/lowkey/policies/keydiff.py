"""KeyDiff (arXiv:2504.15364): keeps keys unlike the others, which tend to get the most attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from lowkey.policies.base import EvictionContext, Policy


@dataclass(frozen=True)
class KeyDiff(Policy):
    """KeyDiff: a score of the keys alone, by their direction; it reads no queries.

    Score of token j: `-cos(k_j, mean over i of k_i / |k_i|)`, with the mean (the paper's anchor) over all
    tokens that the head holds. It has no options of its own.

    Source: arXiv:2504.15364. Keys are taken rotated, as the cache stores them. In a chunked prefill the
    anchor is that of the kept tokens and the chunk, which is the paper's block-wise processing.
    """

    summary: ClassVar[str] = "keys unlike the others"
    paper: ClassVar[str] = "arXiv:2504.15364"
    uses_queries: ClassVar[bool] = False

    def score(self, context: EvictionContext) -> Tensor:
        """Minus the cosine of each key with the anchor (b, h, s); see `Policy.score`."""
        directions = normalize(context.keys.float(), dim=-1)
        anchor = normalize(directions.masked_fill(~context.valid.unsqueeze(-1), 0.0).sum(2), dim=-1)
        return -(directions @ anchor.unsqueeze(-1)).squeeze(-1)
