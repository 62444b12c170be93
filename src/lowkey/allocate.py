"""Splitting one budget over layers, and over keys and values. Any basis works with any allocator."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

from lowkey.options import Checked, option
from lowkey.types import LowkeyError

Pair = tuple[int, int]
Ranks = list[Pair]
Step = tuple[float, int, Pair]  # error added per byte freed, layer, its new ranks


@dataclass(frozen=True)
class Profile:
    """What a fitted basis costs. surface[l][i][j] is the error of layer l at (ranks_k[i], ranks_v[j]); the largest rank is
    the full head dim. spectra: per layer the energies of keys and of values, (heads, d) as nested lists, for `threshold`.
    signals: by name, per layer a number for keys and one for values, as `lowkey.sensitivity` measures them."""

    ranks: tuple[int, ...]
    surface: list[list[list[float]]]
    heads: int
    itemsize: int
    spectra: list[tuple[list[list[float]], list[list[float]]]]
    signals: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def error(self, layer: int, pair: Pair) -> float:
        return self.surface[layer][self.ranks.index(pair[0])][self.ranks.index(pair[1])]

    def pairs(self) -> list[Pair]:
        return [(k, v) for k in self.ranks for v in self.ranks]

    @property
    def layers(self) -> int:
        return len(self.surface)

    def bytes(self, ranks: Ranks) -> int:
        return sum(k + v for k, v in ranks) * self.heads * self.itemsize

    def room(self, limit: float) -> int:
        """How many ranks, summed over layers, keys and values, `limit` bytes per token hold."""
        least = self.bytes([(self.ranks[0],) * 2] * self.layers)
        if limit < least:
            raise too_small(self, limit, least)
        return int(min(limit, self.bytes([(self.ranks[-1],) * 2] * self.layers)) // (self.heads * self.itemsize))

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


class Allocator(Protocol):
    """Chooses a pair of ranks per layer, either under an error budget or under a byte budget."""

    summary: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]  # names of the signals it reads

    def under_error(self, profile: Profile, error: float) -> Ranks:
        """The fewest bytes whose (weighted) layer errors stay within `error`."""
        ...

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        """The smallest error that this rule reaches within `limit` bytes per token."""
        ...


def tightest(rule: Callable[[Profile, float], Ranks], profile: Profile, limit: float) -> Ranks:
    """Run an error-budget rule under a byte budget: bisect for the smallest error budget that fits."""
    low, high = 0.0, 2 * max(max(map(max, layer)) for layer in profile.surface) + 1e-9
    best = rule(profile, high * 8)
    if profile.bytes(best) > limit:
        raise too_small(profile, limit, profile.bytes(best))
    for _ in range(60):
        middle = (low + high) / 2
        ranks = rule(profile, middle)
        low, high, best = (low, middle, ranks) if profile.bytes(ranks) <= limit else (middle, high, best)
    return best


def fewest(rule: Callable[[Profile, float], Ranks], profile: Profile, error: float) -> Ranks:
    """Run a byte-budget rule under an error budget: bisect for the fewest bytes whose largest layer error is within `error`.

    Full rank where none is. The errors of such a rule may rise a little with the bytes, and then a smaller budget may fit too.
    """
    unit = profile.heads * profile.itemsize
    low, high = (2 * profile.layers * r for r in (profile.ranks[0], profile.ranks[-1]))
    while low < high:
        middle = (low + high) // 2
        fits = all(profile.error(i, pair) <= error for i, pair in enumerate(rule(profile, middle * unit)))
        low, high = (low, middle) if fits else (middle + 1, high)
    return rule(profile, high * unit)


def filled(shares: list[float], total: float, low: float, high: float) -> list[float]:
    """Numbers in proportion to `shares`, but none below `low` or above `high`, that add up to `total` (water-filling).

    Shares below 1e-12 of the largest count as that, so that every total from n low to n high can be reached.
    """
    floors = [max(s / max(shares), 1e-12) for s in shares]

    def at(level: float) -> list[float]:
        return [min(max(level * s, low), high) for s in floors]

    bends = sorted({0.0, *(edge / s for s in floors for edge in (low, high))})  # the sum is linear in the level in between
    i = bisect_left(bends, total, key=lambda level: sum(at(level)))
    if i in (0, len(bends)):
        return at(bends[min(i, len(bends) - 1)])
    before, after = (sum(at(level)) for level in bends[i - 1 : i + 1])
    return at(bends[i - 1] + (bends[i] - bends[i - 1]) * (total - before) / (after - before))


def settled(targets: list[float], total: int, ranks: tuple[int, ...]) -> list[int]:
    """Candidate ranks near the targets: each rounded down, then one step up at a time for the one furthest below its target,
    while a step still fits within `total`. The targets lie within the candidates and add up to no more than `total`."""
    steps = [max(i for i, r in enumerate(ranks) if r <= t + 1e-6) for t in targets]
    room = total - sum(ranks[i] for i in steps)
    while True:
        open_ = [j for j, i in enumerate(steps) if i + 1 < len(ranks) and ranks[i + 1] - ranks[i] <= room]
        if not open_:
            return [ranks[i] for i in steps]
        j = max(open_, key=lambda j: targets[j] - ranks[steps[j]])
        room -= ranks[steps[j] + 1] - ranks[steps[j]]
        steps[j] += 1


def too_small(profile: Profile, limit: float, reached: int) -> LowkeyError:
    full = profile.bytes([(profile.ranks[-1],) * 2] * profile.layers)
    return LowkeyError(
        f"budget of {limit:.0f} bytes per token ({100 * limit / full:.1f}%) is below {reached} ({100 * reached / full:.1f}%), "
        "the least these candidate ranks allow; raise the budget or lower --rank-multiple"
    )


@dataclass(frozen=True)
class Uniform(Checked):
    """The same pair in every layer, the one with the smallest mean error."""

    summary: ClassVar[str] = "the same ranks in every layer"
    needs: ClassVar[tuple[str, ...]] = ()

    def under_error(self, profile: Profile, error: float) -> Ranks:
        fitting = [p for p in profile.pairs() if self._mean(profile, p) <= error]
        return [min(fitting, key=lambda p: (sum(p), self._mean(profile, p)), default=profile.pairs()[-1])] * profile.layers

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        fitting = [p for p in profile.pairs() if profile.bytes([p] * profile.layers) <= limit]
        if not fitting:
            raise too_small(profile, limit, profile.bytes([profile.pairs()[0]] * profile.layers))
        return [min(fitting, key=lambda p: (self._mean(profile, p), sum(p)))] * profile.layers

    def _mean(self, profile: Profile, pair: Pair) -> float:
        return sum(profile.error(i, pair) for i in range(profile.layers)) / profile.layers


@dataclass(frozen=True)
class Pareto(Checked):
    """Per layer the cheapest pair within the error budget (arXiv:2601.21686, section 3.5); full rank where none is."""

    summary: ClassVar[str] = "per layer the cheapest ranks within one error budget"
    needs: ClassVar[tuple[str, ...]] = ()

    def weights(self, layers: int) -> list[float]:
        return [1.0] * layers

    def under_error(self, profile: Profile, error: float) -> Ranks:
        weights = self.weights(profile.layers)
        return [self._cheapest(profile, i, error / w) for i, w in enumerate(weights)]

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        return tightest(self.under_error, profile, limit)

    def _cheapest(self, profile: Profile, layer: int, error: float) -> Pair:
        fitting = [p for p in profile.pairs() if profile.error(layer, p) <= error]
        return min(fitting, key=lambda p: (sum(p), profile.error(layer, p)), default=profile.pairs()[-1])


@dataclass(frozen=True)
class WeightedPareto(Pareto):
    """The paper's default: the error budget of the first and last four layers is divided by 2, 1.75, 1.5, 1.25."""

    summary: ClassVar[str] = "as pareto, stricter for the first and last four layers"
    needs: ClassVar[tuple[str, ...]] = ()

    def weights(self, layers: int) -> list[float]:
        edge = {0: 2.0, 1: 1.75, 2: 1.5, 3: 1.25}
        raw = [max(edge.get(i, 1.0), edge.get(layers - 1 - i, 1.0)) for i in range(layers)]
        return [w * layers / sum(raw) for w in raw]


