"""The rules that split one budget of ranks over layers, keys and values.

Any rule works with any basis, except that `threshold`, `tail` and `spectrum` read energies, which not all
bases have.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, count, takewhile
from typing import ClassVar, Literal

from lowkey.allocation.base import (
    RankAllocator,
    loosest_error_budget,
    search_byte_budget,
    search_error_budget,
    search_rank_count,
)
from lowkey.allocation.filling import fill_proportionally, min_max_normalised, round_to_ranks
from lowkey.allocation.profile import Pair, Profile, Ranks, Spectra, budget_too_small
from lowkey.core.errors import LowkeyError
from lowkey.core.options import option

Energy = Literal["squared", "singular"]
FrontierStep = tuple[float, int, Pair]  # error added per byte freed, layer, the layer's new ranks
# How many selectable ranks `Spectrum` looks ahead. Packed latents grow in jumps, so one rank more may cost as
# many bytes as eight ranks more.
RANKS_AHEAD = (1, 2, 4, 8)


@dataclass(frozen=True)
class UniformRanks(RankAllocator):
    """Uniform allocation: the same pair of ranks in every layer.

    Args:
        split: `equal` (default) gives keys and values the same rank, the largest that fits, and needs no
            measured error. `measured` takes the measured pair with the smallest mean error, or under an error
            budget the cheapest pair.
    """

    summary: ClassVar[str] = "the same ranks in every layer"

    split: Literal["equal", "measured"] = "equal"

    @property
    def uses_measured_errors(self) -> bool:  # type: ignore[override]
        """True for `split=measured`."""
        return self.split == "measured"

    def under_error(self, profile: Profile, error: float) -> Ranks:
        """Return the cheapest pair with which every layer is within the error budget."""
        pairs = [p for p in profile.measured_pairs() if self.split == "measured" or p[0] == p[1]]
        fitting = [p for p in pairs if self.bounded_value(profile, [p] * profile.layer_count) <= error]
        # Of pairs with equally many ranks, the one with the smaller error.
        cheapest = min(
            fitting, key=lambda p: (sum(p), self._mean_error(profile, p)), default=profile.full_pair
        )
        return [cheapest] * profile.layer_count

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        """Return the best pair that fits in all layers."""
        if self.split == "measured":
            pairs = profile.measured_pairs()
        else:
            pairs = [(r, r) for r in profile.selectable_ranks]
        fitting = [p for p in pairs if profile.bytes_per_token([p] * profile.layer_count) <= limit]
        if not fitting:
            smallest = profile.bytes_per_token([pairs[0]] * profile.layer_count)
            raise budget_too_small(profile, limit, smallest)
        if self.split == "measured":
            # Of pairs with equal errors, the cheaper one.
            best = min(fitting, key=lambda p: (self._mean_error(profile, p), sum(p)))
        else:
            best = fitting[-1]
        return [best] * profile.layer_count

    def _mean_error(self, profile: Profile, pair: Pair) -> float:
        return sum(profile.error(i, pair) for i in range(profile.layer_count)) / profile.layer_count


@dataclass(frozen=True)
class Pareto(RankAllocator):
    """StiefAttention's Pareto allocation: per layer the cheapest measured pair within one error budget.

    A layer in which no measured pair is within the budget keeps full rank. Under a byte budget the error
    budget is the smallest one whose ranks fit.

    Source: arXiv:2601.21686, section 3.5.
    """

    summary: ClassVar[str] = "per layer the cheapest ranks within one error budget"

    def weights(self, layers: int) -> list[float]:
        """Return one weight per layer; a layer's error budget is divided by its weight."""
        return [1.0] * layers

    def under_error(self, profile: Profile, error: float) -> Ranks:
        """Return, per layer, the cheapest measured pair within its error budget."""
        weights = self.weights(profile.layer_count)
        return [self._cheapest(profile, i, error / w) for i, w in enumerate(weights)]

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        """Return the ranks at the smallest error budget that fits."""
        return search_error_budget(self.under_error, profile, limit, loosest_error_budget(profile))

    def bounded_value(self, profile: Profile, ranks: Ranks) -> float:
        """Return the largest error of a layer times its weight."""
        weights = self.weights(profile.layer_count)
        return max(w * profile.error(i, pair) for i, (w, pair) in enumerate(zip(weights, ranks, strict=True)))

    def _cheapest(self, profile: Profile, layer: int, error: float) -> Pair:
        fitting = [p for p in profile.measured_pairs() if profile.error(layer, p) <= error]
        return min(fitting, key=lambda p: (sum(p), profile.error(layer, p)), default=profile.full_pair)


