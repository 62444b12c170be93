"""Which heads of two models look at the same tokens: the overlap of the tokens of most attention."""

from __future__ import annotations

import torch
from torch import Tensor

# The first tokens and the newest get much attention from every head, so they would make all heads alike.
SHARED_FIRST, SHARED_NEWEST = 4, 16


def top_tokens(attention: Tensor, share: float) -> Tensor:
    """The tokens of most attention, of those that are neither among the first nor among the newest.

    Args:
        attention: (b, H, n), what each token got.
        share: of these tokens, how many are taken, at least one.

    Returns:
        Positions (b, H, k); k is 0 if there are no such tokens.
    """
    middle = attention[..., SHARED_FIRST : max(SHARED_FIRST, attention.shape[-1] - SHARED_NEWEST)]
    count = min(middle.shape[-1], max(1, round(share * middle.shape[-1])))
    return (middle.topk(count, -1).indices + SHARED_FIRST).int()


def head_overlaps(own: Tensor, others: Tensor, tokens: int) -> Tensor:
    """The overlap of sets of tokens: what both hold, as a share of what either holds (Jaccard).

    Args:
        own: positions (b, H, k).
        others: positions (b, S, k').
        tokens: n, more than any position.

    Returns:
        Overlaps (b, H, S) in [0, 1]; 0 for two empty sets.
    """
    first, second = (
        torch.zeros(*x.shape[:2], tokens, device=own.device).scatter_(2, x.to(own.device).long(), 1.0)
        for x in (own, others)
    )
    both = first @ second.mT
    either = first.sum(2).unsqueeze(2) + second.sum(2).unsqueeze(1) - both
    return both / either.clamp_min(1)
