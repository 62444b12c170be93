"""Splits a whole number of tokens over heads, within bounds and with an exact total."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

HALVINGS = 100  # of an interval of doubles, which is more than their precision needs


def apportion(
    weights: Float[Tensor, " m"],
    total: int,
    low: Int[Tensor, " m"],
    high: Int[Tensor, " m"],
    base: float = 0.0,
) -> Int[Tensor, " m"]:
    """Split `total` in proportion to `base + mu weights`, held between `low` and `high`.

    mu is chosen such that the counts add up (water-filling). So what a head cannot take, because of its
    `high`, goes to the others in proportion to their weights, and nothing is lost. Shares are rounded by
    largest remainders.

    Args:
        weights: of each head, at least 0.
        total: tokens to split. If the bounds put it out of reach, the nearest total within reach is taken.
        low: the least that each head gets.
        high: the most that each head gets.
        base: what every head gets before the weights count.

    Returns:
        Tokens of each head.
    """
    total = int(min(max(total, int(low.sum())), int(high.sum())))
    weights = weights.double().clamp_min(0)
    # heads without weight still share what nobody else can take
    weights = weights / weights.sum().clamp_min(1e-300) + 1e-12
    low64, high64 = low.double(), high.double()

    def shares(mu: float) -> Tensor:
        return (base + mu * weights).maximum(low64).minimum(high64)

    # the total grows with mu: bisect between mu = 0 and the mu at which every head has its most
    bottom, top = 0.0, float((high64 - base).clamp_min(0).max() / weights.min())
    for _ in range(HALVINGS):
        middle = (bottom + top) / 2
        bottom, top = (middle, top) if float(shares(middle).sum()) < total else (bottom, middle)
    return _round(shares(top), total, low, high)


def _round(shares: Tensor, total: int, low: Tensor, high: Tensor) -> Tensor:
    """Whole numbers that add up to `total`: the floors, and one more for the largest remainders."""
    whole = (shares + 1e-9).floor().long()
    # step 1: the floors lack what was cut off; step -1: a base above the total pushed the floors too high
    for step in (1, -1):
        while (missing := (total - int(whole.sum())) * step) > 0:
            has_room = whole < high if step > 0 else whole > low
            remainders = (step * (shares - whole)).masked_fill(~has_room, -torch.inf)
            order = remainders.argsort(descending=True, stable=True)
            whole[order[: min(missing, int(has_room.sum()))]] += step
    return whole