@dataclass(frozen=True)
class WeightedPareto(Pareto):
    """StiefAttention's default allocation: `pareto` with stricter budgets for the first and last four layers.

    The raw weights are 2, 1.75, 1.5, 1.25 from either end and 1 in between. They are divided by their mean,
    so layers in between may err by more than the error budget, and layers at the ends by less.

    Source: arXiv:2601.21686, section 3.5.
    """

    summary: ClassVar[str] = "as pareto, stricter for the first and last four layers"
    bounds: ClassVar[str] = (
        "the largest error of a layer times its weight (2, 1.75, 1.5, 1.25 from either end, else 1, over "
        "their mean)"
    )

    def weights(self, layers: int) -> list[float]:
        """Return 2, 1.75, 1.5, 1.25 from either end, else 1, over their mean."""
        by_distance = {0: 2.0, 1: 1.75, 2: 1.5, 3: 1.25}
        # A layer near both ends of a short model takes the larger weight.
        raw = [max(by_distance.get(i, 1.0), by_distance.get(layers - 1 - i, 1.0)) for i in range(layers)]
        return [w * layers / sum(raw) for w in raw]


@dataclass(frozen=True)
class Greedy(RankAllocator):
    """Greedy allocation: from full rank, take the step that adds the least error per byte freed, repeatedly.

    A step lowers the rank of one layer's keys or values. Under a byte budget a step leads to the next lower
    selectable rank that takes fewer bytes, and its error is interpolated if it was not measured. An error
    budget must hold, so under one a step leads to the next lower measured rank.

    This is our reading of the sequential allocation under a byte budget that the abstract of arXiv:2601.21686
    v2 announces.
    """

    summary: ClassVar[str] = "from full rank, the step of least error per byte, until the budget is met"

    def under_error(self, profile: Profile, error: float) -> Ranks:
        """Take steps as long as one of them keeps its layer within the error budget."""

        def allowed(step: FrontierStep) -> bool:
            return profile.error(step[1], step[2]) <= error

        return self._lower_step_by_step(profile, profile.ranks, lambda ranks: True, allowed)

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        """Take steps until the bytes fit."""

        def too_large(ranks: Ranks) -> bool:
            return profile.bytes_per_token(ranks) > limit

        # Below the smallest measured rank there is no error to interpolate.
        choices = [r for r in profile.selectable_ranks if r >= profile.ranks[0]]
        ranks = self._lower_step_by_step(profile, choices, too_large, lambda step: True)
        if too_large(ranks):
            raise budget_too_small(profile, limit, profile.bytes_per_token(ranks))
        return ranks

    def _lower_step_by_step(
        self,
        profile: Profile,
        choices: Sequence[int],
        unfinished: Callable[[Ranks], bool],
        allowed: Callable[[FrontierStep], bool],
    ) -> Ranks:
        """Lower the ranks from full rank among `choices`, while `unfinished(ranks)` and a step is allowed."""
        ranks = [profile.full_pair] * profile.layer_count
        steps = [self._steps(profile, choices, i, pair) for i, pair in enumerate(ranks)]
        # `min` compares errors per byte first, then layers: of equal steps, the earlier layer.
        while unfinished(ranks) and (fitting := [s for layer in steps for s in layer if allowed(s)]):
            _, i, ranks[i] = min(fitting)
            steps[i] = self._steps(profile, choices, i, ranks[i])
        return ranks

    def _steps(self, profile: Profile, choices: Sequence[int], layer: int, pair: Pair) -> list[FrontierStep]:
        """Return the steps that a layer can take: at most one for its keys and one for its values."""
        steps = []
        for side, rank in enumerate(pair):
            lower = self._next_lower(profile, choices, side, rank)
            if lower is not None:
                new = (lower, pair[1]) if side == 0 else (pair[0], lower)
                # Both numbers are of one layer; all other layers stay as they are.
                added = profile.error(layer, new) - profile.error(layer, pair)
                freed = profile.bytes_per_token([pair]) - profile.bytes_per_token([new])
                steps.append((added / freed, layer, new))
        return steps

    def _next_lower(self, profile: Profile, choices: Sequence[int], side: int, rank: int) -> int | None:
        """Return the next lower rank that takes fewer bytes; packed latents grow in jumps."""
        now = profile.side_bytes(side, rank)
        lower = reversed(choices[: bisect_left(choices, rank)])
        return next((r for r in lower if profile.side_bytes(side, r) < now), None)


