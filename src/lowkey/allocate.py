"""Splitting one budget over layers, and over keys and values.

Any basis works with any allocator, except that `threshold`, `tail` and `spectrum` read energies, which not all bases have.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, count, takewhile
from typing import ClassVar, Literal

from lowkey.filling import filled, normalised, settled
from lowkey.options import option
from lowkey.profile import Pair, Profile, Ranks, too_small
from lowkey.splitting import Allocator, fewest, most, tightest, worst
from lowkey.types import LowkeyError

Energy = Literal["squared", "singular"]
AHEAD = (1, 2, 4, 8)  # ranks at a time: packed latents grow by jumps, so that one rank more may cost as much as eight
Step = tuple[float, int, Pair]  # error added per byte freed, layer, its new ranks


@dataclass(frozen=True)
class Uniform(Allocator):
    """The same pair in every layer.

    split: `equal`, keys and values the same rank, the largest that fits, for which nothing need be measured; `measured`, the pair with the
    smallest mean error among those that were measured (under an error budget: the cheapest).
    """

    summary: ClassVar[str] = "the same ranks in every layer"

    split: Literal["equal", "measured"] = "equal"

    @property
    def measured(self) -> bool:  # type: ignore[override]
        return self.split == "measured"

    def under_error(self, profile: Profile, error: float) -> Ranks:
        pairs = [p for p in profile.pairs() if self.measured or p[0] == p[1]]
        fitting = [p for p in pairs if self.bounded(profile, [p] * profile.layers) <= error]
        return [min(fitting, key=lambda p: (sum(p), self._mean(profile, p)), default=profile.full)] * profile.layers

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        pairs = profile.pairs() if self.measured else [(r, r) for r in profile.served]
        fitting = [p for p in pairs if profile.bytes([p] * profile.layers) <= limit]
        if not fitting:
            raise too_small(profile, limit, profile.bytes([pairs[0]] * profile.layers))
        chosen = min(fitting, key=lambda p: (self._mean(profile, p), sum(p))) if self.measured else fitting[-1]
        return [chosen] * profile.layers

    def _mean(self, profile: Profile, pair: Pair) -> float:
        return sum(profile.error(i, pair) for i in range(profile.layers)) / profile.layers


@dataclass(frozen=True)
class Pareto(Allocator):
    """Per layer the cheapest measured pair within the error budget (arXiv:2601.21686, section 3.5); full rank where none is."""

    summary: ClassVar[str] = "per layer the cheapest ranks within one error budget"

    def weights(self, layers: int) -> list[float]:
        return [1.0] * layers

    def under_error(self, profile: Profile, error: float) -> Ranks:
        weights = self.weights(profile.layers)
        return [self._cheapest(profile, i, error / w) for i, w in enumerate(weights)]

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        return tightest(self.under_error, profile, limit, worst(profile))

    def bounded(self, profile: Profile, ranks: Ranks) -> float:
        return max(w * profile.error(i, pair) for i, (w, pair) in enumerate(zip(self.weights(profile.layers), ranks, strict=True)))

    def _cheapest(self, profile: Profile, layer: int, error: float) -> Pair:
        fitting = [p for p in profile.pairs() if profile.error(layer, p) <= error]
        return min(fitting, key=lambda p: (sum(p), profile.error(layer, p)), default=profile.full)


@dataclass(frozen=True)
class WeightedPareto(Pareto):
    """The paper's default: the error budget of the first and last four layers is divided by 2, 1.75, 1.5, 1.25, after these weights (1
    in between) are divided by their mean. So layers in between may err by more than the budget, and those at the ends by less."""

    summary: ClassVar[str] = "as pareto, stricter for the first and last four layers"
    bounds: ClassVar[str] = "the largest error of a layer times its weight (2, 1.75, 1.5, 1.25 from either end, else 1, over their mean)"

    def weights(self, layers: int) -> list[float]:
        edge = {0: 2.0, 1: 1.75, 2: 1.5, 3: 1.25}
        raw = [max(edge.get(i, 1.0), edge.get(layers - 1 - i, 1.0)) for i in range(layers)]
        return [w * layers / sum(raw) for w in raw]


@dataclass(frozen=True)
class Greedy(Allocator):
    """From full rank, again and again the step (layer, keys or values) that adds the least error per byte freed.

    Our reading of the sequential allocation under a byte budget that arXiv:2601.21686 v2 announces in its abstract. Under a byte budget a
    step leads to the next lower rank that may be chosen and takes fewer bytes, its error interpolated where it was not measured; under an
    error budget, which must hold, to the next lower one that was measured.
    """

    summary: ClassVar[str] = "from full rank, the step of least error per byte, until the budget is met"

    def under_error(self, profile: Profile, error: float) -> Ranks:
        return self._descended(profile, profile.ranks, lambda ranks: True, lambda s: profile.error(s[1], s[2]) <= error)

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        choices = [r for r in profile.served if r >= profile.ranks[0]]
        ranks = self._descended(profile, choices, lambda ranks: profile.bytes(ranks) > limit, lambda step: True)
        if profile.bytes(ranks) > limit:
            raise too_small(profile, limit, profile.bytes(ranks))
        return ranks

    def _descended(self, profile: Profile, choices: Sequence[int], on: Callable[[Ranks], bool], allowed: Callable[[Step], bool]) -> Ranks:
        """Full ranks, lowered step by step among `choices` while `on` says so and there are steps that are allowed."""
        ranks = [profile.full] * profile.layers
        steps = [self._steps(profile, choices, i, pair) for i, pair in enumerate(ranks)]
        while on(ranks) and (fitting := [s for layer in steps for s in layer if allowed(s)]):
            _, i, ranks[i] = min(fitting)
            steps[i] = self._steps(profile, choices, i, ranks[i])
        return ranks

    def _steps(self, profile: Profile, choices: Sequence[int], layer: int, pair: Pair) -> list[Step]:
        lower = [self._lower(profile, choices, side, rank) for side, rank in enumerate(pair)]
        pairs = [(r, pair[1]) if side == 0 else (pair[0], r) for side, r in enumerate(lower) if r is not None]
        return [(self._cost(profile, layer, pair, new), layer, new) for new in pairs]

    def _lower(self, profile: Profile, choices: Sequence[int], side: int, rank: int) -> int | None:
        """The next lower rank that takes fewer bytes: packed latents grow by jumps."""
        held = profile.cost(side, rank)
        return next((r for r in reversed(choices[: bisect_left(choices, rank)]) if profile.cost(side, r) < held), None)

    def _cost(self, profile: Profile, layer: int, pair: Pair, new: Pair) -> float:
        return (profile.error(layer, new) - profile.error(layer, pair)) / (profile.bytes([pair]) - profile.bytes([new]))


def cumulated(spectrum: Sequence[float], energy: Energy) -> list[float]:
    """Shares of a head's energy (or of its singular values) that its first 0, 1, 2, ... directions hold; all 1 where there is none."""
    sums = list(accumulate((e**0.5 if energy == "singular" else e for e in spectrum), initial=0.0))
    return [s / sums[-1] if sums[-1] else 1.0 for s in sums]


