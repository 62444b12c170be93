"""Whether a loss has diverged, and how often it spiked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SMOOTHED_STEPS = 20  # steps in a smoothed loss, at least
PAST = 100  # steps whose losses a step's loss is compared with
SPIKE = 5.0  # median absolute deviations above the median that make a spike


def diverged(losses: Sequence[float], steps: int) -> bool:
    """Whether training has diverged.

    Either the newest loss is not finite. Or the smoothed loss, the mean over 5 % of all steps (at least 20),
    lay above its value at 20 % of training during the latest tenth of all steps, by more than three standard
    errors of that difference. The standard errors are ours: without them a loss that merely stands still, as
    in continued training, would count as diverged. Below 100 steps only the first rule applies.

    Args:
        losses: losses of the steps so far.
        steps: number of steps of the whole training.
    """
    known, width, mark = len(losses), max(SMOOTHED_STEPS, steps // 20), steps // 5
    if known and not np.isfinite(losses[-1]):
        return True
    first = known - steps // 10
    if mark < width or first < mark + width:
        return False
    # The scatter of single losses about the reference gives the standard error of a mean over `width` steps;
    # the median deviation, times 1.4826 for a normal distribution, is not moved by single spikes.
    reference = np.asarray(losses[mark - width : mark], dtype=np.float64)
    sums = np.cumsum([0.0, *losses[first - width + 1 :]])
    recent = (sums[width:] - sums[:-width]) / width
    scatter = 1.4826 * np.median(np.abs(reference - np.median(reference)))
    return bool((recent > reference.mean() + 3 * scatter * (2 / width) ** 0.5).all())


def spikes(losses: Sequence[float]) -> int:
    """Number of steps whose loss exceeds the median of the 100 steps before (at least 20) by more than 5
    median absolute deviations of those.
    """
    count = 0
    for n in range(SMOOTHED_STEPS, len(losses)):
        past = np.asarray(losses[max(0, n - PAST) : n])
        middle = np.median(past)
        count += bool(losses[n] > middle + SPIKE * np.median(np.abs(past - middle)))
    return count
