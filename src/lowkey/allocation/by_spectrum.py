"""Allocators that read the energy spectra of bases: how much each further rank would keep."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, count, takewhile
from typing import ClassVar, Literal

from lowkey.allocation.base import RankAllocator, loosest_error_budget, search_error_budget
from lowkey.allocation.profile import Pair, Profile, Ranks, Spectra, budget_too_small
from lowkey.core.options import option

Energy = Literal["squared", "singular"]
# How many selectable ranks `Spectrum` looks ahead. Packed latents grow in jumps, so one rank more may cost as
# many bytes as eight ranks more.
RANKS_AHEAD = (1, 2, 4, 8)


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
    uses_measured_errors = False

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
    uses_measured_errors = False

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
    uses_measured_errors = False

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
