"""Token allocators: how many tokens each layer and each head keeps.

Every allocator gives counts whose sum is exactly the budget, as far as there are that many tokens. (`Blocks`
may stay below it by less than a block, and `AtLeast` has no budget.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from lowkey.core.errors import LowkeyError
from lowkey.core.options import option
from lowkey.policies.sharing import (
    AllocationRequest,
    HeadImportance,
    KnownBefore,
    PlannedCounts,
    Scope,
    TokenAllocator,
    apportioned,
    equal_counts,
    split_over_cache,
)

TAU_HALVINGS = 40  # until a share of mass is found


@dataclass(frozen=True)
class UniformTokens(TokenAllocator):
    """Uniform: every layer and head keeps the same number of tokens."""

    scope: ClassVar[Scope] = "layer"
    summary: ClassVar[str] = "the same for every layer and head"
    scores_decide: ClassVar[Literal["nothing", "heads", "layers"]] = "nothing"

    def planned(self, known: KnownBefore) -> Tensor:
        """Equal counts (layers, h); see `TokenAllocator.planned`."""
        return equal_counts(known)

    def counts(self, request: AllocationRequest) -> Tensor:
        """Equal counts (n, h); see `TokenAllocator.counts`."""
        return apportioned(request, torch.ones(request.scores.shape[:2]), request.share())


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
        return split_over_cache(known, line.unsqueeze(1).expand(-1, known.heads), known.protected)


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
        return equal_counts(known)

    def counts(self, request: AllocationRequest) -> Tensor:
        """Counts (n, h) by the best tokens of the layers in scope; see `TokenAllocator.counts`."""
        total = request.share()
        n, h, s = request.scores.shape
        best = request.scores.flatten().argsort(descending=True, stable=True)[:total]
        number = torch.bincount(best.cpu() // s, minlength=n * h).view(n, h).double()
        return apportioned(request, (1 - self.alpha) * number + self.alpha * number.mean(), total)


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
class LayerMass(TokenAllocator):
    """ZipVL's layer-adaptive count: a layer keeps as many tokens as hold a share of its scores.

    Let `c_lj` be the mass of token j in layer l, summed over its heads: its score, unless the policy weighs
    tokens otherwise. p_l is the fewest tokens whose largest masses add up to the share tau of all. All heads
    of a layer keep p_l tokens. tau is the largest one that the budget allows, the same for all layers; what
    is left goes to all heads alike. It suits scores that add up, like attention.

    Args:
        protected_mass: whether the mass of sinks and recent tokens counts, and these tokens in p_l. If not,
            they are kept besides (default False).

    Source: arXiv:2410.08584, eq. 6. Where we differ: there tau is given and the memory follows, and sinks
    count, which hold much of the mass.
    """

    scope: ClassVar[Scope] = "cache"
    summary: ClassVar[str] = "as many tokens of a layer as hold a share of its scores (arXiv:2410.08584)"
    weighs: ClassVar[bool] = True

    protected_mass: bool = False

    def counts(self, request: AllocationRequest) -> Tensor:
        """Counts (n, h) that are alike in all heads of a layer; see `TokenAllocator.counts`."""
        heads, longest = request.scores.shape[1:]
        held, total = _held_mass(request, self.protected_mass), request.share()
        protected = request.minimum.amax(1)

        def counted(tau: float) -> Tensor:
            needed = _needed(held, tau)
            with_protected = needed.maximum(protected) if self.protected_mass else needed + protected
            return with_protected.clamp_max(longest)

        low, high = 0.0, 1.0
        for _ in range(TAU_HALVINGS):
            tau = (low + high) / 2
            low, high = (tau, high) if int(counted(tau).sum()) * heads <= total else (low, tau)
        weights = counted(low).double().unsqueeze(1).expand(-1, heads)
        return apportioned(request, weights, total)


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
        return split_over_cache(known, weights, known.protected + free - free / self.beta)


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
        return split_over_cache(known, weights, known.protected)


@dataclass(frozen=True)
class FullHeads(PlannedCounts):
    """RLKV and DuoAttention: in the order of their gates heads hold all tokens, and the rest hold the sinks
    and recent tokens alone.

    The budget says how many heads hold everything. One head may hold a part: what is left over.

    Args:
        kind: kind of head scores that is taken from a plan or from a file: `reward` (RLKV), `distilled`
            (DuoAttention), `ablation`, or any other (default `reward`).
        importance: scores per layer and KV head, given directly (default: none). Of equal heads the lower
            layer, and then the lower head, comes first.

    Source: arXiv:2510.08525 and arXiv:2410.10819. Where we differ: there a share of the heads is given, and
    memory follows.
    """

    summary: ClassVar[str] = "heads of the highest gates hold all tokens (arXiv:2510.08525)"

    kind: str = option("reward", any_text=True)
    importance: tuple[tuple[float, ...], ...] = option((), at_least=0)

    def with_head_scores(self, heads: HeadImportance) -> Self:
        """A copy with the scores of `kind`; see `TokenAllocator.with_head_scores`."""
        if self.importance:
            return self
        (scores,) = _scores_of_kinds((self.kind,), heads, "full-heads")
        return replace(self, importance=scores)

    def planned(self, known: KnownBefore) -> Tensor:
        """Counts (layers, h): all tokens, a rest, or the protected ones; see `TokenAllocator.planned`."""
        gates = _checked_importance(self.importance, known, (self.kind,)).flatten()
        room = max(0, known.tokens_seen - known.protected)  # what a whole head takes beyond its window
        whole = round(min(known.mean_tokens, known.tokens_seen) * len(gates))
        free = max(0, whole - min(known.protected, known.tokens_seen) * len(gates))
        order = gates.argsort(descending=True, stable=True)
        given = (free - room * torch.arange(len(gates))).clamp(0, room)
        counts = torch.full((len(gates),), min(known.protected, known.tokens_seen))
        return counts.index_add(0, order, given).view(known.layers, known.heads)


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


@dataclass(frozen=True)
class MassShare(TokenAllocator):
    """ZipVL's layer-adaptive count as published: the share of mass is given, and the memory follows. For
    policies without a budget.

    A layer keeps the fewest tokens whose largest masses, summed over its heads, add up to the share tau of
    all; see `LayerMass`, which finds tau for a budget.

    Args:
        tau: the share of a layer's mass (default 0.975); 1 keeps all tokens.
        protected_mass: whether the mass of sinks and recent tokens counts, and these tokens in the count, as
            published. If not, they are kept besides (default False).

    Source: arXiv:2410.08584, eq. 6, which has tau at 0.96 and 0.975.
    """

    scope: ClassVar[Scope] = "layer"
    summary: ClassVar[str] = "as many tokens of a layer as hold the share tau of its scores, without a budget"
    bounded: ClassVar[bool] = False
    weighs: ClassVar[bool] = True

    tau: float = option(0.975, above=0, at_most=1)
    protected_mass: bool = False

    def counts(self, request: AllocationRequest) -> Tensor:
        """Counts (n, h) by mass; see `TokenAllocator.counts`."""
        if self.tau == 1:
            return request.maximum
        needed = _needed(_held_mass(request, self.protected_mass), self.tau).unsqueeze(1)
        least = request.minimum
        return (least.maximum(needed) if self.protected_mass else least + needed).minimum(request.maximum)


TOKEN_ALLOCATORS: dict[str, type[TokenAllocator]] = {
    "uniform": UniformTokens,
    "pyramid": Pyramid,
    "ada": Ada,
    "global": Global,
    "blocks": Blocks,
    "layer-mass": LayerMass,
    "headkv": HeadKV,
    "classes": Classes,
    "full-heads": FullHeads,
    "at-least": AtLeast,
    "mass-share": MassShare,
}


def _held_mass(request: AllocationRequest, protected: bool) -> Tensor:
    """What the tokens of largest mass of a layer hold together (n, s), in fp64, one, two and more of them.

    Args:
        request: scores and masses.
        protected: whether tokens that are always kept count.
    """
    scores = request.scores
    mass = scores if request.mass is None else request.mass
    counts = ~scores.isneginf() if protected else scores.isfinite()
    mass = mass.masked_fill(~(counts & mass.isfinite()), 0.0).clamp_min(0.0).double().sum(1).cpu()
    return mass.sort(1, descending=True).values.cumsum(1)


def _needed(held: Tensor, tau: float) -> Tensor:
    """The fewest tokens (n) that hold a share of the mass; `held` as `_held_mass` returns it."""
    whole = held[:, -1:]
    tokens = torch.searchsorted(held / whole.clamp_min(1e-300), torch.full_like(whole, tau))[:, 0] + 1
    return tokens * ((whole[:, 0] > 0) & (tau > 0))  # a layer without mass needs none


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
