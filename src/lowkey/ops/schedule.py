"""Learning rates over the steps of a training."""

from __future__ import annotations

import math


def falling(step: int, steps: int, warmup: float) -> float:
    """The share of the peak rate at a step (from 0): up in a line over a share `warmup` of the steps, then
    down to 0 by a cosine.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 + 0.5 * math.cos(math.pi * (step - rising + 1) / (steps - rising + 1))
