"""Attention over rows of different length: the fastest backend at hand. The definition is `naive.ragged`."""

from __future__ import annotations

from torch import Tensor

from lowkey.backends import grouped
from lowkey.backends.segment import Part


def ragged(query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, scaling: float, softcap: float | None = None) -> Part:
    """As `naive.ragged`."""
    return grouped.ragged(query, keys, values, starts, scaling, softcap)
