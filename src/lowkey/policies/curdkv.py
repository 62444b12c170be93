"""CurDKV (arXiv:2509.15038): approximate leverage scores of keys and values, without any query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowkey.core.options import option
from lowkey.ops.rope import unrotate
from lowkey.policies.base import EvictionContext, Policy, norms

KINDS = ("keys", "values", "product")
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class CurDKV(Policy):
    """Squared norms of keys, of values, or their product, as shares of their sum over the head; the Ada
    variant is allocator `ada`.

    rank: keys and values are first projected to so many dimensions by a Gaussian matrix with entries N(0,
    1/rank) (the paper's code: 20). 0, its default and ours, projects nothing: squared norms as they are,
    which the projected ones are on average. A projection of rotated keys would depend on their positions,
    which their norms do not: for it keys are un-rotated. The matrix follows from `seed` and is the same for
    all layers and heads.
    local: norms are first taken as shares of so many neighbouring candidates (the code's way; 0: of the whole
    head only), so that a token competes with those near it. The first tokens, which the code gives score 1,
    are `sinks` here.
    """

    summary: ClassVar[str] = "leverage of keys and values"
    paper: ClassVar[str] = "arXiv:2509.15038"
    uses_queries: ClassVar[bool] = False

    kind: Literal["keys", "values", "product"] = "product"
    rank: int = option(0, at_least=0, at_most=2**16)
    local: int = option(16, at_least=0, at_most=2**24)
    seed: int = option(0, at_least=0)

    @property
    def uses_rotations(self) -> bool:
        """Whether the score asks the model for rotations: un-rotating needs frequencies that stayed as they
        were.
        """
        return self.rank > 0 and self.kind != "values"

    def score(self, context: EvictionContext) -> Tensor:
        scores = torch.ones(context.valid.shape, device=context.keys.device)
        if self.kind != "values":
            scores = scores * self._leverage(
                _unrotated(context) if self.rank else context.keys, context.valid
            )
        if self.kind != "keys":
            scores = scores * self._leverage(context.values, context.valid)
        return _shares(scores.masked_fill(~context.valid, 0.0))

    def _leverage(self, vectors: Tensor, valid: Tensor) -> Tensor:
        """(b, h, s, d) -> (b, h, s)."""
        if self.rank:
            vectors = vectors.float() @ self._projection(vectors.shape[-1]).to(vectors.device)
        squared = norms(vectors).square().masked_fill(~valid, 0.0)
        return _local_shares(squared, valid, self.local) if self.local else squared

    def _projection(self, d: int) -> Tensor:
        return torch.randn(d, self.rank, generator=torch.Generator().manual_seed(self.seed)) / self.rank**0.5


def _unrotated(context: EvictionContext) -> Tensor:
    rows = context.positions.clamp_min(0).flatten(0, 1)  # heads may hold different tokens
    cos, sin = (
        x.squeeze(1).unflatten(0, context.positions.shape[:2]) for x in context.rope(rows, context.keys)
    )
    return unrotate(context.keys.float(), cos, sin)


def _shares(scores: Tensor) -> Tensor:
    return scores / scores.sum(-1, keepdim=True).clamp_min(TINY)


def _local_shares(scores: Tensor, valid: Tensor, size: int) -> Tensor:
    """Each score (b, h, s) as a share of its window: `size` valid tokens in a row, wherever padding or gaps
    lie between them.
    """
    room = -(-scores.shape[-1] // size) * size
    slot = (valid.cumsum(-1) - 1).masked_fill(~valid, room)  # one more slot, for what is not there
    packed = scores.new_zeros(*scores.shape[:2], room + 1).scatter(2, slot, scores)
    windows = packed[:, :, :room].unflatten(2, (-1, size))
    return pad(_shares(windows).flatten(2), (0, 1)).gather(2, slot)
