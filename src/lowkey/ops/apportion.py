"""Splitting a whole number of tokens over heads: water-filling between bounds, then largest remainders, so
the total is exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

HALVINGS = 100


def apportion(
    weights: Float[Tensor, " m"],
    total: int,
    low: Int[Tensor, " m"],
    high: Int[Tensor, " m"],
    base: float = 0.0,
) -> Int[Tensor, " m"]:
    """Counts proportional to `base + mu weights`, held between `low` and `high`, with mu such that they add
    up to `total`.

    What a head cannot take (its `high`) goes to the others in proportion to their weights; nothing is lost. A
    total out of reach is brought to the nearest reachable one.
    """
    total = int(min(max(total, int(low.sum())), int(high.sum())))
    weights = weights.double().clamp_min(0)
    # heads of no weight still share what nobody else can take
    weights = weights / weights.sum().clamp_min(1e-300) + 1e-12
    low64, high64 = low.double(), high.double()

    def at(mu: float) -> Tensor:
        return (base + mu * weights).maximum(low64).minimum(high64)

    top = float((high64 - base).clamp_min(0).max() / weights.min())
    return _round(at(_level(at, total, top)), total, low, high)


def _level(at: Callable[[float], Tensor], total: int, top: float) -> float:
    """The mu at which the bounded shares add up to `total`, by bisection."""
    bottom = 0.0
    for _ in range(HALVINGS):
        middle = (bottom + top) / 2
        bottom, top = (middle, top) if float(at(middle).sum()) < total else (bottom, middle)
    return top


def _round(shares: Tensor, total: int, low: Tensor, high: Tensor) -> Tensor:
    """Whole numbers that add up to `total`: the floors, and one more for the largest remainders."""
    whole = (shares + 1e-9).floor().long()
    for step in (1, -1):  # remainders that were cut; or floors that a base above the total pushed too high
        while (missing := (total - int(whole.sum())) * step) > 0:
            room = whole < high if step > 0 else whole > low
            order = (
                (step * (shares - whole)).masked_fill(~room, -torch.inf).argsort(descending=True, stable=True)
            )
            whole[order[: min(missing, int(room.sum()))]] += step
    return whole
