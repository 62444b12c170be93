"""What each axis costs in KL, and what a combination is expected to cost.

The KL of a combination is predicted as the sum of what low rank in a packing costs with all tokens kept, and
of what dropping tokens costs with nothing else compressed. Between measured points the logarithm of the KL is
taken to be a straight line in the logarithm of what is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SMALLEST = 1e-7  # nats; a KL that is measured as zero or below


@dataclass(frozen=True)
class Curve:
    """KL against what is kept, measured at a few points.

    Args:
        kept: what is kept at each point, ascending.
        kl: nats per token at each.
    """

    kept: Sequence[float]
    kl: Sequence[float]

    @classmethod
    def of(cls, points: dict[float, float]) -> Curve:
        """The curve through points {what is kept: KL}."""
        kept = sorted(points)
        return cls(kept, [max(SMALLEST, points[x]) for x in kept])

    def at(self, kept: float) -> float:
        """The KL where this much is kept; beyond the ends, along the last measured slope."""
        if len(self.kept) == 1:
            return self.kl[0] * self.kept[0] / kept
        i = min(max(sum(x <= kept for x in self.kept) - 1, 0), len(self.kept) - 2)
        (a, b), (low, high) = self.kept[i : i + 2], self.kl[i : i + 2]
        slope = (math.log(high) - math.log(low)) / (math.log(b) - math.log(a))
        return math.exp(math.log(low) + slope * (math.log(kept) - math.log(a)))


@dataclass(frozen=True)
class AxisCosts:
    """What the axes cost.

    Args:
        ranks: for each packing, KL against the bytes of low rank in that packing, all tokens kept.
        tokens: KL against the share of the tokens that is kept; None if tokens are not dropped.
    """

    ranks: dict[str, Curve]
    tokens: Curve | None

    def predicted(self, bits: str, rank_bytes: float, tokens: float) -> float:
        """The KL of low rank in a packing over a share of the tokens.

        Args:
            bits: the packing.
            rank_bytes: what the same ranks and packing would hold with all tokens kept.
            tokens: share of the tokens that is kept.
        """
        dropped = 0.0 if tokens >= 1 or self.tokens is None else self.tokens.at(tokens)
        return self.ranks[bits].at(rank_bytes) + dropped