def cumulative_shares(spectrum: Sequence[float], energy: Energy) -> list[float]:
    """Return the share of a head's energy in its first 0, 1, 2, ... directions.

    Args:
        spectrum: energies (squared singular values), largest first.
        energy: `squared` sums the energies, `singular` their square roots.

    Returns:
        Shares from 0 to 1, one more than the spectrum has entries. All are 1 if there is no energy.
    """
    sums = list(accumulate((e**0.5 if energy == "singular" else e for e in spectrum), initial=0.0))
    return [s / sums[-1] if sums[-1] else 1.0 for s in sums]


@dataclass(frozen=True)
class Threshold(RankAllocator):
    """EigenAttention's allocation: per layer one energy threshold, lowered while the layer's error fits.

    Keys and values of a layer share the threshold. It starts at 1 and falls by `step` until the layer's error
    exceeds the error budget. At a threshold, each side takes the smallest rank that holds this share of the
    energy in every head. The layer's error is measured at exactly these ranks. If not every rank may be
    chosen (trained bases, whole heads, a rank multiple), the next larger selectable rank is taken.

    Source: arXiv:2408.05646.

    Args:
        step: by how much the threshold falls, from 1e-4 to 1 (default 0.02, the paper's).
        energy: `squared` (default) sums energies as in the paper. `singular` sums singular values, as the
            official code does.
    """

    summary: ClassVar[str] = "per layer an energy threshold, lowered while the layer's error fits"
    uses_measured_errors: ClassVar[bool] = False

    step: float = option(0.02, at_least=1e-4, at_most=1)
    energy: Energy = "squared"

    def under_error(self, profile: Profile, error: float) -> Ranks:
        """Return, per layer, the ranks at the last threshold before its error exceeds the budget."""
        return self._last_fitting(profile, self.extra_pairs(profile), error)

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        """Return the ranks at the smallest error budget that fits."""
        # The thresholds do not depend on the error budget, so their ranks are computed once.
        paths = self.extra_pairs(profile)

        def rule(profile: Profile, error: float) -> Ranks:
            return self._last_fitting(profile, paths, error)

        return search_error_budget(rule, profile, limit, loosest_error_budget(profile))

    def _last_fitting(self, profile: Profile, paths: list[list[Pair]], error: float) -> Ranks:
        """Return, per layer, the last pair of its path before the first one whose error exceeds `error`."""
        ranks = [profile.full_pair] * profile.layer_count
        for i, path in enumerate(paths):
            for pair in path:
                if profile.error(i, pair) > error:
                    break
                ranks[i] = pair
        return ranks

    def extra_pairs(self, profile: Profile) -> list[list[Pair]]:
        """Return, per layer, the pairs of ranks at the thresholds 1, 1 - step, 1 - 2 step, ... above 0."""
        # Counting down from 1 by subtraction would accumulate rounding errors.
        thresholds = list(takewhile(lambda share: share > 1e-9, (1 - n * self.step for n in count())))
        return [self._path(profile, i, thresholds) for i in range(profile.layer_count)]

    def _path(self, profile: Profile, layer: int, thresholds: list[float]) -> list[Pair]:
        keys, values = (
            [cumulative_shares(head, self.energy) for head in side]
            for side in profile.layer_spectra(layer, "threshold")
        )

        def rank_at(heads: list[list[float]], share: float) -> int:
            # The factor keeps a share that is met up to rounding from taking one direction more.
            rank = max(bisect_left(head, share * (1 - 1e-12)) for head in heads)
            return profile.selectable_ranks[bisect_left(profile.selectable_ranks, rank)]

        return [(rank_at(keys, share), rank_at(values, share)) for share in thresholds]


