"""Token allocators: how many tokens each layer and each head keeps.

Every allocator gives counts whose sum is exactly the budget, as far as there are that many tokens. (`Blocks`
may stay below it by less than a block, and `AtLeast` has no budget.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from lowkey.core.errors import LowkeyError
from lowkey.core.options import Checked, option
from lowkey.ops.apportion import apportion

Scope = Literal["layer", "cache"]
HeadImportance = Mapping[str, Sequence[Sequence[float]]]
"""Head scores by kind (`copy`, `r2`, ...): one number for every compressed layer and KV head."""


@dataclass(frozen=True)
class KnownBefore:
    """What is known of an eviction of one row of the batch before there are scores.

    Args:
        mean_tokens: the budget: tokens per head, on average over all layers and heads of the cache.
        tokens_seen: number of tokens that the row has read.
        protected: how many of them each head keeps whatever they score.
        layers: number of compressible layers of the cache.
        heads: h, of each layer.
        rows_of_heads: as `AllocationRequest` has it.
    """

    mean_tokens: float
    tokens_seen: int
    protected: int
    layers: int
    heads: int
    rows_of_heads: Sequence[Sequence[int]] | None = None

    def share(self, first: int, layers: int) -> int:
        """Tokens for so many layers from the layer `first` on if all layers get the same.

        Shares are differences of a rounded running total, so that those of all layers add up exactly.
        """
        whole = min(self.mean_tokens, self.tokens_seen) * self.heads * self.layers
        return round(whole * (first + layers) / self.layers) - round(whole * first / self.layers)


@dataclass(frozen=True)
class AllocationRequest:
    """What an allocator is asked for one row of the batch: the scores of some consecutive layers.

    Args:
        scores: (n, h, s) for the n layers in scope. +inf marks tokens that are always kept (sinks and recent
            ones), -inf marks places that hold no token.
        mean_tokens: the budget: tokens per head, on average over all layers and heads of the cache.
        tokens_seen: number of tokens that the row has read.
        first_layer: number of the first layer in scope, among the cache's compressible layers.
        total_layers: number of compressible layers of the cache.
        rows_of_heads: for each layer, which of the h places each KV head shares with others; None if each has
            its own.
        protected: how many tokens a head of any layer always keeps at most, if a layer may have fewer.
    """

    scores: Tensor
    mean_tokens: float
    tokens_seen: int
    first_layer: int
    total_layers: int
    rows_of_heads: Sequence[Sequence[int]] | None = None
    protected: int = 0

    @property
    def minimum(self) -> Tensor:
        """Number of tokens that each head always keeps (n, h)."""
        return self.scores.isposinf().sum(-1).cpu()

    @property
    def maximum(self) -> Tensor:
        """Number of tokens that each head holds (n, h)."""
        return (~self.scores.isneginf()).sum(-1).cpu()

    def share(self) -> int:
        """Tokens for the layers in scope if all layers get the same."""
        return self.known().share(self.first_layer, len(self.scores))

    def known(self) -> KnownBefore:
        """What does not depend on scores, the same for every layer."""
        protected = max(self.protected, int(self.minimum.max()))
        heads = self.scores.shape[1]
        return KnownBefore(
            self.mean_tokens, self.tokens_seen, protected, self.total_layers, heads, self.rows_of_heads
        )


class TokenAllocator(Checked, ABC):
    """Splits a budget over layers and heads.

    Attributes:
        scope: what is decided at once. `layer`: each layer decides as soon as it has its scores, so that a
            long prompt is never held whole. `cache`: the scores of all layers are needed.
        summary: one line for the command line.
        bounded: whether a budget bounds the counts.
        scores_decide: what only scores tell: `nothing`, how many tokens the `heads` of a layer get, or how
            many the `layers` get.
    """

    scope: ClassVar[Scope]
    summary: ClassVar[str]
    bounded: ClassVar[bool] = True
    scores_decide: ClassVar[Literal["nothing", "heads", "layers"]] = "layers"

    def planned(self, known: KnownBefore) -> Tensor | None:
        """Counts (layers, h) that are known before there are scores; None if only scores tell.

        Where scores decide over the heads, the sum of every layer is right and its split over heads is not.
        """
        return None

    @abstractmethod
    def counts(self, request: AllocationRequest) -> Tensor:
        """Number of tokens that each layer in scope and each head keeps (n, h), on the CPU."""

    def with_head_scores(self, heads: HeadImportance) -> Self:
        """A copy that has the head scores it needs; most allocators need none.

        Args:
            heads: head scores by kind.

        Raises:
            LowkeyError: scores of a kind that is needed are missing.
        """
        return self


@dataclass(frozen=True)
class UniformTokens(TokenAllocator):
    """Uniform: every layer and head keeps the same number of tokens."""

    scope: ClassVar[Scope] = "layer"
    summary: ClassVar[str] = "the same for every layer and head"
    scores_decide: ClassVar[Literal["nothing", "heads", "layers"]] = "nothing"

    def planned(self, known: KnownBefore) -> Tensor:
        """Equal counts (layers, h); see `TokenAllocator.planned`."""
        return _equal_counts(known)

    def counts(self, request: AllocationRequest) -> Tensor:
        """Equal counts (n, h); see `TokenAllocator.counts`."""
        return _apportioned(request, torch.ones(request.scores.shape[:2]), request.share())


class PlannedCounts(TokenAllocator):
    """An allocator whose counts are known before there are scores, for every layer and head."""

    scope: ClassVar[Scope] = "layer"
    scores_decide: ClassVar[Literal["nothing", "heads", "layers"]] = "nothing"

    @abstractmethod
    def planned(self, known: KnownBefore) -> Tensor:
        """Counts (layers, h); see `TokenAllocator.planned`."""

    def counts(self, request: AllocationRequest) -> Tensor:
        """Counts (n, h) of the layers in scope as they are planned; see `TokenAllocator.counts`."""
        own = self.planned(request.known())[request.first_layer : request.first_layer + len(request.scores)]
        if bool((own <= request.maximum).all()):
            return own.maximum(request.minimum)
        # After an earlier eviction heads hold fewer tokens than the row has seen: what some of a layer's
        # heads lack goes to its other heads.
        return _apportioned(request, own.double(), int(own.sum()))


@dataclass(frozen=True)
class Pyramid(PlannedCounts):
    """PyramidKV: lower layers keep more. All heads of a layer keep the same number.

    With b the budget per head beyond sinks and recent tokens, layers get from `2b - b/beta` (the first) to
    `b/beta` (the last), in equal steps.

    Args:
        beta: how much is shifted to lower layers; 1 gives all layers the same (default 20, as in the paper).

    Source: arXiv:2406.02069.
    """

    summary: ClassVar[str] = "more for lower layers, on a straight line (arXiv:2406.02069)"

    beta: float = option(20.0, at_least=1, at_most=1e9)

    def planned(self, known: KnownBefore) -> Tensor:
        """Counts (layers, h) that fall from layer to layer; see `TokenAllocator.planned`."""
        b = float(max(0.0, min(known.mean_tokens, known.tokens_seen) - known.protected))
        if known.layers > 1:
            line = torch.linspace(2 * b - b / self.beta, b / self.beta, known.layers)
        else:
            line = torch.tensor([b])
        return _split_over_cache(known, line.unsqueeze(1).expand(-1, known.heads), known.protected)


@dataclass(frozen=True)
class Ada(TokenAllocator):
    """Ada-KV: the heads of a layer compete for the layer's share.

    The layer's best tokens over all its heads, as many as its share, are counted by head. A head gets
    `(1 - alpha) * its count + alpha * the mean count`.

    Args:
        alpha: part that is split equally, a safeguard for heads of low scores (default 0.2).

    Source: arXiv:2407.11550, algorithm 1.
    """

    scope: ClassVar[Scope] = "layer"
    summary: ClassVar[str] = "heads of a layer compete for its tokens (arXiv:2407.11550)"
    scores_decide: ClassVar[Literal["nothing", "heads", "layers"]] = "heads"

    alpha: float = option(0.2, at_least=0, at_most=1)

    def planned(self, known: KnownBefore) -> Tensor | None:
        """Equal counts of layers (layers, h); see `TokenAllocator.planned`."""
        return _equal_counts(known)

    def counts(self, request: AllocationRequest) -> Tensor:
        """Counts (n, h) by the best tokens of the layers in scope; see `TokenAllocator.counts`."""
        total = request.share()
        n, h, s = request.scores.shape
        best = request.scores.flatten().argsort(descending=True, stable=True)[:total]
        number = torch.bincount(best.cpu() // s, minlength=n * h).view(n, h).double()
        return _apportioned(request, (1 - self.alpha) * number + self.alpha * number.mean(), total)


@dataclass(frozen=True)
class Global(Ada):
    """Global threshold: all layers and heads compete, which is `Ada` over the whole cache.

    Args:
        alpha: part that is split equally (default 0).

    Source: KVzip's non-uniform mode, arXiv:2505.23416.
    """

    scope: ClassVar[Scope] = "cache"
    summary: ClassVar[str] = "all layers and heads compete, one threshold (arXiv:2505.23416)"
    scores_decide: ClassVar[Literal["nothing", "heads", "layers"]] = "layers"

    alpha: float = option(0.0, at_least=0, at_most=1)

    def planned(self, known: KnownBefore) -> None:
        """Only scores tell; see `TokenAllocator.planned`."""


@dataclass(frozen=True)
class Blocks(TokenAllocator):
    """KV-Compress: all layers and heads compete with whole blocks of tokens.

    The tokens of a head are sorted by score and cut into blocks; a block is worth its lowest score. Blocks of
    the whole cache are taken in that order, and the first that does not fit ends it: the sum may be below the
    budget by less than a block. Tokens that are always kept are in no block.

    Args:
        size: number of tokens of a block (default 16).

    Source: arXiv:2410.00161.
    """

    scope: ClassVar[Scope] = "cache"
    summary: ClassVar[str] = "all layers and heads compete with whole blocks (arXiv:2410.00161)"

    size: int = option(16, at_least=1, at_most=2**20)

    def counts(self, request: AllocationRequest) -> Tensor:
        """Counts (n, h) of the best blocks; see `TokenAllocator.counts`."""
        n, h, s = request.scores.shape
        free = max(0, request.share() - int(request.minimum.sum()))
        ranked = (
            request.scores.masked_fill(request.scores.isposinf(), -torch.inf).sort(-1, descending=True).values
        )
        padding = -(-s // self.size) * self.size - s
        ranked = torch.nn.functional.pad(ranked, (0, padding), value=-torch.inf)
        blocks = ranked.view(n, h, -1, self.size)
        # The last block of a head may be short: it is worth its own last token. An empty block is worth
        # nothing.
        lowest = torch.where(blocks.isneginf(), torch.inf, blocks).amin(-1)
        lowest = lowest.masked_fill(blocks[..., 0].isneginf(), -torch.inf)
        order = lowest.flatten().argsort(descending=True, stable=True).cpu()
        sizes = (~blocks.isneginf()).sum(-1).flatten().cpu()[order]
        taken = sizes * (sizes.cumsum(0) <= free)
        return request.minimum.flatten().index_add(0, order // lowest.shape[-1], taken).view(n, h)


@dataclass(frozen=True)
class HeadKV(PlannedCounts):
    """HeadKV: heads get tokens by an importance that was measured beforehand.

    Beyond sinks and recent tokens, `1/beta` of every head's budget goes to a pool that is split in proportion
    to head importance; the rest stays with the head. What a head cannot use, since its share exceeds the
    tokens there are, goes to the others in proportion to their importance.

    Args:
        kind: kind of head scores that is taken from a plan or from a file: `copy` (HeadKV-R), `r2`
            (HeadKV-R2), `er` or `mass` (default `r2`).
        beta: 1 splits everything by importance; larger values split more equally (default 1.2).
        floor: share that each layer gets at least of what it would get if all layers got the same, beyond
            sinks and recent tokens (default 0). What this adds to a layer is split equally among its heads.
        importance: scores per layer and KV head, given directly; they need not add up to one (default: none).

    Source: arXiv:2410.19258. Where we differ: the published code loses what a head cannot use. `floor`
    is ours: scores measure the heads that attend to the answer, and layers that read the question may have
    none.
    """

    summary: ClassVar[str] = "heads by measured importance (arXiv:2410.19258)"

    kind: str = option("r2", any_text=True)
    beta: float = option(1.2, at_least=1, at_most=1e9)
    floor: float = option(0.0, at_least=0, at_most=1)
    importance: tuple[tuple[float, ...], ...] = option((), at_least=0)

    def with_head_scores(self, heads: HeadImportance) -> Self:
        """A copy with the scores of `kind`; see `TokenAllocator.with_head_scores`."""
        if self.importance:
            return self
        (scores,) = _scores_of_kinds((self.kind,), heads, "headkv")
        return replace(self, importance=scores)

    def planned(self, known: KnownBefore) -> Tensor:
        """Counts (layers, h) by head importance; see `TokenAllocator.planned`."""
        weights = _checked_importance(self.importance, known, (self.kind,))
        if self.floor:
            # A layer whose weight is w times the mean gets 1 - 1/beta + w/beta of an even share. That is at
            # least `floor` if w >= (floor - 1) beta + 1.
            weights = _with_floor(weights, (self.floor - 1) * self.beta + 1)
        free = float(max(0.0, min(known.mean_tokens, known.tokens_seen) - known.protected))
        return _split_over_cache(known, weights, known.protected + free - free / self.beta)


@dataclass(frozen=True)
class Classes(PlannedCounts):
    """RazorAttention's two classes of heads: retrieval heads keep all they can, the others share the rest
    equally.

    A KV head is a retrieval head if it is among the highest by either of two scores.

    Args:
        induction: share of the KV heads that are retrieval heads by their induction score (default 0.14).
        echo: share of the KV heads that are retrieval heads by their echo score (default 0.01).
        importance: per layer and KV head, 1 for retrieval heads and 0 for the others, given directly
            (default: none).

    Source: arXiv:2407.15891, from which the defaults are.
    """

    summary: ClassVar[str] = "retrieval heads first, the others share the rest (arXiv:2407.15891)"

    induction: float = option(0.14, at_least=0, at_most=1)
    echo: float = option(0.01, at_least=0, at_most=1)
    importance: tuple[tuple[float, ...], ...] = option((), at_least=0)

    def with_head_scores(self, heads: HeadImportance) -> Self:
        """A copy with the class of each head, by induction and echo scores; see the base class."""
        if self.importance:
            return self
        induction, echo = _scores_of_kinds(("induction", "echo"), heads, "classes")
        retrieval = _highest(induction, self.induction) | _highest(echo, self.echo)
        return replace(self, importance=tuple(tuple(row) for row in retrieval.double().tolist()))

    def planned(self, known: KnownBefore) -> Tensor:
        """Counts (layers, h) by class; see `TokenAllocator.planned`."""
        retrieval = _checked_importance(self.importance, known, ("induction", "echo")) > 0
        # The small weight is met only after retrieval heads hold all their tokens.
        weights = torch.where(retrieval, 1.0, 1e-9)
        return _split_over_cache(known, weights, known.protected)


@dataclass(frozen=True)
class AtLeast(TokenAllocator):
    """Threshold: every token of a sufficient score is kept, whatever memory that takes. For policies without
    a budget.

    Args:
        score: the lowest score that is kept (default 1).
    """

    scope: ClassVar[Scope] = "layer"
    summary: ClassVar[str] = "every token that scores enough, without a budget"
    bounded: ClassVar[bool] = False

    score: float = option(1.0, at_least=-1e9, at_most=1e9)

    def counts(self, request: AllocationRequest) -> Tensor:
        """The number of tokens (n, h) that score enough; see `TokenAllocator.counts`."""
        return (request.scores >= self.score).sum(-1).cpu()


TOKEN_ALLOCATORS: dict[str, type[TokenAllocator]] = {
    "uniform": UniformTokens,
    "pyramid": Pyramid,
    "ada": Ada,
    "global": Global,
    "blocks": Blocks,
    "headkv": HeadKV,
    "classes": Classes,
    "at-least": AtLeast,
}


def _scores_of_kinds(
    kinds: Sequence[str], heads: HeadImportance, allocator: str
) -> list[tuple[tuple[float, ...], ...]]:
    """The scores of each kind, per layer and KV head.

    Args:
        kinds: which kinds are needed.
        heads: head scores by kind.
        allocator: the allocator's name, for the message.

    Raises:
        LowkeyError: kinds are missing; the message has the commands that measure them.
    """
    if missing := [kind for kind in kinds if kind not in heads]:
        there = f", and there are {', '.join(map(repr, heads))}" if heads else ""
        passed = " ".join(f"--heads {kind}.json" for kind in missing)
        wanted = " and ".join(map(repr, missing))
        raise LowkeyError(
            f"allocator {allocator!r}: needs head scores of kind {wanted}{there}; {_commands(missing)}, then "
            f"pass {passed}"
        )
    return [tuple(tuple(float(x) for x in row) for row in heads[kind]) for kind in kinds]


def _commands(kinds: Sequence[str]) -> str:
    """How to measure head scores of these kinds, for messages."""
    return "run " + " and ".join(f"`lowkey heads MODEL --kind {kind} --out {kind}.json`" for kind in kinds)


def _with_floor(weights: Tensor, least: float) -> Tensor:
    """Raise the weights of layers that get too little; the others pay for it in proportion.

    What a layer gets on top is split equally among its heads: all of them read the question, whatever their
    scores.

    Args:
        weights: (layers, h).
        least: the lowest sum of a layer's weights, as a share of the mean layer's sum.

    Returns:
        Weights (layers, h) that add up to 1.
    """
    weights = weights / weights.sum().clamp_min(1e-300)
    sums, least = weights.sum(1), max(0.0, least) / len(weights)
    raised = torch.zeros_like(sums, dtype=torch.bool)
    # Raising some layers lowers the others, which may then be too low themselves.
    while bool((more := ~raised & (sums < least * (1 - 1e-9))).any()):
        raised = raised | more
        rest = weights.sum(1).masked_fill(raised, 0.0)
        sums = torch.where(
            raised, least, rest * (1 - least * int(raised.sum())) / rest.sum().clamp_min(1e-300)
        )
    own = weights.sum(1)
    on_top = weights + ((sums - own) / weights.shape[1]).unsqueeze(1)
    return torch.where(raised.unsqueeze(1), on_top, weights * (sums / own.clamp_min(1e-300)).unsqueeze(1))


def _highest(scores: Sequence[Sequence[float]], share: float) -> Tensor:
    """Which heads (layers, h) are among the highest `share` of all heads; at least one is."""
    flat = torch.tensor(scores).flatten()
    best = flat.argsort(descending=True, stable=True)[: max(1, round(share * len(flat)))]
    return torch.zeros(len(flat), dtype=torch.bool).index_fill(0, best, True).view(len(scores), -1)


def _checked_importance(
    importance: tuple[tuple[float, ...], ...], known: KnownBefore, kinds: Sequence[str]
) -> Tensor:
    """Head importance as a tensor (layers, h) in fp64.

    Raises:
        LowkeyError: it has another number of layers or heads than the cache.
    """
    weights, h = torch.tensor(importance, dtype=torch.float64), known.heads
    if known.rows_of_heads is not None:
        rows = torch.tensor(known.rows_of_heads)
        if weights.shape == rows.shape:
            weights = weights.new_zeros(len(rows), h).scatter_add(1, rows, weights)
    if weights.shape != (known.layers, h):
        raise LowkeyError(
            f"head importance of shape {tuple(weights.shape)}: the model has {known.layers} layers "
            f"of {h} KV heads; {_commands(kinds)}"
        )
    return weights


def _apportioned(request: AllocationRequest, weights: Tensor, total: int) -> Tensor:
    """Split `total` tokens over the heads in scope in proportion to weights (n, h), within what each can
    hold.
    """
    counts = apportion(weights.flatten(), total, request.minimum.flatten(), request.maximum.flatten())
    return counts.view(request.scores.shape[:2])


def _equal_counts(known: KnownBefore) -> Tensor:
    """Counts (layers, h) if all layers get the same, and all heads of a layer."""
    h, rows = known.heads, []
    for layer in range(known.layers):
        total = min(max(known.share(layer, 1), h * known.protected), h * known.tokens_seen)
        rows.append([total // h + (head < total % h) for head in range(h)])
    return torch.tensor(rows)


def _split_over_cache(known: KnownBefore, weights: Tensor, base: float) -> Tensor:
    """Counts (layers, h) when the weights of all layers are known beforehand.

    The whole cache is split each time, so that every layer can decide by itself and all sums fit together.

    Args:
        known: the budget and the cache.
        weights: (layers, h) for all layers.
        base: tokens that each head gets whatever its weight.
    """
    heads = known.layers * known.heads
    whole = round(min(known.mean_tokens, known.tokens_seen) * heads)
    low, high = (torch.full((heads,), n) for n in (known.protected, known.tokens_seen))
    return apportion(weights.flatten(), whole, low, high, float(base)).view(known.layers, known.heads)
