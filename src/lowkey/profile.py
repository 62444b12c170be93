"""What fitted bases cost at which ranks: all that allocators know."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from lowkey.types import LowkeyError

Pair = tuple[int, int]
Ranks = list[Pair]


@dataclass(frozen=True)
class Profile:
    """surface[l][i][j] is the measured error of layer l at (r_K, r_V) = (ranks[i], ranks[j]); the largest rank is the full head dim.

    spectra: per layer the energies of keys and of values, (heads, d) as nested lists, which energy rules read. signals: by name, per
    layer a number for keys and one for values, as `lowkey.sensitivity` measures them. choices: every rank that may be chosen, in
    ascending order, when bases serve more ranks than were measured (`ranks` otherwise). points: per layer what was measured at other
    pairs. sizes: bytes of one stored token of a layer's keys and of its values at ranks 0, 1, 2, ...; `heads * itemsize` per rank when
    None. share: what share of the full cache's bytes the whole cache holds, when its latents take so many per stored token; of those at
    full rank when None. A surface may be empty, when nothing was measured on it.
    """

    ranks: tuple[int, ...]
    surface: list[list[list[float]]]
    heads: int
    itemsize: int
    spectra: list[tuple[list[list[float]], list[list[float]]]]
    signals: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    choices: tuple[int, ...] = ()
    points: list[dict[Pair, float]] = field(default_factory=list)
    sizes: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    share: Callable[[float], float] | None = None

    def error(self, layer: int, pair: Pair) -> float:
        """What was measured; between measured ranks the bilinear interpolation of what was."""
        if self.points and pair in self.points[layer]:
            return self.points[layer][pair]
        surface = self.surface[layer]
        (i, a), (j, b) = map(self._place, pair)
        if a:
            low, high = (self._between(row, j, b) for row in surface[i : i + 2])
            return low + a * (high - low)
        return self._between(surface[i], j, b)

    def _place(self, rank: int) -> tuple[int, float]:
        """Index of the measured rank below (or at) this one, and how far it is on the way to the next."""
        i = min(max(bisect_right(self.ranks, rank) - 1, 0), max(len(self.ranks) - 2, 0))
        if self.ranks[-1] == rank or len(self.ranks) == 1:
            return len(self.ranks) - 1, 0.0
        return i, (rank - self.ranks[i]) / (self.ranks[i + 1] - self.ranks[i])

    def _between(self, row: list[float], j: int, b: float) -> float:
        return row[j] + b * (row[j + 1] - row[j]) if b else row[j]

    def is_measured(self, layer: int, pair: Pair) -> bool:
        if self.points and pair in self.points[layer]:
            return True
        return bool(self.surface[layer]) and pair[0] in self.ranks and pair[1] in self.ranks

    def pairs(self) -> list[Pair]:
        """Of the measured surface."""
        return [(k, v) for k in self.ranks for v in self.ranks]

    @property
    def served(self) -> tuple[int, ...]:
        return self.choices or self.ranks

    @property
    def full(self) -> Pair:
        return self.ranks[-1], self.ranks[-1]

    @property
    def layers(self) -> int:
        return len(self.surface)

    def bytes(self, ranks: Ranks) -> float:
        """Of one more token in all layers together."""
        return sum(self.cost(side, rank) for pair in ranks for side, rank in enumerate(pair))

    def cost(self, side: int, rank: int) -> float:
        """Bytes of one more token of a layer's keys (side 0) or values (1)."""
        return rank * self.heads * self.itemsize if self.sizes is None else self.sizes[side][rank]

    @property
    def unit(self) -> float:
        """What a byte budget is counted in: bytes per token of one rank more, or where ranks differ in that, the least of any."""
        if self.sizes is None:
            return self.heads * self.itemsize
        return min(b - a for side in self.sizes for a, b in pairwise(side[r] for r in self.served) if b > a)

    def room(self, limit: float) -> int:
        """How many ranks, summed over layers, keys and values, `limit` bytes per token hold, where all take the same."""
        least = self.bytes([(self.served[0],) * 2] * self.layers)
        if limit < least:
            raise too_small(self, limit, least)
        full = 2 * self.layers * self.full[0]
        return full if limit >= self.bytes([self.full] * self.layers) else min(full, int(limit / self.unit + 1e-9))

    def signal(self, name: str) -> list[tuple[float, float]]:
        """The numbers of one signal; refused when they were not measured or cannot be what they should be."""
        found = self.signals.get(name)
        if found is None or len(found) != self.layers:
            had = "none" if found is None else f"one of {len(found)} layers"
            raise LowkeyError(
                f"profile of {self.layers} layers: the allocator needs the signal {name!r} and there is {had}; measure it with "
                f"lowkey.sensitivity.SIGNALS[{name!r}] or choose another allocator"
            )
        wrong = [x for pair in found for x in pair if not 0 <= x < math.inf]
        if wrong:
            raise LowkeyError(f"signal {name!r} holds {wrong[0]}: sensitivities are finite and not negative; check the model's weights")
        return found

    def energies(self, layer: int, what: str) -> tuple[list[list[float]], list[list[float]]]:
        """The spectra of a layer's keys and values; refused, on behalf of `what`, where the bases have none."""
        found = self.spectra[layer]
        if not all(spectrum for side in found for spectrum in side):
            raise LowkeyError(f"allocator {what!r}: this method's bases have no energy spectrum; choose another allocator")
        return found


def too_small(profile: Profile, limit: float, reached: float, otherwise: str = "") -> LowkeyError:
    """otherwise: what else than a larger budget can be given."""
    full = profile.bytes([profile.full] * profile.layers)
    asked, least = (profile.share(x) if profile.share else x / full for x in (limit, reached))
    if reached == full:
        rule, remedy = "for here only full rank is served", f"choose another method{otherwise}"
    else:
        rule, remedy = "the least that the ranks allow", f"give a budget of {math.ceil(1000 * least) / 10:g}% or more{otherwise}"
    left = f"{limit:.0f} bytes per token for latents is below {reached:.0f} ({100 * least:.1f}%)"
    return LowkeyError(f"budget of {100 * asked:.1f}%: {left}, {rule}; {remedy}")
