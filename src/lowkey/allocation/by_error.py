"""Allocators that compare measured errors of layers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from lowkey.allocation.base import RankAllocator, loosest_error_budget, search_error_budget
from lowkey.allocation.profile import Pair, Profile, Ranks, budget_too_small

RankStep = tuple[float, int, Pair]  # error added per byte freed, layer, the layer's new ranks


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
    def uses_measured_errors(self) -> bool:
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

        def allowed(step: RankStep) -> bool:
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
        allowed: Callable[[RankStep], bool],
    ) -> Ranks:
        """Lower the ranks from full rank among `choices`, while `unfinished(ranks)` and a step is allowed."""
        ranks = [profile.full_pair] * profile.layer_count
        steps = [self._steps(profile, choices, i, pair) for i, pair in enumerate(ranks)]
        # `min` compares errors per byte first, then layers: of equal steps, the earlier layer.
        while unfinished(ranks) and (fitting := [s for layer in steps for s in layer if allowed(s)]):
            _, i, ranks[i] = min(fitting)
            steps[i] = self._steps(profile, choices, i, ranks[i])
        return ranks

    def _steps(self, profile: Profile, choices: Sequence[int], layer: int, pair: Pair) -> list[RankStep]:
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
