"""The base class of rank allocators, and searches that apply a rule for one kind of budget to the other."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

from lowkey.allocation.profile import Pair, Profile, Ranks, budget_too_small
from lowkey.core.options import Checked

# What `catalog` and `calibrate` look for in an allocator class of the user's own.
REQUIRED_ATTRIBUTES = (
    "summary",
    "bounds",
    "required_signals",
    "uses_measured_errors",
    "under_error",
    "under_bytes",
    "bounded_value",
    "extra_pairs",
)


class RankAllocator(Checked, ABC):
    """Chooses a pair of ranks (r_K, r_V) for every layer, under an error budget or under a byte budget.

    A subclass is a frozen dataclass whose fields are its options. A byte budget is never exceeded. An error
    budget that is compared with measured errors holds for what was measured: held-out windows, one layer
    compressed at a time. A layer that no measured pair brings within the error budget keeps its full rank.

    Attributes:
        summary: what the allocator does, in one line.
        bounds: the quantity that an error budget is the largest allowed value of.
        required_signals: names of the signals that the allocator reads (`calibration.sensitivity.SIGNALS`).
        uses_measured_errors: whether the allocator compares measured errors under a byte budget too. It then
            chooses no rank below the smallest one that was measured.
    """

    summary: ClassVar[str]
    bounds: ClassVar[str] = "the largest error of a layer"
    required_signals: ClassVar[tuple[str, ...]] = ()

    @property
    def uses_measured_errors(self) -> bool:
        """Whether measured errors are compared under a byte budget too; a class may set it to False."""
        return True

    @abstractmethod
    def under_error(self, profile: Profile, error: float) -> Ranks:
        """Choose the cheapest ranks that this rule finds with `bounded_value` at most `error`.

        Args:
            profile: costs and errors of every layer.
            error: the error budget, in the unit of what `bounds` names.

        Returns:
            One pair (r_K, r_V) per layer.
        """

    @abstractmethod
    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        """Choose the ranks with the smallest error that this rule finds within a byte budget.

        Args:
            profile: costs and errors of every layer.
            limit: bytes of one stored token in all layers together.

        Returns:
            One pair (r_K, r_V) per layer.

        Raises:
            LowkeyError: if even the smallest ranks take more bytes.
        """

    def bounded_value(self, profile: Profile, ranks: Ranks) -> float:
        """Return the value of the quantity that `bounds` names, at these ranks."""
        return max(profile.error(i, pair) for i, pair in enumerate(ranks))

    def extra_pairs(self, profile: Profile) -> list[list[Pair]]:
        """Return, per layer, the pairs to measure in addition to the profile's error surface."""
        return [[] for _ in range(profile.layer_count)]


def search_error_budget(
    rule: Callable[[Profile, float], Ranks], profile: Profile, limit: float, largest: float
) -> Ranks:
    """Apply a rule for error budgets under a byte budget, by bisection over the error budget.

    Args:
        rule: (profile, error budget) -> ranks; a larger error budget gives fewer bytes.
        profile: costs and errors of every layer.
        limit: bytes of one stored token in all layers together.
        largest: the largest error budget to try.

    Returns:
        The ranks at the smallest error budget whose ranks fit into `limit`.

    Raises:
        LowkeyError: if the ranks at `largest` take more than `limit` bytes.
    """
    low, high = 0.0, largest
    best = rule(profile, high)
    if profile.bytes_per_token(best) > limit:
        raise budget_too_small(profile, limit, profile.bytes_per_token(best))
    for _ in range(60):  # more halvings than a double has bits of precision
        middle = (low + high) / 2
        ranks = rule(profile, middle)
        if profile.bytes_per_token(ranks) <= limit:
            high, best = middle, ranks
        else:
            low = middle
    return best


def search_rank_count(rule: Callable[[int], Ranks], profile: Profile, limit: float) -> Ranks:
    """Apply a rule that splits a number of ranks under a byte budget, for as many ranks as fit.

    Where ranks differ in the bytes that they take (packed latents, whole heads), this is a bisection for the
    largest number whose ranks fit.

    Args:
        rule: number of ranks, summed over layers, keys and values -> ranks.
        profile: costs of every layer.
        limit: bytes of one stored token in all layers together.

    Raises:
        LowkeyError: if even the smallest ranks take more bytes.
    """
    if profile.bytes_by_rank is None:
        return rule(profile.ranks_within(limit))
    low, high = (2 * profile.layer_count * r for r in (profile.selectable_ranks[0], profile.full_pair[0]))
    best = rule(low)
    if profile.bytes_per_token(best) > limit:
        raise budget_too_small(profile, limit, profile.bytes_per_token(best))
    while low < high:
        middle = (low + high + 1) // 2
        ranks = rule(middle)
        if profile.bytes_per_token(ranks) <= limit:
            low, best = middle, ranks
        else:
            high = middle - 1
    return best


def loosest_error_budget(profile: Profile) -> float:
    """Return an error budget that every measured pair meets, whatever its error is weighted with."""
    extra = [error for layer in profile.extra_points for error in layer.values()]
    largest = max(*(max(row) for layer in profile.surface for row in layer), *extra, 1e-9)
    return 16 * largest  # well above the largest weight, the 2 of `weighted-pareto`


def search_byte_budget(rule: Callable[[Profile, float], Ranks], profile: Profile, error: float) -> Ranks:
    """Apply a rule for byte budgets under an error budget, by bisection over the byte budget.

    Only measured ranks are chosen. The errors of such a rule may rise a little with the bytes, so a byte
    budget below the one that bisection finds may meet the error budget too.

    Args:
        rule: (profile, bytes per token) -> ranks.
        profile: costs and errors of every layer.
        error: the largest error that a layer may have.

    Returns:
        The ranks at the smallest byte budget that bisection finds; full rank if no budget meets `error`.
    """
    profile = replace(profile, choices=())  # only measured ranks have a measured error
    unit, rounding = profile.smallest_byte_step, 1e-6  # rounding: in bytes, of sums of bytes per token
    low, high = (
        math.ceil(profile.bytes_per_token([(r, r)] * profile.layer_count) / unit - 1e-9)
        for r in (profile.ranks[0], profile.ranks[-1])
    )
    while low < high:
        middle = (low + high) // 2
        ranks = rule(profile, middle * unit + rounding)
        if all(profile.error(i, pair) <= error for i, pair in enumerate(ranks)):
            high = middle
        else:
            low = middle + 1
    return rule(profile, high * unit + rounding)
