"""Splitting one budget over layers, and over keys and values. Any basis works with any allocator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from lowkey.types import LowkeyError

Pair = tuple[int, int]
Ranks = list[Pair]
Step = tuple[float, int, Pair]  # error added per byte freed, layer, its new ranks


@dataclass(frozen=True)
class Profile:
    """What a fitted basis costs. surface[l][i][j] is the error of layer l at (ranks_k[i], ranks_v[j]); the largest rank is
    the full head dim. spectra: per layer the energies of keys and of values, (heads, d) as nested lists, for `threshold`."""

    ranks: tuple[int, ...]
    surface: list[list[list[float]]]
    heads: int
    itemsize: int
    spectra: list[tuple[list[list[float]], list[list[float]]]]

    def error(self, layer: int, pair: Pair) -> float:
        return self.surface[layer][self.ranks.index(pair[0])][self.ranks.index(pair[1])]

    def pairs(self) -> list[Pair]:
        return [(k, v) for k in self.ranks for v in self.ranks]

    @property
    def layers(self) -> int:
        return len(self.surface)

    def bytes(self, ranks: Ranks) -> int:
        return sum(k + v for k, v in ranks) * self.heads * self.itemsize


class Allocator(Protocol):
    """Chooses a pair of ranks per layer, either under an error budget or under a byte budget."""

    summary: ClassVar[str]

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


def too_small(profile: Profile, limit: float, reached: int) -> LowkeyError:
    full = profile.bytes([(profile.ranks[-1],) * 2] * profile.layers)
    return LowkeyError(
        f"budget of {limit:.0f} bytes per token ({100 * limit / full:.1f}%) is below {reached} ({100 * reached / full:.1f}%), "
        "the least these candidate ranks allow; raise the budget or lower --rank-multiple"
    )


@dataclass(frozen=True)
class Uniform:
    """The same pair in every layer, the one with the smallest mean error."""

    summary: ClassVar[str] = "the same ranks in every layer"

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
class Pareto:
    """Per layer the cheapest pair within the error budget (arXiv:2601.21686, section 3.5); full rank where none is."""

    summary: ClassVar[str] = "per layer the cheapest ranks within one error budget"

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

    def weights(self, layers: int) -> list[float]:
        edge = {0: 2.0, 1: 1.75, 2: 1.5, 3: 1.25}
        raw = [max(edge.get(i, 1.0), edge.get(layers - 1 - i, 1.0)) for i in range(layers)]
        return [w * layers / sum(raw) for w in raw]


@dataclass(frozen=True)
class Greedy:
    """From full rank, again and again the step (layer, keys or values) that adds the least error per byte freed.

    Our reading of the sequential allocation under a byte budget that arXiv:2601.21686 v2 announces in its abstract.
    """

    summary: ClassVar[str] = "from full rank, the step of least error per byte, until the budget is met"

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
class Threshold:
    """EigenAttention's rule (arXiv:2408.05646): one energy threshold for keys and values per layer, lowered by `step` while the
    layer's error stays within budget; a layer takes the largest rank over its heads.

    energy: `squared` as in the paper, or `singular`, sums of singular values, as the official code has it.
    """

    summary: ClassVar[str] = "per layer an energy threshold, lowered while the layer's error fits"

    step: float = 0.02
    energy: str = "squared"

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


ALLOCATORS: dict[str, Callable[..., Allocator]] = {
    "uniform": Uniform,
    "pareto": Pareto,
    "weighted-pareto": WeightedPareto,
    "greedy": Greedy,
    "threshold": Threshold,
}