@dataclass(frozen=True)
class Threshold(Allocator):
    """EigenAttention's rule (arXiv:2408.05646): one energy threshold for keys and values per layer, lowered from 1 by `step` while the
    layer's error stays within budget; a layer takes the largest rank over its heads. The layer's error is measured at just these ranks.
    Where not every rank may be chosen (trained bases, whole heads, a rank multiple), the next larger one that may is taken.

    energy: `squared` as in the paper, or `singular`, sums of singular values, as the official code has it.
    """

    summary: ClassVar[str] = "per layer an energy threshold, lowered while the layer's error fits"
    measured: ClassVar[bool] = False

    step: float = option(0.02, at_least=1e-4, at_most=1)
    energy: Energy = "squared"

    def under_error(self, profile: Profile, error: float) -> Ranks:
        return self._chosen(profile, self.pairs(profile), error)

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        paths = self.pairs(profile)
        return tightest(lambda p, error: self._chosen(p, paths, error), profile, limit, worst(profile))

    def _chosen(self, profile: Profile, paths: list[list[Pair]], error: float) -> Ranks:
        """The last pair of each layer's path before the first that errs too much."""
        ranks = [profile.full] * profile.layers
        for i, path in enumerate(paths):
            for pair in path:
                if profile.error(i, pair) > error:
                    break
                ranks[i] = pair
        return ranks

    def pairs(self, profile: Profile) -> list[list[Pair]]:
        """The ranks at thresholds 1, 1 - step, 1 - 2 step, ... above 0."""
        thresholds = list(takewhile(lambda share: share > 1e-9, (1 - n * self.step for n in count())))
        return [self._path(profile, i, thresholds) for i in range(profile.layers)]

    def _path(self, profile: Profile, layer: int, thresholds: list[float]) -> list[Pair]:
        keys, values = ([cumulated(head, self.energy) for head in side] for side in profile.energies(layer, "threshold"))

        def largest(heads: list[list[float]], share: float) -> int:
            rank = max(bisect_left(head, share * (1 - 1e-12)) for head in heads)
            return profile.served[bisect_left(profile.served, rank)]

        return [(largest(keys, share), largest(values, share)) for share in thresholds]