@dataclass(frozen=True)
class Greedy(Checked):
    """From full rank, again and again the step (layer, keys or values) that adds the least error per byte freed.

    Our reading of the sequential allocation under a byte budget that arXiv:2601.21686 v2 announces in its abstract.
    """

    summary: ClassVar[str] = "from full rank, the step of least error per byte, until the budget is met"
    needs: ClassVar[tuple[str, ...]] = ()

    def under_error(self, profile: Profile, error: float) -> Ranks:
        ranks = [profile.pairs()[-1]] * profile.layers
        while steps := [s for s in self._steps(profile, ranks) if profile.error(s[1], s[2]) <= error]:
            ranks = _replaced(ranks, min(steps))
        return ranks

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        ranks = [profile.pairs()[-1]] * profile.layers
        while profile.bytes(ranks) > limit:
            steps = self._steps(profile, ranks)
            if not steps:
                raise too_small(profile, limit, profile.bytes(ranks))
            ranks = _replaced(ranks, min(steps))
        return ranks

    def _steps(self, profile: Profile, ranks: Ranks) -> list[Step]:
        return [(self._cost(profile, i, pair, new), i, new) for i, pair in enumerate(ranks) for new in self._below(profile, pair)]

    def _below(self, profile: Profile, pair: Pair) -> list[Pair]:
        k, v = (profile.ranks.index(r) for r in pair)
        lower_k = [(profile.ranks[k - 1], pair[1])] if k else []
        return lower_k + ([(pair[0], profile.ranks[v - 1])] if v else [])

    def _cost(self, profile: Profile, layer: int, pair: Pair, new: Pair) -> float:
        return (profile.error(layer, new) - profile.error(layer, pair)) / (sum(pair) - sum(new))


def _replaced(ranks: Ranks, step: Step) -> Ranks:
    return [step[2] if i == step[1] else pair for i, pair in enumerate(ranks)]


