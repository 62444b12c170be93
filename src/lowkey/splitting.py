"""What an allocator is, and how a rule for one kind of budget meets the other kind."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

from lowkey.options import Checked
from lowkey.profile import Pair, Profile, Ranks, too_small

PARTS = ("summary", "bounds", "needs", "measured", "under_error", "under_bytes", "bounded", "pairs")  # of an allocator


class Allocator(Checked, ABC):
    """Chooses a pair of ranks per layer, either under an error budget or under a byte budget.

    Where an error budget is compared with measured errors, it holds of what was measured (on held-out windows, one layer compressed at
    a time), and a layer that no measured pair brings within it keeps its full rank. A byte budget is never exceeded.
    summary: what it is. bounds: what an error budget is the largest allowed value of. needs: names of the signals it reads. measured:
    whether it compares measured errors under a byte budget too, and then chooses no rank below the least that was measured.
    """

    summary: ClassVar[str]
    bounds: ClassVar[str] = "the largest error of a layer"
    needs: ClassVar[tuple[str, ...]] = ()
    measured: ClassVar[bool] = True

    @abstractmethod
    def under_error(self, profile: Profile, error: float) -> Ranks:
        """The fewest bytes that this rule finds with `bounded` within `error`."""

    @abstractmethod
    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        """The smallest error that this rule reaches within `limit` bytes per token."""

    def bounded(self, profile: Profile, ranks: Ranks) -> float:
        """What `bounds` names, at these ranks."""
        return max(profile.error(i, pair) for i, pair in enumerate(ranks))

    def pairs(self, profile: Profile) -> list[list[Pair]]:
        """Per layer the pairs to measure besides the profile's surface."""
        return [[] for _ in range(profile.layers)]


def tightest(rule: Callable[[Profile, float], Ranks], profile: Profile, limit: float, most: float) -> Ranks:
    """Run an error-budget rule under a byte budget: bisect for the smallest error budget that fits, none larger than `most`."""
    low, high = 0.0, most
    best = rule(profile, high)
    if profile.bytes(best) > limit:
        raise too_small(profile, limit, profile.bytes(best))
    for _ in range(60):
        middle = (low + high) / 2
        ranks = rule(profile, middle)
        low, high, best = (low, middle, ranks) if profile.bytes(ranks) <= limit else (middle, high, best)
    return best


def most(rule: Callable[[int], Ranks], profile: Profile, limit: float) -> Ranks:
    """Run a rule for a number of ranks, summed over layers, keys and values, under a byte budget: as many as fit. Where ranks
    differ in what they take (packed latents, whole heads), bisect for the largest number whose ranks fit."""
    if profile.sizes is None:
        return rule(profile.room(limit))
    low, high = (2 * profile.layers * r for r in (profile.served[0], profile.full[0]))
    best = rule(low)
    if profile.bytes(best) > limit:
        raise too_small(profile, limit, profile.bytes(best))
    while low < high:
        middle = (low + high + 1) // 2
        ranks = rule(middle)
        low, high, best = (middle, high, ranks) if profile.bytes(ranks) <= limit else (low, middle - 1, best)
    return best


def worst(profile: Profile) -> float:
    """An error budget that every measured pair is within, whatever it is weighted with."""
    points = [error for layer in profile.points for error in layer.values()]
    return 16 * max(*(max(row) for layer in profile.surface for row in layer), *points, 1e-9)


def fewest(rule: Callable[[Profile, float], Ranks], profile: Profile, error: float) -> Ranks:
    """Run a byte-budget rule under an error budget, among measured ranks: bisect for the fewest bytes whose largest layer error is within
    `error`. Full rank where none is. The errors of such a rule may rise a little with the bytes, and then fewer bytes may fit too.
    """
    profile = replace(profile, choices=())
    unit = profile.unit
    low, high = (math.ceil(profile.bytes([(r, r)] * profile.layers) / unit - 1e-9) for r in (profile.ranks[0], profile.ranks[-1]))
    while low < high:
        middle = (low + high) // 2
        fits = all(profile.error(i, pair) <= error for i, pair in enumerate(rule(profile, middle * unit + 1e-6)))
        low, high = (low, middle) if fits else (middle + 1, high)
    return rule(profile, high * unit + 1e-6)
