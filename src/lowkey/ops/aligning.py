"""Heads turned towards one another before they are mixed: each head is determined only up to a map that its
reader undoes.

Virtual heads (arXiv:2601.19611) mix heads as they are; aligning them first is ours.
"""

from __future__ import annotations

from torch import Tensor

from lowkey.ops.bases import principal
from lowkey.ops.commuting import turning

SWEEPS = 20  # over the heads, at most, to align them
GAIN = 1e-4  # of all energy: a sweep that gains less is the last


def head_gram(blocks: Tensor) -> Tensor:
    """E[k_h . k_g] from joint second moments (h, h, d, d)."""
    return blocks.diagonal(dim1=2, dim2=3).sum(-1)


def alignment(blocks: Tensor, n: int, rotary: int) -> tuple[Tensor, Tensor, float]:
    """(turns (h, d, d), mixing (h, n), energy) of n component heads, from joint moments (h, h, d, d).

    The start is the gauge of the head with most energy: each other head's Procrustes rotation onto it. Then
    one head after another is turned towards what the components make of all others, and the mixing found
    anew; neither step ever loses energy.
    """
    gram = head_gram(blocks)
    turns = turning(blocks[:, int(gram.diagonal().argmax())], rotary)
    mixing, held = best_mixing(blocks, turns, n)
    for _ in range(SWEEPS):
        before, turns = held, turned(blocks, turns, mixing, rotary)
        mixing, held = best_mixing(blocks, turns, n)
        if held - before < GAIN * float(gram.trace()):
            break
    return turns, mixing, held


def best_mixing(blocks: Tensor, turns: Tensor, n: int) -> tuple[Tensor, float]:
    mixing, energy = principal(((blocks @ turns) * turns.unsqueeze(1)).sum((-2, -1)))
    return mixing[:, :n], float(energy[:n].sum())


def turned(blocks: Tensor, turns: Tensor, mixing: Tensor, rotary: int) -> Tensor:
    """One sweep over the heads. A head's own moment is the same however it is turned, so only the others
    pull.
    """
    pull = mixing @ mixing.mT
    pull = (pull - pull.diagonal().diag_embed())[..., None, None]
    turns = turns.clone()
    for i in range(len(turns)):
        turns[i] = turning((pull[i] * (blocks[i] @ turns)).sum(0), rotary)
    return turns
