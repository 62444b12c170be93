"""Aligns heads with one another before they are merged.

Heads are determined only up to an invertible transform that the rest of the model undoes. Aligning them first
makes them more alike, so fewer merged heads hold more of their energy. Virtual heads (arXiv:2601.19611) mix
heads as they are; the alignment is our own.

A transform must commute with rotary embedding where keys are rotated; see `ops.commuting`. *Energy* is the
trace of a second moment: the summed squares of what passes through.
"""

from __future__ import annotations

from torch import Tensor

from lowkey.ops.bases import principal
from lowkey.ops.commuting import commuting_procrustes

MOST_SWEEPS = 20  # over the heads
LEAST_GAIN = 1e-4  # as a share of all energy; a sweep that gains less is the last


def head_gram(moments: Tensor) -> Tensor:
    """The Gram matrix (h, h) of heads, E[k_h . k_g], from their joint second moments (h, h, d, d)."""
    return moments.diagonal(dim1=2, dim2=3).sum(-1)


def align_heads(moments: Tensor, n: int, rotary: int) -> tuple[Tensor, Tensor, float]:
    """Find transforms of the heads, and a mixing of the aligned heads into n component heads.

    Each head starts at its Procrustes rotation onto the head with the most energy. Then sweeps alternate with
    new mixings: every head in turn is rotated towards what the components make of all other heads, and the
    best mixing is found anew. Neither step ever loses energy.

    Args:
        moments: joint second moments (h, h, d, d) of the heads.
        n: number of component heads.
        rotary: channels of a head that are rotated; 0 if none.

    Returns:
        (transforms (h, d, d), mixing (h, n), energy of the n components).
    """
    gram = head_gram(moments)
    transforms = commuting_procrustes(moments[:, int(gram.diagonal().argmax())], rotary)
    mixing, energy = best_mixing(moments, transforms, n)
    for _ in range(MOST_SWEEPS):
        before, transforms = energy, realign(moments, transforms, mixing, rotary)
        mixing, energy = best_mixing(moments, transforms, n)
        if energy - before < LEAST_GAIN * float(gram.trace()):
            break
    return transforms, mixing, energy


def best_mixing(moments: Tensor, transforms: Tensor, n: int) -> tuple[Tensor, float]:
    """The mixing of aligned heads into n components that holds the most energy.

    Args:
        moments: joint second moments (h, h, d, d).
        transforms: of each head (h, d, d).
        n: number of components.

    Returns:
        (mixing (h, n), its energy).
    """
    mixing, energy = principal(((moments @ transforms) * transforms.unsqueeze(1)).sum((-2, -1)))
    return mixing[:, :n], float(energy[:n].sum())


def realign(moments: Tensor, transforms: Tensor, mixing: Tensor, rotary: int) -> Tensor:
    """One sweep: rotate every head in turn towards what the components make of all other heads.

    Args:
        moments: joint second moments (h, h, d, d).
        transforms: of each head (h, d, d), before the sweep.
        mixing: (h, n), orthonormal columns.
        rotary: channels of a head that are rotated.

    Returns:
        New transforms (h, d, d).
    """
    # a head's own energy is the same however it is rotated, so only the others count
    pull = mixing @ mixing.mT  # (h, h): by how much a head's components are made of each other head
    pull = (pull - pull.diagonal().diag_embed())[..., None, None]
    transforms = transforms.clone()
    for i in range(len(transforms)):
        transforms[i] = commuting_procrustes((pull[i] * (moments[i] @ transforms)).sum(0), rotary)
    return transforms