@dataclass(frozen=True)
class Tail(RankAllocator):
    """KQ-SVD's allocation: the smallest rank whose tail of the spectrum is small, keys and values apart.

    The tail is the share of the spectrum beyond the rank, averaged over heads. It must be at most the square
    of the error budget. No measured error of a layer is compared.

    Source: arXiv:2512.05916.

    Args:
        energy: `singular` (default) takes the tail of singular values, as the paper's code does: there they
            are those of the products K Q^T and V W_O. `squared` takes the tail of their squares. The spectra
            of other methods are those of keys and of values alone.
    """

    summary: ClassVar[str] = (
        "per layer, keys and values apart, the least rank whose tail of the spectrum is small"
    )
    bounds: ClassVar[str] = (
        "the root of the largest tail (share of the spectrum beyond the rank, mean over heads) of a layer's "
        "keys or values"
    )
    uses_measured_errors: ClassVar[bool] = False

    energy: Energy = "singular"

    def under_error(self, profile: Profile, error: float) -> Ranks:
        """Return the smallest ranks whose tails are at most the square of the error budget."""
        return self._smallest(profile, self._tails(profile), error)

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        """Return the ranks at the smallest error budget that fits."""
        tails = self._tails(profile)
        # A tail is a share, so an error budget of 1 allows every rank.
        return search_error_budget(lambda p, error: self._smallest(p, tails, error), profile, limit, 1.0)

    def bounded_value(self, profile: Profile, ranks: Ranks) -> float:
        """Return the root of the largest tail of a layer's keys or values."""
        tails = self._tails(profile)
        return max(tails[i][side][pair[side]] for i, pair in enumerate(ranks) for side in (0, 1)) ** 0.5

    def _smallest(self, profile: Profile, tails: list[tuple[list[float], ...]], error: float) -> Ranks:
        ranks = profile.selectable_ranks

        def smallest(tail: list[float]) -> int:
            return next((r for r in ranks if tail[r] <= error**2), ranks[-1])

        return [(smallest(keys), smallest(values)) for keys, values in tails]

    def _tails(self, profile: Profile) -> list[tuple[list[float], ...]]:
        """Return, per layer, for keys and for values, the tail beyond 0, 1, 2, ... directions."""
        layers = (profile.layer_spectra(i, "tail") for i in range(profile.layer_count))
        return [tuple(self._tail(side) for side in sides) for sides in layers]

    def _tail(self, heads: Spectra) -> list[float]:
        # One tuple per rank: the shares of all heads there.
        shares = zip(*(cumulative_shares(head, self.energy) for head in heads), strict=True)
        return [max(0.0, 1 - sum(kept) / len(heads)) for kept in shares]


