"""Confidence intervals of a mean over few samples."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

import numpy as np

LEAST_SAMPLES = 3  # samples: an interval from two says little
Z = 1.959964  # the two-sided 95 % quantile of the normal distribution
# of Student's t with 1, 2, ... degrees of freedom, for which the expansion is too small
T95 = (12.71, 4.30, 3.18, 2.78, 2.57)


def half_width(values: Sequence[float], least: int = LEAST_SAMPLES) -> float | None:
    """Half the width of the 95 % interval of the mean, by Student's t.

    Args:
        values: the samples.
        least: number of samples below which there is no interval; at least 2 in any case.

    Returns:
        The half width, or None for too few values.
    """
    if len(values) < max(2, least):
        return None
    return t95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def t95(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t, exact to three digits.

    Args:
        freedom: degrees of freedom, 1 or more.

    Source: values of a table, and beyond it the expansion in 1 / freedom of Abramowitz and Stegun 26.7.5.
    """
    if freedom <= len(T95):
        return T95[freedom - 1]
    z, n = Z, freedom
    terms = [
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    ]
    return z + sum(term / n**k for k, term in enumerate(terms, start=1))


def paired_bootstrap(
    values: Sequence[float], others: Sequence[float], draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of the differences of pairs, and its 95 % interval by the percentiles of the bootstrap.

    Args:
        values: a value for each case.
        others: of the same cases, in the same order.
        draws: how often as many cases are drawn with replacement.
        seed: of the draws.

    Returns:
        The mean of `values` - `others`, and the lower and upper end.
    """
    pairs = [a - b for a, b in zip(values, others, strict=True)]
    rng = random.Random(seed)
    means = [statistics.fmean(rng.choices(pairs, k=len(pairs))) for _ in range(draws)]
    return statistics.fmean(pairs), *percentiles(means)


def percentiles(means: Sequence[float]) -> tuple[float, float]:
    """The ends of the 95 % interval of the bootstrap, from the means of its draws."""
    order = sorted(means)
    low, high = (order[min(len(order) - 1, int(share * len(order)))] for share in (0.025, 0.975))
    return low, high


def bootstrap_means(values: np.ndarray, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """The means of the draws of `paired_bootstrap`, for any number of measurements of the same cases.

    The difference of two columns has the percentiles that `paired_bootstrap` gives for the two.

    Args:
        values: (cases, measurements).
        draws: how often as many cases are drawn with replacement.
        seed: of the draws.

    Returns:
        (draws, measurements).
    """
    rng, cases = random.Random(seed), range(len(values))
    # how often each case was drawn; a draw by itself, since all of them together may be large
    counts = (np.bincount(rng.choices(cases, k=len(cases)), minlength=len(cases)) for _ in range(draws))
    return np.array([count @ values for count in counts]) / len(cases)
