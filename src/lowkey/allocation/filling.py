"""Numbers in proportion to shares, between bounds and with a given sum."""

from __future__ import annotations

from bisect import bisect_left


def filled(shares: list[float], total: float, low: float, high: float) -> list[float]:
    """Numbers in proportion to `shares`, but none below `low` or above `high`, that add up to `total`
    (water-filling).

    Shares below 1e-12 of the largest count as that, so that every total from n low to n high can be reached.
    """
    floors = [max(s / max(shares), 1e-12) for s in shares]

    def at(level: float) -> list[float]:
        return [min(max(level * s, low), high) for s in floors]

    # the sum is linear in the level in between
    bends = sorted({0.0, *(edge / s for s in floors for edge in (low, high))})
    i = bisect_left(bends, total, key=lambda level: sum(at(level)))
    if i in (0, len(bends)):
        return at(bends[min(i, len(bends) - 1)])
    before, after = (sum(at(level)) for level in bends[i - 1 : i + 1])
    return at(bends[i - 1] + (bends[i] - bends[i - 1]) * (total - before) / (after - before))


def settled(targets: list[float], total: int, ranks: tuple[int, ...]) -> list[int]:
    """Candidate ranks near the targets: each rounded down, then one step up at a time for the one furthest
    below its target, while a step still fits within `total`. The targets lie within the candidates and add up
    to no more than `total`."""
    steps = [max(i for i, r in enumerate(ranks) if r <= t + 1e-6) for t in targets]
    room = total - sum(ranks[i] for i in steps)
    while True:
        open_ = [j for j, i in enumerate(steps) if i + 1 < len(ranks) and ranks[i + 1] - ranks[i] <= room]
        if not open_:
            return [ranks[i] for i in steps]
        j = max(open_, key=lambda j: targets[j] - ranks[steps[j]])
        room -= ranks[steps[j] + 1] - ranks[steps[j]]
        steps[j] += 1


def normalised(numbers: list[float]) -> list[float]:
    """From 0 for the smallest to 1 for the largest; all 1 when they are equal."""
    low, high = min(numbers), max(numbers)
    return [(x - low) / (high - low) if high > low else 1.0 for x in numbers]
