"""CurDKV (arXiv:2509.15038): approximate leverage scores of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowkey.core.options import option
from lowkey.ops.rope import unrotate
from lowkey.policies.base import EvictionContext, Policy, norms

SMALLEST_FP32 = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class CurDKV(Policy):
    """CurDKV (CUR decomposition of keys and values): a score of what is stored; it reads no queries.

    Score of token j: `l_k(j) * l_v(j)`, divided by its sum over the head. The leverage is `l_x(j) = |P
    x_j|^2`, with a random projection P or none. Each leverage is first divided by its sum over `local`
    neighbouring tokens, so that a token competes with those near it.

    Args:
        kind: `keys`, `values` or their `product` (default `product`).
        rank: number of dimensions of a Gaussian projection with entries N(0, 1/rank); 0 projects nothing,
            which is what projections give on average (default 0; the paper's code has 20 and, by default,
            none).
        local: number of neighbouring candidates over which leverages are normalised first; 0 for none
            (default 16, as in the paper's code).
        seed: seed of the projection, which is the same for all layers and heads (default 0).

    The variant AdaCurDKV is policy `ada-curdkv`: allocator `ada`.

    Source: arXiv:2509.15038. Where we differ: keys are un-rotated before they are projected. A norm does not
    depend on a key's position, but the norm of a projected rotated key does. The first tokens, to which the
    paper's code gives score 1, are `sinks` here.
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
        """Whether keys are un-rotated: only for their projection, and only if the model's frequencies never
        change.
        """
        return self.rank > 0 and self.kind != "values"

    def score(self, context: EvictionContext) -> Tensor:
        """Leverage scores (b, h, s); see the class and `Policy.score`."""
        scores = torch.ones(context.valid.shape, device=context.keys.device)
        if self.kind != "values":
            keys = _unrotated_keys(context) if self.rank else context.keys
            scores = scores * self._leverage(keys, context.valid)
        if self.kind != "keys":
            scores = scores * self._leverage(context.values, context.valid)
        return _normalised(scores.masked_fill(~context.valid, 0.0))

    def _leverage(self, vectors: Tensor, valid: Tensor) -> Tensor:
        """Leverage of vectors (b, h, s, d), normalised over neighbours: (b, h, s)."""
        if self.rank:
            generator = torch.Generator().manual_seed(self.seed)
            projection = torch.randn(vectors.shape[-1], self.rank, generator=generator) / self.rank**0.5
            vectors = vectors.float() @ projection.to(vectors.device)
        squared = norms(vectors).square().masked_fill(~valid, 0.0)
        return _normalised_locally(squared, valid, self.local) if self.local else squared


def _unrotated_keys(context: EvictionContext) -> Tensor:
    """Keys (b, h, s, d) in fp32 without their rotation."""
    # Heads may hold different tokens, so each head of each row is a row of positions.
    rows = context.positions.clamp_min(0).flatten(0, 1)
    cos, sin = (
        x.squeeze(1).unflatten(0, context.positions.shape[:2]) for x in context.rope(rows, context.keys)
    )
    return unrotate(context.keys.float(), cos, sin)


def _normalised(scores: Tensor) -> Tensor:
    """Scores (..., s) divided by their sum."""
    return scores / scores.sum(-1, keepdim=True).clamp_min(SMALLEST_FP32)


def _normalised_locally(scores: Tensor, valid: Tensor, size: int) -> Tensor:
    """Each score (b, h, s) divided by the sum of its window: `size` consecutive valid candidates."""
    # Valid candidates are packed first, since padding and gaps may lie between them; invalid ones go into a
    # last slot of their own.
    room = -(-scores.shape[-1] // size) * size
    slot = (valid.cumsum(-1) - 1).masked_fill(~valid, room)
    packed = scores.new_zeros(*scores.shape[:2], room + 1).scatter(2, slot, scores)
    windows = packed[:, :, :room].unflatten(2, (-1, size))
    return pad(_normalised(windows).flatten(2), (0, 1)).gather(2, slot)
