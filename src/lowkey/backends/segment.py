"""What a backend attends to: a few segments whose softmax is shared."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Keys and values stored one way, with the query carried into their basis.

    query (b, h, g, t, r), keys (b, h, s, r), values (b, h, s, r_V); mask (b|1, t, s), True = attend, or None for all;
    up (h|1, r_V, d) maps this segment's output back, or None when it is already d wide.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    up: Tensor | None = None
