"""When a loss has diverged, and how often it jumped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SMOOTHED_STEPS = 20  # steps at least in a smoothed loss
PAST = 100  # steps before one that its loss is compared with
SPIKE = 5.0  # median absolute deviations


def diverged(losses: Sequence[float], steps: int) -> bool:
    """Whether training of `steps` steps, of which these losses are known, has diverged.

    A loss is not finite; or the smoothed loss (the mean over 5 % of all steps, at least 20) lay above its
    value at 20 % of training during as many of the latest steps as are a tenth of all. Our own addition:
    above by more than three standard errors of that difference, so that a loss that merely stands still, as
    in continued training, is not called diverged. Below 100 steps only the first rule applies.
    """
    known, width, mark = len(losses), max(SMOOTHED_STEPS, steps // 20), steps // 5
    if known and not np.isfinite(losses[-1]):
        return True
    first = known - steps // 10
    if mark < width or first < mark + width:
        return False
    reference = np.asarray(losses[mark - width : mark], dtype=np.float64)
    sums = np.cumsum([0.0, *losses[first - width + 1 :]])
    recent = (sums[width:] - sums[:-width]) / width
    scatter = 1.4826 * np.median(np.abs(reference - np.median(reference)))
    return bool((recent > reference.mean() + 3 * scatter * (2 / width) ** 0.5).all())


def spikes(losses: Sequence[float]) -> int:
    """Steps whose loss is above the median of the 100 steps before it (of at least 20) by more than 5 median
    absolute deviations of those."""
    count = 0
    for n in range(SMOOTHED_STEPS, len(losses)):
        past = np.asarray(losses[max(0, n - PAST) : n])
        middle = np.median(past)
        count += bool(losses[n] > middle + SPIKE * np.median(np.abs(past - middle)))
    return count
