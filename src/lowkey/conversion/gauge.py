"""Heads of a trained model are known up to turns that change nothing it computes; turned alike, they have
more in common.

Values of a KV head may be turned by any orthogonal matrix, which the output projection undoes, and keys by a
phase per frequency, which commutes with rotation and which queries share (arXiv:2601.19611 mixes heads as
they are; turning them first is ours, as in `ops.aligning`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lowkey.conversion.source import Weights
from lowkey.ops.aligning import alignment, head_gram
from lowkey.ops.bases import principal

Kept = Callable[[Tensor], float]  # the energy that what becomes of heads holds, from their Gram


def every(x: Tensor, heads: int) -> Tensor:
    """What each of so many query heads reads, from KV heads (h, ...)."""
    return x.repeat_interleave(heads // len(x), 0)


def joint(heads: Tensor, moment: Tensor | None) -> Tensor:
    """(h, h, d, d) products of projections (h, d, n) with one another, under the second moment (n, n) of
    their inputs; white when None.
    """
    right = heads if moment is None else heads @ moment
    return torch.einsum("ian,jbn->ijab", right, heads)


def averaged_energy(gram: Tensor) -> float:
    """What the mean of heads holds of them."""
    return float(gram.sum()) / len(gram)


def mixed_energy(components: int) -> Kept:
    """What the best so many components hold."""
    return lambda gram: float(principal(gram)[1][:components].sum())


def aligned_weights(
    weights: Weights, groups: int, components: int, kept: Kept, moment: Tensor | None
) -> Weights:
    """The same attention, the KV heads of each group turned towards the best `components` heads that could
    stand for them, where these then hold more than before."""
    heads, _ = weights.heads
    turn_k = _turns(weights.k, groups, components, kept, moment, weights.k.shape[1])
    turn_v = _turns(weights.v, groups, components, kept, moment, 0)
    return replace(
        weights,
        q=every(turn_k, heads).mT @ weights.q,
        k=turn_k.mT @ weights.k,
        v=turn_v.mT @ weights.v,
        o=weights.o @ every(turn_v, heads),
    )


def _turns(
    heads: Tensor, groups: int, components: int, kept: Kept, moment: Tensor | None, rotary: int
) -> Tensor:
    """(h, d, d)."""
    found = []
    for group in heads.unflatten(0, (groups, -1)):
        blocks = joint(group, moment)
        turns = alignment(blocks, components, rotary)[0]
        turned = ((blocks @ turns) * turns.unsqueeze(1)).sum((-2, -1))
        better = kept(turned) > kept(head_gram(blocks))
        found.append(turns if better else torch.eye(turns.shape[-1], dtype=turns.dtype).expand_as(turns))
    return torch.cat(found)