@dataclass(frozen=True)
class Tail(Allocator):
    """KQ-SVD's rule (arXiv:2512.05916): per layer, for keys and for values apart, the smallest rank whose tail is at most the square of
    the error budget. The tail is the share of the spectrum beyond the rank, in the mean over heads. No error of a layer is compared.

    energy: what the spectrum is of: `singular`, the singular values of K Q^T and of V W_O, which are products already, as the paper's code
    has it; `squared`, their squares. The spectra of other methods are those of keys and values alone.
    """

    summary: ClassVar[str] = "per layer, keys and values apart, the least rank whose tail of the spectrum is small"
    bounds: ClassVar[str] = (
        "the root of the largest tail (share of the spectrum beyond the rank, mean over heads) of a layer's keys or values"
    )
    measured: ClassVar[bool] = False

    energy: Energy = "singular"

    def under_error(self, profile: Profile, error: float) -> Ranks:
        return self._chosen(profile, self._tails(profile), error)

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        tails = self._tails(profile)
        return tightest(lambda p, error: self._chosen(p, tails, error), profile, limit, 1.0)

    def bounded(self, profile: Profile, ranks: Ranks) -> float:
        tails = self._tails(profile)
        return max(tails[i][side][pair[side]] for i, pair in enumerate(ranks) for side in (0, 1)) ** 0.5

    def _chosen(self, profile: Profile, tails: list[tuple[list[float], ...]], error: float) -> Ranks:
        def least(tail: list[float]) -> int:
            return next((r for r in profile.served if tail[r] <= error**2), profile.served[-1])

        return [(least(keys), least(values)) for keys, values in tails]

    def _tails(self, profile: Profile) -> list[tuple[list[float], ...]]:
        """Per layer, of keys and of values: the tail beyond 0, 1, 2, ... directions."""
        sides = (profile.energies(i, "tail") for i in range(profile.layers))
        return [tuple(self._tail(side) for side in pair) for pair in sides]

    def _tail(self, heads: list[list[float]]) -> list[float]:
        shares = zip(*(cumulated(head, self.energy) for head in heads), strict=True)
        return [max(0.0, 1 - sum(held) / len(heads)) for held in shares]


@dataclass(frozen=True)
class Spectrum(Allocator):
    """The largest energies of all layers' spectra, keys and values alike: the least sum of what lies beyond the ranks. Nothing is measured.

    For energies of one unit, as `fisher-svd` has them. Those of other methods cannot be compared between layers.
    floor: under a byte budget no rank is below this share of the rank that all could have, since what a layer does for other texts than
    the calibration's does not show in its energies.
    """

    summary: ClassVar[str] = "the ranks of the largest energies over all layers, keys and values"
    bounds: ClassVar[str] = "the share of the energies of all spectra together that lies beyond the ranks"
    measured: ClassVar[bool] = False

    floor: float = option(0.75, at_least=0, at_most=1)

    def under_error(self, profile: Profile, error: float) -> Ranks:
        return self._grown(profile, math.inf, error)

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        return self._grown(profile, limit, -1.0)

    def bounded(self, profile: Profile, ranks: Ranks) -> float:
        tails = self._tails(profile)
        return sum(tail[r] for tail, r in zip(tails, chain(*ranks), strict=True)) / (sum(tail[0] for tail in tails) or 1.0)

    def _grown(self, profile: Profile, limit: float, error: float) -> Ranks:
        """From the least ranks, the step of most energy per byte that fits, until `error` is reached or none fits."""
        served, tails = profile.served, self._tails(profile)
        costs = [[profile.cost(side, rank) for rank in served] for side in (0, 1)]
        even = [profile.bytes([(rank, rank)] * profile.layers) for rank in served]
        if even[0] > limit:
            raise too_small(profile, limit, even[0])
        equal = served[bisect_right(even, limit) - 1] if limit < math.inf else served[0]
        least = max(0, bisect_right(served, self.floor * equal) - 1)
        at, used = [least] * len(tails), even[least]
        while True:
            ranks = [served[i] for i in at]
            pairs = list(zip(ranks[::2], ranks[1::2], strict=True))
            if error >= 0 and self.bounded(profile, pairs) <= error:
                return pairs
            steps = []
            for j, i in enumerate(at):
                for to in (i + n for n in AHEAD if i + n < len(served)):
                    cost = costs[j % 2][to] - costs[j % 2][i]
                    if used + cost <= limit + 1e-6:
                        steps.append(((tails[j][served[i]] - tails[j][served[to]]) / max(cost, 1e-9), -cost, j, to))
            if not steps:
                return pairs
            _, cost, j, at[j] = max(steps)
            used -= cost

    def _tails(self, profile: Profile) -> list[list[float]]:
        """Of every layer's keys and values in turn: the energy beyond 0, 1, 2, ... directions, summed over heads."""
        sides = (side for i in range(profile.layers) for side in profile.energies(i, "spectrum"))
        return [[*reversed(list(accumulate(map(sum, reversed(list(zip(*side, strict=True)))), initial=0.0)))] for side in sides]


