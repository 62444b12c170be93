"""Align the heads of a trained model before they are merged.

Heads are determined only up to transforms that change nothing the model computes, and aligning them first
helps merging. Values of a KV head may be multiplied by any orthogonal matrix, which the output projection
undoes. Keys may be rotated by one phase per frequency, which commutes with rotary embedding and which queries
share. arXiv:2601.19611 mixes heads as they are; aligning them first is ours, as in `lowkey.ops.aligning`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lowkey.conversion.source import Weights
from lowkey.ops.aligning import align_heads, head_gram
from lowkey.ops.bases import principal

# Energy that is captured by what becomes of heads, from the Gram matrix of these heads.
Kept = Callable[[Tensor], float]


def every(x: Tensor, heads: int) -> Tensor:
    """What each query head reads.

    Args:
        x: one entry per KV head (h, ...).
        heads: number of query heads H.

    Returns:
        (H, ...).
    """
    return x.repeat_interleave(heads // len(x), 0)


def joint(heads: Tensor, moment: Tensor | None) -> Tensor:
    """Products of the projections of all pairs of heads, under the second moment of their inputs.

    Args:
        heads: projections (h, d, n).
        moment: (n, n); None for white inputs.

    Returns:
        (h, h, d, d).
    """
    weighted = heads if moment is None else heads @ moment
    return torch.einsum("ian,jbn->ijab", weighted, heads)


def averaged_energy(gram: Tensor) -> float:
    """Energy of heads that their mean captures, from their Gram matrix."""
    return float(gram.sum()) / len(gram)


def mixed_energy(components: int) -> Kept:
    """Energy captured by the top `components`, as a function of the Gram matrix of heads."""
    return lambda gram: float(principal(gram)[1][:components].sum())


def aligned_weights(
    weights: Weights, groups: int, components: int, kept: Kept, moment: Tensor | None
) -> Weights:
    """The same attention with the KV heads of each group aligned, where that increases the captured energy.

    Args:
        weights: the source's attention.
        groups: number of groups that are aligned by themselves.
        components: number of heads that will stand for a group; heads are aligned with the best of these.
        kept: energy that is captured, from the Gram matrix of a group's heads.
        moment: second moment of the inputs, or None for white ones.
    """
    heads, _ = weights.heads
    align_k = _alignments(weights.k, groups, components, kept, moment, weights.k.shape[1])
    align_v = _alignments(weights.v, groups, components, kept, moment, 0)
    return replace(
        weights,
        q=every(align_k, heads).mT @ weights.q,
        k=align_k.mT @ weights.k,
        v=align_v.mT @ weights.v,
        o=weights.o @ every(align_v, heads),
    )


def _alignments(
    heads: Tensor, groups: int, components: int, kept: Kept, moment: Tensor | None, rotary: int
) -> Tensor:
    """The orthogonal transform of each head (h, d, d); the identity where aligning does not help."""
    transforms = []
    for group in heads.unflatten(0, (groups, -1)):
        blocks = joint(group, moment)
        alignments = align_heads(blocks, components, rotary)[0]
        aligned_gram = ((blocks @ alignments) * alignments.unsqueeze(1)).sum((-2, -1))
        # Alignment is iterative and may end below where it began.
        if kept(aligned_gram) <= kept(head_gram(blocks)):
            alignments = torch.eye(alignments.shape[-1], dtype=alignments.dtype).expand_as(alignments)
        transforms.append(alignments)
    return torch.cat(transforms)