@dataclass(frozen=True)
class Threshold(Checked):
    """EigenAttention's rule (arXiv:2408.05646): one energy threshold for keys and values per layer, lowered by `step` while the
    layer's error stays within budget; a layer takes the largest rank over its heads.

    energy: `squared` as in the paper, or `singular`, sums of singular values, as the official code has it.
    """

    summary: ClassVar[str] = "per layer an energy threshold, lowered while the layer's error fits"
    needs: ClassVar[tuple[str, ...]] = ()

    step: float = option(0.02, above=0, at_most=1)
    energy: Literal["squared", "singular"] = "squared"

    def under_error(self, profile: Profile, error: float) -> Ranks:
        return [self._layer(profile, i, error) for i in range(profile.layers)]

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        return tightest(self.under_error, profile, limit)

    def _layer(self, profile: Profile, layer: int, error: float) -> Pair:
        if not all(spectrum for side in profile.spectra[layer] for spectrum in side):
            raise LowkeyError("allocator 'threshold': this method's bases have no energy spectrum; choose another allocator")
        best, threshold = profile.pairs()[-1], 1.0
        while threshold > 0:
            keys, values = profile.spectra[layer]
            pair = (self._largest(profile, keys, threshold), self._largest(profile, values, threshold))
            if profile.error(layer, pair) > error:
                break
            best, threshold = pair, threshold - self.step
        return best

    def _largest(self, profile: Profile, heads: list[list[float]], threshold: float) -> int:
        return max(self._rank(profile, spectrum, threshold) for spectrum in heads)

    def _rank(self, profile: Profile, spectrum: list[float], threshold: float) -> int:
        """The smallest candidate that holds this share of the energy."""
        energy = [e**0.5 if self.energy == "singular" else e for e in spectrum]
        wanted = threshold * sum(energy)
        return next((r for r in profile.ranks if sum(energy[:r]) >= wanted * (1 - 1e-12)), profile.ranks[-1])


@dataclass(frozen=True)
class Fisher(Checked):
    """Palu's rule (arXiv:2407.21118), also ReCalKV's (arXiv:2505.24357): W_K and W_V get ranks in proportion to their Fisher information.

    What would pass the head dim goes to the others in proportion; the published code hands it out one rank at a time to all alike. That
    code also rounds ranks to the nearest multiple of 32, which may pass the budget; here the candidates say what ranks there are, and
    steps are taken while they fit. With evenly spaced candidates more bytes never buy fewer ranks in total.
    """

    summary: ClassVar[str] = "ranks of keys and of values in proportion to Fisher information"
    needs: ClassVar[tuple[str, ...]] = ("fisher",)

    def under_error(self, profile: Profile, error: float) -> Ranks:
        return fewest(self.under_bytes, profile, error)

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        shares, room = [x for pair in profile.signal("fisher") for x in pair], profile.room(limit)
        if not any(shares):
            raise LowkeyError("signal 'fisher' is 0 everywhere: there is nothing to split in proportion to; use another text or allocator")
        chosen = settled(filled(shares, room, profile.ranks[0], profile.ranks[-1]), room, profile.ranks)
        return list(zip(chosen[::2], chosen[1::2], strict=True))


@dataclass(frozen=True)
class Depth(Checked):
    """Ranks on a straight line in depth, most in the first layer: `condition` without its condition numbers, to tell what these add.

    The first layer has d_max and the last d_min, and keys and values of a layer the same. d_max is the head dim and d_min what the
    budget leaves; where even the smallest candidate as d_min costs too much, d_max is lowered. Rounded down to candidates; the steps that
    still fit go to the layers furthest below their place on the line.
    """

    summary: ClassVar[str] = "ranks on a straight line in depth, most in the first layer"
    needs: ClassVar[tuple[str, ...]] = ()

    def under_error(self, profile: Profile, error: float) -> Ranks:
        return fewest(self.under_bytes, profile, error)

    def under_bytes(self, profile: Profile, limit: float) -> Ranks:
        room = profile.room(limit) // 2
        targets = self._targets(normalised(self.sensitivity(profile)), room, profile.ranks[0], profile.ranks[-1])
        return [(r, r) for r in settled(targets, room, profile.ranks)]

    def sensitivity(self, profile: Profile) -> list[float]:
        return [float(-i) for i in range(profile.layers)]

    def _targets(self, heights: list[float], room: int, low: int, high: int) -> list[float]:
        """d_min + height (d_max - d_min) per layer, with the d_min, or else d_max, that makes them add up to `room`."""
        n, total = len(heights), sum(heights)
        if room <= n * low + total * (high - low):
            return [low + h * (room - n * low) / total for h in heights]
        return [high - (1 - h) * (n * high - room) / (n - total) for h in heights]


def normalised(numbers: list[float]) -> list[float]:
    """From 0 for the smallest to 1 for the largest; all 1 when they are equal."""
    low, high = min(numbers), max(numbers)
    return [(x - low) / (high - low) if high > low else 1.0 for x in numbers]


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
    "fisher": Fisher,
    "condition": Condition,
    "depth": Depth,
}