@dataclass(frozen=True)
class Fisher(Allocator):
    """Palu's rule (arXiv:2407.21118), also ReCalKV's (arXiv:2505.24357): W_K and W_V get ranks in proportion to their Fisher information.

    What would pass the head dim goes to the others in proportion; the published code hands it out one rank at a time to all alike. That
    code also rounds ranks to the nearest multiple of 32, which may pass the budget; here the candidates say what ranks there are, and
    steps are taken while they fit. With evenly spaced candidates more bytes never buy fewer ranks in total.
    """

    summary: ClassVar[str] = "ranks of keys and of values in proportion to Fisher information"
    measured: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("fisher",)

    def under_error(self, profile: Profile, error: float) -> Ranks:
        return fewest(self.under_bytes, profile, error)

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        shares = [x for pair in profile.signal("fisher") for x in pair]
        if not any(shares):
            raise LowkeyError("signal 'fisher' is 0 everywhere: there is nothing to split in proportion to; use another text or allocator")

        def split(room: int) -> Ranks:
            chosen = settled(filled(shares, room, profile.served[0], profile.served[-1]), room, profile.served)
            return list(zip(chosen[::2], chosen[1::2], strict=True))

        return most(split, profile, limit)


@dataclass(frozen=True)
class Depth(Allocator):
    """Ranks on a straight line in depth, most in the first layer: `condition` without its condition numbers, to tell what these add.

    The first layer has d_max and the last d_min, and keys and values of a layer the same. d_max is the head dim and d_min what the
    budget leaves; where even the smallest candidate as d_min costs too much, d_max is lowered. Rounded down to candidates; the steps that
    still fit go to the layers furthest below their place on the line.
    """

    summary: ClassVar[str] = "ranks on a straight line in depth, most in the first layer"
    measured: ClassVar[bool] = False

    def under_error(self, profile: Profile, error: float) -> Ranks:
        return fewest(self.under_bytes, profile, error)

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        heights = normalised(self.sensitivity(profile))

        def split(room: int) -> Ranks:
            targets = self._targets(heights, room // 2, profile.served[0], profile.served[-1])
            return [(r, r) for r in settled(targets, room // 2, profile.served)]

        return most(split, profile, limit)

    def sensitivity(self, profile: Profile) -> list[float]:
        return [float(-i) for i in range(profile.layers)]

    def _targets(self, heights: list[float], room: int, low: int, high: int) -> list[float]:
        """d_min + height (d_max - d_min) per layer, with the d_min, or else d_max, that makes them add up to `room`."""
        n, total = len(heights), sum(heights)
        if room <= n * low + total * (high - low):
            return [low + h * (room - n * low) / total for h in heights]
        return [high - (1 - h) * (n * high - room) / (n - total) for h in heights]


@dataclass(frozen=True)
class Condition(Depth):
    """LoRC's rule (arXiv:2410.03111): the log of the condition numbers of W_K and W_V, summed from a layer to the last, min-max normalised
    over layers and mapped linearly to [d_min, d_max]: the more sensitive, and so the shallower, the more ranks.

    The mapping is written from memory of the paper. Its d_min and d_max are not known to us: see `Depth` for how the budget sets them. Nor
    are the units of the sensitivity above which it leaves layers alone, so no layer is exempt. W_K and W_V of a layer share one rank.
    """

    summary: ClassVar[str] = "ranks by condition numbers accumulated from a layer to the last"
    needs: ClassVar[tuple[str, ...]] = ("condition",)

    def sensitivity(self, profile: Profile) -> list[float]:
        logs = [sum(pair) for pair in profile.signal("condition")]
        return [sum(logs[i:]) for i in range(len(logs))]


ALLOCATORS: dict[str, Callable[..., Allocator]] = {
    "uniform": Uniform,
    "pareto": Pareto,
    "weighted-pareto": WeightedPareto,
    "greedy": Greedy,
    "threshold": Threshold,
    "tail": Tail,
    "spectrum": Spectrum,
    "fisher": Fisher,
    "condition": Condition,
    "depth": Depth,
}
