"""Splitting a total in proportion to shares, between bounds, and rounding the parts to selectable ranks."""

from __future__ import annotations

from bisect import bisect_left


def fill_proportionally(shares: list[float], total: float, low: float, high: float) -> list[float]:
    """Split `total` into parts in proportion to `shares`, each between `low` and `high` (water-filling).

    Args:
        shares: one non-negative number per part, not all zero. A share below 1e-12 of the largest counts as
            1e-12 of it, so that every total from n * low to n * high can be reached.
        total: the sum of the parts.
        low: the least that a part may be.
        high: the most that a part may be.

    Returns:
        The parts, in the order of the shares.
    """
    floors = [max(s / max(shares), 1e-12) for s in shares]

    def parts_at(level: float) -> list[float]:
        return [min(max(level * s, low), high) for s in floors]

    # The sum of the parts is piecewise linear in the level. It bends where a part reaches a bound, so the two
    # bends around `total` give the level exactly.
    bends = sorted({0.0, *(edge / s for s in floors for edge in (low, high))})
    i = bisect_left(bends, total, key=lambda level: sum(parts_at(level)))
    if i in (0, len(bends)):
        return parts_at(bends[min(i, len(bends) - 1)])
    before, after = (sum(parts_at(level)) for level in bends[i - 1 : i + 1])
    return parts_at(bends[i - 1] + (bends[i] - bends[i - 1]) * (total - before) / (after - before))


def round_to_ranks(targets: list[float], total: int, ranks: tuple[int, ...]) -> list[int]:
    """Round targets to ranks whose sum is at most `total`.

    Every target is rounded down. Then the rank furthest below its target moves up by one step, again and
    again, as long as a step fits.

    Args:
        targets: numbers within the range of `ranks` whose sum is at most `total`.
        total: the largest sum of the result.
        ranks: the ranks that may be chosen, in ascending order.

    Returns:
        One rank per target.
    """
    steps = [max(i for i, r in enumerate(ranks) if r <= t + 1e-6) for t in targets]
    left = total - sum(ranks[i] for i in steps)
    while True:
        fitting = [j for j, i in enumerate(steps) if i + 1 < len(ranks) and ranks[i + 1] - ranks[i] <= left]
        if not fitting:
            return [ranks[i] for i in steps]
        j = max(fitting, key=lambda j: targets[j] - ranks[steps[j]])
        left -= ranks[steps[j] + 1] - ranks[steps[j]]
        steps[j] += 1


def min_max_normalised(numbers: list[float]) -> list[float]:
    """Map numbers linearly to [0, 1]: the smallest to 0, the largest to 1. Equal numbers all become 1."""
    low, high = min(numbers), max(numbers)
    return [(x - low) / (high - low) if high > low else 1.0 for x in numbers]