@dataclass(frozen=True)
class Spectrum(RankAllocator):
    """Spectrum allocation (ours): keep the largest energies of all layers' spectra, keys and values alike.

    The ranks minimise the sum of the energies beyond them. No error is measured. The energies must have one
    unit in all layers, as those of `fisher-svd` have; those of other methods cannot be compared between
    layers.

    Args:
        floor: under a byte budget no rank is below this share (0 to 1, default 0.75) of the equal rank that
            all sides could have. What a layer does for text unlike the calibration text does not show in its
            energies, so no layer gives up too much.
    """

    summary: ClassVar[str] = "the ranks of the largest energies over all layers, keys and values"
    bounds: ClassVar[str] = "the share of the energies of all spectra together that lies beyond the ranks"
    uses_measured_errors: ClassVar[bool] = False

    floor: float = option(0.75, at_least=0, at_most=1)

    def under_error(self, profile: Profile, error: float) -> Ranks:
        """Raise ranks until the share of energy beyond them is within the error budget."""
        return self._grow(profile, math.inf, error)

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        """Raise ranks as long as a step fits."""
        return self._grow(profile, limit, None)

    def bounded_value(self, profile: Profile, ranks: Ranks) -> float:
        """Return the share of the energy of all spectra together that lies beyond the ranks."""
        tails = self._tails(profile)
        beyond = sum(tail[r] for tail, r in zip(tails, chain(*ranks), strict=True))
        return beyond / (sum(tail[0] for tail in tails) or 1.0)

    def _grow(self, profile: Profile, limit: float, error: float | None) -> Ranks:
        """Raise ranks from the smallest ones, by the step with the most energy per byte that fits.

        Args:
            profile: costs and spectra of every layer.
            limit: bytes of one stored token in all layers together.
            error: stop as soon as `bounded_value` is at most this. None: stop when no step fits.
        """
        ranks, tails = profile.selectable_ranks, self._tails(profile)  # a tail per layer and side, in turn
        costs = [[profile.side_bytes(side, rank) for rank in ranks] for side in (0, 1)]
        equal_costs = [profile.bytes_per_token([(rank, rank)] * profile.layer_count) for rank in ranks]
        if equal_costs[0] > limit:
            raise budget_too_small(profile, limit, equal_costs[0])
        # The largest rank that all sides could have; `floor` is a share of it.
        equal_rank = ranks[bisect_right(equal_costs, limit) - 1] if limit < math.inf else ranks[0]
        start = max(0, bisect_right(ranks, self.floor * equal_rank) - 1)
        chosen, used = [start] * len(tails), equal_costs[start]  # chosen: an index into `ranks` per tail
        while True:
            flat = [ranks[i] for i in chosen]
            pairs = list(zip(flat[::2], flat[1::2], strict=True))
            if error is not None and self.bounded_value(profile, pairs) <= error:
                return pairs
            steps = []
            for j, i in enumerate(chosen):
                for higher in (i + n for n in RANKS_AHEAD if i + n < len(ranks)):
                    cost = costs[j % 2][higher] - costs[j % 2][i]
                    if used + cost <= limit + 1e-6:
                        gain = tails[j][ranks[i]] - tails[j][ranks[higher]]
                        steps.append((gain / max(cost, 1e-9), -cost, j, higher))  # of equal gains the cheaper
            if not steps:
                return pairs
            _, negative_cost, j, chosen[j] = max(steps)
            used -= negative_cost

    def _tails(self, profile: Profile) -> list[list[float]]:
        """Return, for every layer's keys and values in turn, the energy beyond 0, 1, 2, ... directions."""
        sides = (side for i in range(profile.layer_count) for side in profile.layer_spectra(i, "spectrum"))
        tails = []
        for heads in sides:
            by_direction = map(sum, zip(*heads, strict=True))
            # Summed from the small end, so that rounding leaves the tail of full rank at exactly 0.
            tails.append([*accumulate(reversed(list(by_direction)), initial=0.0)][::-1])
        return tails


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
    uses_measured_errors: ClassVar[bool] = False
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
    uses_measured_errors: ClassVar[bool] = False

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


RANK_ALLOCATORS: dict[str, type[RankAllocator]] = {
    "uniform": UniformRanks,
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
