"""Splits a whole number of tokens over heads, within bounds and with an exact total."""

from __future__ import annotations

import numpy as np
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
    # as numpy arrays: on a handful of numbers a tensor operation takes longer than all of this, and each look
    # at a sum would wait for the device
    least, most = (x.cpu().numpy() for x in (low, high))
    total = min(max(total, int(least.sum())), int(most.sum()))
    parts = weights.detach().double().cpu().numpy().clip(0)
    # heads without weight still share what nobody else can take
    parts = parts / max(parts.sum(), 1e-300) + 1e-12

    def shares(mu: float) -> np.ndarray:
        return np.minimum(np.maximum(base + mu * parts, least), most)

    # the total grows with mu: bisect between mu = 0 and the mu at which every head has its most
    bottom, top = 0.0, float((most - base).clip(0).max() / parts.min())
    for _ in range(HALVINGS):
        middle = (bottom + top) / 2
        bottom, top = (middle, top) if shares(middle).sum() < total else (bottom, middle)
    return torch.from_numpy(_round(shares(top), total, least, most)).to(low.device)


def _round(shares: np.ndarray, total: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Whole numbers that add up to `total`: the floors, and one more for the largest remainders."""
    whole = np.floor(shares + 1e-9).astype(np.int64)
    # step 1: the floors lack what was cut off; step -1: a base above the total pushed the floors too high
    for step in (1, -1):
        while (missing := (total - int(whole.sum())) * step) > 0:
            has_room = whole < high if step > 0 else whole > low
            remainders = np.where(has_room, step * (shares - whole), -np.inf)
            order = np.argsort(-remainders, kind="stable")
            whole[order[: min(missing, int(has_room.sum()))]] += step
    return whole
