"""What fitted bases cost at which ranks: all that a rank allocator knows of a model."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from lowkey.core.errors import LowkeyError

Pair = tuple[int, int]  # ranks (r_K, r_V) of one layer
Ranks = list[Pair]  # one pair per layer
Spectra = list[list[float]]  # energies of a layer's keys or values: (heads, d), largest first


@dataclass(frozen=True)
class Profile:
    """Errors and bytes of every compressible layer at the ranks that its bases serve.

    Args:
        ranks: the measured ranks in ascending order; the last one is the head dim, which is full rank.
        surface: `surface[l][i][j]` is the error of layer l at (r_K, r_V) = (ranks[i], ranks[j]). The entry of
            a layer is empty if nothing was measured on the surface.
        heads: number of KV heads.
        itemsize: bytes of one stored number.
        spectra: per layer the energies of keys and of values, (heads, d) each.
        signals: by name, per layer one number for keys and one for values, as
            `calibration.sensitivity.SIGNALS` measures them.
        choices: every rank that may be chosen, in ascending order, if the bases serve more ranks than were
            measured. Empty means `ranks`.
        extra_points: per layer the errors that were measured at pairs outside the surface.
        bytes_by_rank: bytes of one stored token of a layer's keys, and of its values, at ranks 0, 1, 2, ...
            None means `heads * itemsize` for each rank.
        cache_share: (bytes of the latents of one stored token in all layers) -> the share of the full cache's
            bytes that the whole cache holds with them, exact tokens included. None means their share of the
            bytes at full rank.
    """

    ranks: tuple[int, ...]
    surface: list[list[list[float]]]
    heads: int
    itemsize: int
    spectra: list[tuple[Spectra, Spectra]]
    signals: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    choices: tuple[int, ...] = ()
    extra_points: list[dict[Pair, float]] = field(default_factory=list)
    bytes_by_rank: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    cache_share: Callable[[float], float] | None = None

    def error(self, layer: int, pair: Pair) -> float:
        """Return the error of a layer at a pair of ranks: measured, or interpolated bilinearly."""
        if self.extra_points and pair in self.extra_points[layer]:
            return self.extra_points[layer][pair]
        surface = self.surface[layer]
        (i, a), (j, b) = map(self._locate, pair)
        # Interpolate along values in the two rows of keys around the rank, then between the rows.
        if a:
            low, high = (self._interpolate(row, j, b) for row in surface[i : i + 2])
            return low + a * (high - low)
        return self._interpolate(surface[i], j, b)

    def _locate(self, rank: int) -> tuple[int, float]:
        """Return the index of the measured rank at or below `rank`, and how far it is to the next one."""
        i = min(max(bisect_right(self.ranks, rank) - 1, 0), max(len(self.ranks) - 2, 0))
        if self.ranks[-1] == rank or len(self.ranks) == 1:
            return len(self.ranks) - 1, 0.0
        return i, (rank - self.ranks[i]) / (self.ranks[i + 1] - self.ranks[i])

    def _interpolate(self, row: list[float], j: int, fraction: float) -> float:
        return row[j] + fraction * (row[j + 1] - row[j]) if fraction else row[j]

    def is_measured(self, layer: int, pair: Pair) -> bool:
        """Return whether the error of a layer at a pair was measured, not interpolated."""
        if self.extra_points and pair in self.extra_points[layer]:
            return True
        return bool(self.surface[layer]) and pair[0] in self.ranks and pair[1] in self.ranks

    def measured_pairs(self) -> list[Pair]:
        """Return the pairs of the error surface."""
        return [(k, v) for k in self.ranks for v in self.ranks]

    @property
    def selectable_ranks(self) -> tuple[int, ...]:
        """Every rank that may be chosen, in ascending order."""
        return self.choices or self.ranks

    @property
    def full_pair(self) -> Pair:
        """Full rank for keys and for values."""
        return self.ranks[-1], self.ranks[-1]

    @property
    def layer_count(self) -> int:
        """Number of compressible layers."""
        return len(self.surface)

    def bytes_per_token(self, ranks: Ranks) -> float:
        """Return the bytes that one stored token takes in all layers together."""
        return sum(self.side_bytes(side, rank) for pair in ranks for side, rank in enumerate(pair))

    def side_bytes(self, side: int, rank: int) -> float:
        """Return the bytes that one stored token takes in one layer's keys (side 0) or values (side 1)."""
        if self.bytes_by_rank is None:
            return rank * self.heads * self.itemsize
        return self.bytes_by_rank[side][rank]

    @property
    def smallest_byte_step(self) -> float:
        """The least by which the bytes of one token can grow: the unit in which byte budgets are searched.

        This is the bytes of one rank where all ranks take the same. Packed latents and whole heads grow in
        jumps; then it is the smallest jump between selectable ranks.
        """
        if self.bytes_by_rank is None:
            return self.heads * self.itemsize
        steps = (pairwise(side[r] for r in self.selectable_ranks) for side in self.bytes_by_rank)
        return min(more - less for side in steps for less, more in side if more > less)

    def ranks_within(self, limit: float) -> int:
        """Return how many ranks fit into a byte budget, summed over layers, keys and values.

        This is for profiles in which every rank takes the same bytes (`bytes_by_rank` is None);
        `allocation.base.search_rank_count` is for the others, too.

        Args:
            limit: bytes of one stored token in all layers together.

        Raises:
            LowkeyError: if the smallest rank everywhere takes more than `limit`.
        """
        smallest = self.bytes_per_token([(self.selectable_ranks[0],) * 2] * self.layer_count)
        if limit < smallest:
            raise budget_too_small(self, limit, smallest)
        # 1e-9: a quotient just below a whole number
        return min(2 * self.layer_count * self.full_pair[0], int(limit / self.smallest_byte_step + 1e-9))

    def signal(self, name: str) -> list[tuple[float, float]]:
        """Return a signal by name: per layer one number for keys and one for values.

        Raises:
            LowkeyError: if the signal was not measured for every layer, or is not finite and non-negative.
        """
        signal = self.signals.get(name)
        if signal is None or len(signal) != self.layer_count:
            present = "none" if signal is None else f"one of {len(signal)} layers"
            raise LowkeyError(
                f"profile of {self.layer_count} layers: the allocator needs the signal {name!r} and there is "
                f"{present}; measure it with "
                f"lowkey.calibration.sensitivity.SIGNALS[{name!r}] or choose another allocator"
            )
        wrong = [x for pair in signal for x in pair if not 0 <= x < math.inf]
        if wrong:
            raise LowkeyError(
                f"signal {name!r} holds {wrong[0]}: sensitivities are finite and not negative; check the "
                "model's weights"
            )
        return signal

    def layer_spectra(self, layer: int, allocator: str) -> tuple[Spectra, Spectra]:
        """Return the energies of a layer's keys and of its values.

        Args:
            layer: position of the layer among the compressible ones.
            allocator: name of the allocator that asks, for the error message.

        Raises:
            LowkeyError: if the method's bases have no energy spectrum.
        """
        spectra = self.spectra[layer]
        if not all(head for side in spectra for head in side):
            raise LowkeyError(
                f"allocator {allocator!r}: this method's bases have no energy spectrum; choose "
                "another allocator"
            )
        return spectra


def budget_too_small(profile: Profile, limit: float, smallest: float, otherwise: str = "") -> LowkeyError:
    """Return the error for a byte budget that the smallest ranks exceed.

    Args:
        profile: costs of every layer.
        limit: what the budget leaves to latents, in bytes per token.
        smallest: bytes per token of latents at the smallest ranks.
        otherwise: a second remedy besides a larger budget, as the end of a sentence.
    """
    full = profile.bytes_per_token([profile.full_pair] * profile.layer_count)
    share_of = profile.cache_share or (lambda latents: latents / full)
    if smallest == full:
        rule, remedy = "since here only full rank can be chosen", f"choose another method{otherwise}"
    else:
        percent = math.ceil(1000 * share_of(smallest)) / 10
        rule, remedy = "the least that the ranks allow", f"give a budget of {percent:g}% or more{otherwise}"
    return LowkeyError(
        f"budget of {100 * share_of(limit):.1f}%: {limit:.0f} bytes per token for latents is below "
        f"{smallest:.0f} ({100 * share_of(smallest):.1f}%), {rule}; {remedy}"
    )
