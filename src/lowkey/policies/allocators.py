"""How many tokens each layer and head keeps. Every allocator gives a total that is exact, within what there
is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from lowkey.core.options import Checked, option
from lowkey.core.types import LowkeyError
from lowkey.ops.apportion import apportion

Scope = Literal["layer", "cache"]
HeadImportance = Mapping[str, Sequence[Sequence[float]]]
"""By kind (`copy`, `r2`, ...): one number for every compressed layer and KV head."""


@dataclass(frozen=True)
class AllocationRequest:
    """One batch row's question: layers in scope, n of them, of `layers` in all; the first is number `first`.

    scores (n, h, s): +inf for tokens that stay in any case, -inf where there is none. mean: tokens per head,
    on average over the cache. tokens: how many the row has seen.
    """

    scores: Tensor
    mean_tokens: float
    tokens_seen: int
    first_layer: int
    total_layers: int

    @property
    def minimum(self) -> Tensor:
        """(n, h): what each head keeps in any case."""
        return self.scores.isposinf().sum(-1).cpu()

    @property
    def maximum(self) -> Tensor:
        """(n, h): what each head has."""
        return (~self.scores.isneginf()).sum(-1).cpu()

    def share(self) -> int:
        """The tokens for the layers in scope when all layers get the same; over all layers they add up
        exactly.
        """
        n, h = self.scores.shape[:2]
        whole = min(self.mean_tokens, self.tokens_seen) * h * self.total_layers
        return round(whole * (self.first_layer + n) / self.total_layers) - round(
            whole * self.first_layer / self.total_layers
        )


class Allocator(Checked, ABC):
    """scope: `layer` decides as soon as a layer has its scores, so that a long prompt is never held whole;
    `cache` needs all layers'.
    """

    scope: ClassVar[Scope]
    summary: ClassVar[str]
    bounded: ClassVar[bool] = True  # whether a budget bounds it

    @abstractmethod
    def counts(self, request: AllocationRequest) -> Tensor:
        """Tokens kept (n, h)."""

    def with_head_scores(self, heads: HeadImportance) -> Self:
        """With the head importance that it asks for, found in `heads`; most ask for none. Errors: LowkeyError
        when it is not there.
        """
        return self


@dataclass(frozen=True)
class Uniform(Allocator):
    """The same for every layer and head."""

    scope: ClassVar[Scope] = "layer"
    summary: ClassVar[str] = "the same for every layer and head"

    def counts(self, request: AllocationRequest) -> Tensor:
        return _spread(request, torch.ones(request.scores.shape[:2]), request.share())


@dataclass(frozen=True)
class Pyramid(Allocator):
    """PyramidKV (arXiv:2406.02069): beyond what is protected, layers get b/beta tokens at the top and 2b -
    b/beta at the bottom.
    """

    scope: ClassVar[Scope] = "layer"
    summary: ClassVar[str] = "more for lower layers, on a straight line (arXiv:2406.02069)"

    # 1 deals evenly, larger values lean more on the lower layers
    beta: float = option(20.0, at_least=1, at_most=1e9)

    def counts(self, request: AllocationRequest) -> Tensor:
        h, floor = request.scores.shape[1], float(request.minimum.max())
        b = max(0.0, min(request.mean_tokens, request.tokens_seen) - floor)
        slope = (
            torch.linspace(2 * b - b / self.beta, b / self.beta, request.total_layers)
            if request.total_layers > 1
            else torch.tensor([b])
        )
        return _static(request, slope.unsqueeze(1).expand(-1, h), floor)


@dataclass(frozen=True)
class Ada(Allocator):
    """Ada-KV (arXiv:2407.11550): the layer's best tokens over all its heads say how many each head gets; a
    part alpha is dealt equally.
    """

    scope: ClassVar[Scope] = "layer"
    summary: ClassVar[str] = "heads of a layer compete for its tokens (arXiv:2407.11550)"

    alpha: float = option(0.2, at_least=0, at_most=1)

    def counts(self, request: AllocationRequest) -> Tensor:
        total = request.share()
        best = _best(request.scores, total).double()
        return _spread(request, (1 - self.alpha) * best + self.alpha * best.mean(), total)


@dataclass(frozen=True)
class Global(Ada):
    """One threshold for all layers and heads (KVzip's `pair`, arXiv:2505.23416), with a part alpha dealt
    equally.
    """

    scope: ClassVar[Scope] = "cache"
    summary: ClassVar[str] = "all layers and heads compete, one threshold (arXiv:2505.23416)"

    alpha: float = option(0.0, at_least=0, at_most=1)


@dataclass(frozen=True)
class Blocks(Allocator):
    """KV-Compress (arXiv:2410.00161): whole blocks of a head's tokens in order of score, each worth its last;
    one sort over the cache.

    Tokens that stay in any case are in no block. The best blocks are taken until the next does not fit, so
    that the total may be short of the share by less than a block.
    """

    scope: ClassVar[Scope] = "cache"
    summary: ClassVar[str] = "all layers and heads compete with whole blocks (arXiv:2410.00161)"

    size: int = option(16, at_least=1, at_most=2**20)

    def counts(self, request: AllocationRequest) -> Tensor:
        n, h, s = request.scores.shape
        free = max(0, request.share() - int(request.minimum.sum()))
        ranked = (
            request.scores.masked_fill(request.scores.isposinf(), -torch.inf).sort(-1, descending=True).values
        )
        room = -(-s // self.size) * self.size - s
        ranked = torch.nn.functional.pad(ranked, (0, room), value=-torch.inf)
        worth = ranked.view(n, h, -1, self.size)
        # a last, hanging block is worth its own last token
        last = torch.where(worth.isneginf(), torch.inf, worth).amin(-1)
        last = last.masked_fill(worth[..., 0].isneginf(), -torch.inf)
        order = last.flatten().argsort(descending=True, stable=True).cpu()
        sizes = (~worth.isneginf()).sum(-1).flatten().cpu()[order]
        taken = sizes * (sizes.cumsum(0) <= free)
        return request.minimum.flatten().index_add(0, order // last.shape[-1], taken).view(n, h)


@dataclass(frozen=True)
class HeadKV(Allocator):
    """HeadKV (arXiv:2410.19258): of each head's tokens a part 1/beta goes to a pool that is dealt out by head
    importance.

    kind: which importance to take from a plan or a file of head scores: `copy` (HeadKV-R), `r2` (HeadKV-R2),
    `er`, `mass`.
    importance: per layer, its KV heads' scores, when given directly; they need not add up to one. floor
    (ours): the share that each layer gets at least of what it would get if all layers got the same, beyond
    what is protected; what that adds to a layer is dealt evenly to its heads. Scores are of heads that look
    at the answer: layers that read the question may have none. A head's share beyond what there is goes to
    the others in proportion to their importance; the published code loses it.
    """

    scope: ClassVar[Scope] = "layer"
    summary: ClassVar[str] = "heads by measured importance (arXiv:2410.19258)"

    kind: str = option("r2", any_text=True)
    # 1 deals everything by importance, larger values deal more equally
    beta: float = option(1.2, at_least=1, at_most=1e9)
    floor: float = option(0.0, at_least=0, at_most=1)
    importance: tuple[tuple[float, ...], ...] = option((), at_least=0)

    def with_head_scores(self, heads: HeadImportance) -> Self:
        if self.importance:
            return self
        (found,) = _importance((self.kind,), heads, "headkv")
        return replace(self, importance=found)

    def counts(self, request: AllocationRequest) -> Tensor:
        weights = _checked(self.importance, request, (self.kind,))
        if self.floor:
            weights = _with_floor(weights, (self.floor - 1) * self.beta + 1)
        protected = float(request.minimum.max())
        free = max(0.0, min(request.mean_tokens, request.tokens_seen) - protected)
        return _static(request, weights, protected + free - free / self.beta)


@dataclass(frozen=True)
class Classes(Allocator):
    """Two classes of heads (RazorAttention, arXiv:2407.15891): retrieval heads keep all they can; the others
    share what is left equally.

    induction, echo: which share of the KV heads, by those scores, are retrieval heads (the paper's 14 % and 1
    %). importance: per layer, 1 for the retrieval heads and 0 for the others, when given directly.
    """

    scope: ClassVar[Scope] = "layer"
    summary: ClassVar[str] = "retrieval heads first, the others share the rest (arXiv:2407.15891)"

    induction: float = option(0.14, at_least=0, at_most=1)
    echo: float = option(0.01, at_least=0, at_most=1)
    importance: tuple[tuple[float, ...], ...] = option((), at_least=0)

    def with_head_scores(self, heads: HeadImportance) -> Self:
        if self.importance:
            return self
        found = _importance(("induction", "echo"), heads, "classes")
        chosen = [
            _top(scores, share) for scores, share in zip(found, (self.induction, self.echo), strict=True)
        ]
        either = (chosen[0] | chosen[1]).double().tolist()
        return replace(self, importance=tuple(tuple(row) for row in either))

    def counts(self, request: AllocationRequest) -> Tensor:
        retrieval = _checked(self.importance, request, ("induction", "echo")) > 0
        return _static(request, torch.where(retrieval, 1.0, 1e-9), float(request.minimum.max()))


@dataclass(frozen=True)
class AtLeast(Allocator):
    """Every token that scores at least `score`, whatever that takes: for a policy without a budget."""

    scope: ClassVar[Scope] = "layer"
    summary: ClassVar[str] = "every token that scores enough, without a budget"
    bounded: ClassVar[bool] = False

    score: float = option(1.0, at_least=-1e9, at_most=1e9)

    def counts(self, request: AllocationRequest) -> Tensor:
        return (request.scores >= self.score).sum(-1).cpu()


ALLOCATORS: dict[str, type[Allocator]] = {
    "uniform": Uniform,
    "pyramid": Pyramid,
    "ada": Ada,
    "global": Global,
    "blocks": Blocks,
    "headkv": HeadKV,
    "classes": Classes,
    "at-least": AtLeast,
}


def _importance(
    kinds: Sequence[str], heads: HeadImportance, name: str
) -> list[tuple[tuple[float, ...], ...]]:
    """Of each kind, per layer its KV heads' scores. Errors: LowkeyError that names what makes all that are
    missing.
    """
    if missing := [kind for kind in kinds if kind not in heads]:
        there = f", and there are {', '.join(map(repr, heads))}" if heads else ""
        passed = " ".join(f"--heads {kind}.json" for kind in missing)
        wanted = " and ".join(map(repr, missing))
        raise LowkeyError(
            f"allocator {name!r}: needs head scores of kind {wanted}{there}; {_commands(missing)}, then pass "
            f"{passed}"
        )
    return [tuple(tuple(float(x) for x in row) for row in heads[kind]) for kind in kinds]


def _commands(kinds: Sequence[str]) -> str:
    return "run " + " and ".join(f"`lowkey heads MODEL --kind {kind} --out {kind}.json`" for kind in kinds)


def _with_floor(weights: Tensor, least: float) -> Tensor:
    """Weights (layers, h) adding up to 1, of which no layer has less than `least` of the mean layer; the
    others are less for it, in proportion. What a layer is given on top is dealt evenly: all its heads read
    the question, whatever they score."""
    weights = weights / weights.sum().clamp_min(1e-300)
    sums, least = weights.sum(1), max(0.0, least) / len(weights)
    raised = sums < 0  # none yet
    while bool((more := ~raised & (sums < least * (1 - 1e-9))).any()):
        raised = raised | more
        rest = weights.sum(1).masked_fill(raised, 0.0)
        sums = torch.where(
            raised, least, rest * (1 - least * int(raised.sum())) / rest.sum().clamp_min(1e-300)
        )
    own = weights.sum(1)
    on_top = weights + ((sums - own) / weights.shape[1]).unsqueeze(1)
    return torch.where(raised.unsqueeze(1), on_top, weights * (sums / own.clamp_min(1e-300)).unsqueeze(1))


def _top(importance: Sequence[Sequence[float]], share: float) -> Tensor:
    """Which heads are among the highest `share` of all, at least one."""
    flat = torch.tensor(importance).flatten()
    best = flat.argsort(descending=True, stable=True)[: max(1, round(share * len(flat)))]
    return torch.zeros(len(flat), dtype=torch.bool).index_fill(0, best, True).view(len(importance), -1)


def _checked(
    importance: tuple[tuple[float, ...], ...], request: AllocationRequest, kinds: Sequence[str]
) -> Tensor:
    weights, h = torch.tensor(importance, dtype=torch.float64), request.scores.shape[1]
    if weights.shape != (request.total_layers, h):
        raise LowkeyError(
            f"head importance of shape {tuple(weights.shape)}: the model has {request.total_layers} layers of {h} KV "
            f"heads; {_commands(kinds)}"
        )
    return weights


def _spread(request: AllocationRequest, weights: Tensor, total: int) -> Tensor:
    """`total` over the heads in scope by weight, (n, h)."""
    shape = request.scores.shape[:2]
    return apportion(weights.flatten(), total, request.minimum.flatten(), request.maximum.flatten()).view(
        shape
    )


def _static(request: AllocationRequest, weights: Tensor, base: float) -> Tensor:
    """Counts for the layers in scope when weights (layers, h) for all are known beforehand: one water-filling
    over the whole cache.

    What a layer's heads lack (they hold less than the row has seen, after an earlier eviction) goes to its
    other heads.
    """
    n, h = request.scores.shape[:2]
    low = request.minimum.amax().expand(request.total_layers * h)
    whole = round(min(request.mean_tokens, request.tokens_seen) * h * request.total_layers)
    caps = apportion(
        weights.flatten(), whole, low, torch.full((request.total_layers * h,), request.tokens_seen), base
    ).view(request.total_layers, h)
    own = caps[request.first_layer : request.first_layer + n]
    if bool((own <= request.maximum).all()):
        return own.maximum(request.minimum)
    return _spread(request, own.double(), int(own.sum()))


def _best(scores: Tensor, total: int) -> Tensor:
    """How many of the `total` highest scores (n, h, s) each head has, (n, h)."""
    n, h, s = scores.shape
    chosen = scores.flatten().argsort(descending=True, stable=True)[:total]
    return torch.bincount(chosen.cpu() // s, minlength=n * h).view(n, h)
