"""Intervals over few seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# two-sided 95 % quantiles of Student's t for n samples
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean of two to ten values."""
    return T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
