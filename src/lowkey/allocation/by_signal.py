"""Allocators that read how sensitive layers are (`calibration.sensitivity`), or only their depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowkey.allocation.base import RankAllocator, search_byte_budget, search_rank_count
from lowkey.allocation.filling import fill_proportionally, min_max_normalised, round_to_ranks
from lowkey.allocation.profile import Profile, Ranks
from lowkey.core.errors import LowkeyError


@dataclass(frozen=True)
class Fisher(RankAllocator):
    """Palu's allocation, also ReCalKV's: ranks in proportion to the Fisher information of W_K and of W_V.

    What would exceed the head dim goes to the other sides in proportion. The published code hands it out one
    rank at a time to all alike. That code also rounds ranks to the nearest multiple of 32, which may exceed
    the budget; here ranks are rounded down to selectable ones, and steps up are taken while they fit. With
    evenly spaced ranks more bytes never buy fewer ranks in total.

    Source: arXiv:2407.21118 and arXiv:2505.24357.
    """

    summary: ClassVar[str] = "ranks of keys and of values in proportion to Fisher information"
    uses_measured_errors = False
    required_signals: ClassVar[tuple[str, ...]] = ("fisher",)

    def under_error(self, profile: Profile, error: float) -> Ranks:
        """Return the ranks at the smallest byte budget whose errors are within the error budget."""
        return search_byte_budget(self.under_bytes, profile, error)

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        """Split the ranks that fit in proportion to Fisher information."""
        shares, ranks = [x for pair in profile.signal("fisher") for x in pair], profile.selectable_ranks
        if not any(shares):
            raise LowkeyError(
                "signal 'fisher' is 0 everywhere: there is nothing to split in proportion to; use another "
                "text or allocator"
            )

        def split(total: int) -> Ranks:
            chosen = round_to_ranks(fill_proportionally(shares, total, ranks[0], ranks[-1]), total, ranks)
            return list(zip(chosen[::2], chosen[1::2], strict=True))

        return search_rank_count(split, profile, limit)


@dataclass(frozen=True)
class Depth(RankAllocator):
    """Depth allocation: ranks on a straight line in depth, most in the first layer.

    It is `condition` without the condition numbers, to tell what these add. Keys and values of a layer have
    the same rank. The first layer has rank d_max, the head dim, and the last layer d_min, which the budget
    determines. If even the smallest selectable rank as d_min costs too much, d_max is lowered instead. Ranks
    are rounded down to selectable ones; steps that still fit go to the layers furthest below the line.
    """

    summary: ClassVar[str] = "ranks on a straight line in depth, most in the first layer"
    uses_measured_errors = False

    def under_error(self, profile: Profile, error: float) -> Ranks:
        """Return the ranks at the smallest byte budget whose errors are within the error budget."""
        return search_byte_budget(self.under_bytes, profile, error)

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        """Return ranks near the line that the budget determines."""
        ranks, heights = profile.selectable_ranks, min_max_normalised(self.sensitivity(profile))

        def split(total: int) -> Ranks:
            targets = self._targets(heights, total // 2, ranks[0], ranks[-1])
            return [(r, r) for r in round_to_ranks(targets, total // 2, ranks)]

        return search_rank_count(split, profile, limit)

    def sensitivity(self, profile: Profile) -> list[float]:
        """Return one number per layer; a larger number means a larger rank."""
        return [float(-i) for i in range(profile.layer_count)]

    def _targets(self, heights: list[float], total: int, low: int, high: int) -> list[float]:
        """Return d_min + height * (d_max - d_min) per layer.

        d_max is `high` and d_min makes the targets sum to `total`, or d_min is `low` and d_max does so.
        """
        n, height_sum = len(heights), sum(heights)
        # At d_min = low and d_max = high the targets sum to the right-hand side.
        if total <= n * low + height_sum * (high - low):
            return [low + h * (total - n * low) / height_sum for h in heights]
        return [high - (1 - h) * (n * high - total) / (n - height_sum) for h in heights]


@dataclass(frozen=True)
class Condition(Depth):
    """LoRC's allocation: ranks by the condition numbers of W_K and W_V, accumulated from a layer to the last.

    The logs of the condition numbers are summed from a layer to the last one, normalised over layers to [0,
    1] (min-max) and mapped linearly to [d_min, d_max]. A layer with a larger sum, and so a shallower one,
    gets more ranks. W_K and W_V of a layer share one rank.

    The mapping is written from memory of the paper. Its d_min and d_max are not known to us; `Depth` says how
    the budget sets them. The paper leaves layers above some sensitivity uncompressed, in units that are not
    known to us, so no layer is exempt here.

    Source: arXiv:2410.03111.
    """

    summary: ClassVar[str] = "ranks by condition numbers accumulated from a layer to the last"
    required_signals: ClassVar[tuple[str, ...]] = ("condition",)

    def sensitivity(self, profile: Profile) -> list[float]:
        """Return the log condition numbers summed from each layer to the last."""
        # The product of two condition numbers, as a sum of logs.
        logs = [sum(pair) for pair in profile.signal("condition")]
        return [sum(logs[i:]) for i in range(len(logs))]
