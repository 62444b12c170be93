"""Learning rates over the steps of a training."""

from __future__ import annotations

import math


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """The learning rate at a step, as a share of the peak rate.

    Args:
        step: counted from 0.
        steps: how many there are.
        warmup: the share of the steps in which the rate rises linearly; then it falls to 0 as a cosine does.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 + 0.5 * math.cos(math.pi * (step - rising + 1) / (steps - rising + 1))
