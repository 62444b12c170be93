"""What a policy is: a score, an allocator and a trigger. What a score sees: a EvictionContext."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from lowkey.core.options import check, option
from lowkey.core.types import Budget, LowkeyError
from lowkey.ops.precision import for_products
from lowkey.policies.allocators import ALLOCATORS, Allocator, HeadImportance

Pooling = Literal["max", "mean"]
Rope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# attention weights formed at once: 128 MiB and a few copies; on a CPU what its own cache holds
BLOCK, CACHED = 2**25, 2**20
NO_BUDGET = (
    "it needs a budget, like '10%' or '64 tokens'; only fastgen, or allocator 'at-least', does without"
)
LEAST = 16  # queries at a time, however long the context: products of fewer read all keys for little


@dataclass(frozen=True)
class EvictionContext:
    """One layer's candidates when it is time to evict.

    keys (b, h, s, d) rotated, as attention reads them, and values (b, h, s, d); positions (b, h, s), counted
    from each row's first token whatever the model calls it, and valid (b, h, s): False for padding and for
    the gaps of shorter heads. queries (b, h, g, w, d): all since the last eviction, rotated, of the newest w
    tokens, at query_positions (b, w), -1 for padding. rope: cos and sin at positions so counted. looking: the
    queries only look and are not stored. carried (b, h, s): scores kept from earlier evictions, 0 for new
    tokens. piece (b, 2), if the queries repeat a part of what came before: the position of its first token
    and the one behind its last; then repeating (b, h, g, w) is the log-sum-exp of their logits over it and
    over what came with them. sight (b|1, w, c), where attention is not causal: which of the newest c
    candidates each query sees.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    valid: Tensor
    queries: Tensor
    query_positions: Tensor
    scaling: float
    softcap: float | None
    rope: Rope
    previous_scores: Tensor
    repeated_span: Tensor | None = None
    repetition_lse: Tensor | None = None
    visible: Tensor | None = None

    def newest_query_positions(self, last: int = 0) -> Tensor:
        """Positions (b, w) of the newest `last` queries of each row (0: all); -1 for the others."""
        at = self.query_positions
        return at.masked_fill(at <= at.amax(1, keepdim=True) - last, -1) if last and at.shape[1] else at

    def logits(self, last: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Which of each row's newest `last` queries (0: all), a few at a time, and their logits (b, h, g, w,
        n) in fp32 over the first n candidates, since they see none of the others; -inf for what is not seen,
        and for padding."""
        b, h, g, w = self.queries.shape[:4]
        there = self.positions.masked_fill(~self.valid, torch.iinfo(torch.int64).max)
        # over rows and heads; a candidate that one lacks is never clear
        lowest, highest = there.amin((0, 1)), there.amax((0, 1))
        keys = for_products(self.keys).mT
        step = max(
            LEAST, (CACHED if keys.device.type == "cpu" else BLOCK) // max(1, b * h * g * keys.shape[3])
        )
        newest = self.newest_query_positions(last)
        for start in range(_before((newest >= 0).any(0)), w, step):
            some = slice(start, start + step)
            at, queries = newest[:, some], for_products(self.queries[:, :, :, some]) * self.scaling
            stop, clear = _after(lowest <= at.max()), int((highest <= at.min()).long().cumprod(0).sum())
            if self.visible is not None:
                stop, clear = keys.shape[3], min(clear, keys.shape[3] - self.visible.shape[2])
            logits = (queries.flatten(2, 3) @ keys[..., :stop]).float().unflatten(2, queries.shape[2:4])
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            seen = self.valid[:, :, None, clear:stop] & (
                self.positions[:, :, None, clear:stop] <= at[:, None, :, None]
            )
            if self.visible is not None:
                chunk = slice(stop - clear - self.visible.shape[2], None)
                may = self.visible[:, None, some] & (at >= 0)[:, None, :, None]
                seen[..., chunk] = self.valid[:, :, None, clear:][..., chunk] & may
            logits[..., clear:].masked_fill_(~seen.unsqueeze(2), -torch.inf)
            yield some, logits

    def attention(self, last: int = 0) -> Iterator[Tensor]:
        """The softmax of `logits`; padding gets 0."""
        for some, logits in self.logits(last):
            weights = logits.softmax(-1)
            blind = self.visible is not None or bool((self.newest_query_positions(last)[:, some] < 0).any())
            yield weights.nan_to_num_(0.0) if blind else weights


@dataclass(frozen=True)
class Policy(ABC):
    """Which tokens every head keeps, and when that is decided.

    budget: what is kept of the tokens seen, per head on average: `10%`, `512 tokens`, `1.5 GiB` or `4
    KiB/token`; bytes are those of the whole cache. None only with allocator `at-least`, which keeps what
    scores enough. allocator: how it is split over layers and heads, a name of ALLOCATORS or an object. sinks,
    recent: the first and the newest tokens of each row stay, whatever their score; they count in the budget.
    every: also evict after so many decode steps; 0: only after a prompt or chunk.
    """

    summary: ClassVar[str]
    paper: ClassVar[str]
    uses_queries: ClassVar[bool] = True  # whether the score reads queries
    stateful: ClassVar[bool] = False  # whether scores are kept with the tokens, for the next eviction
    # whether the context must be repeated before it can be scored; `lowkey.prefill` does it
    needs_second_pass: ClassVar[bool] = False
    layer: ClassVar[str] = "evicting"  # which cache layer it needs

    budget: Budget | str | None
    allocator: str | Allocator = "uniform"
    sinks: int = option(4, at_least=0, at_most=2**24)
    recent: int = option(8, at_least=0, at_most=2**24)
    every: int = option(0, at_least=0, at_most=2**24)

    def __post_init__(self) -> None:
        parsed = None if self.budget is None else Budget.parse(self.budget)
        object.__setattr__(self, "budget", parsed)
        check(self)
        if isinstance(self.allocator, str) and self.allocator not in ALLOCATORS:
            raise LowkeyError(
                f"allocator {self.allocator!r} is unknown; choose one of {', '.join(ALLOCATORS)}"
            )
        if self.resolved_allocator().bounded != (parsed is not None):
            rule = (
                "its allocator keeps what scores enough and takes none; leave it out" if parsed else NO_BUDGET
            )
            raise LowkeyError(f"budget {parsed} of {type(self).__name__}: {rule}")
        if parsed and parsed.unit == "tokens" and parsed.amount < self.sinks + self.recent:
            raise LowkeyError(self.budget_too_small(parsed.amount))

    def budget_too_small(self, tokens: float) -> str:
        return (
            f"budget {self.budget}: {tokens:g} tokens per head do not hold the {self.sinks} sinks and "
            f"{self.recent} recent tokens that are "
            "always kept; raise the budget or lower sinks or recent"
        )

    def resolved_allocator(self) -> Allocator:
        return ALLOCATORS[self.allocator]() if isinstance(self.allocator, str) else self.allocator

    @property
    def uses_rotations(self) -> bool:
        """Whether the score asks the model for rotations at other times than the model does."""
        return False

    def with_head_scores(self, heads: HeadImportance) -> Self:
        """Ready to use: with an allocator that has the head importance it asks for."""
        return replace(self, allocator=self.resolved_allocator().with_head_scores(heads))

    @abstractmethod
    def score(self, context: EvictionContext) -> Tensor:
        """(b, h, s): the higher, the more worth keeping. What it says of protected or invalid tokens is
        ignored.
        """


def attention_sums(context: EvictionContext, last: int = 0, squared: bool = False) -> Tensor:
    """Attention (b, h, g, s) or its square, summed over the newest `last` queries (0: all)."""
    b, h, g, _ = context.queries.shape[:4]
    total = torch.zeros(b, h, g, context.keys.shape[2], device=context.keys.device)
    for weights in context.attention(last):
        total[..., : weights.shape[-1]] += (weights.square_() if squared else weights).sum(3)
    return total


def norms(x: Tensor) -> Tensor:
    """(..., d) -> (...), in fp32 or in what is finer."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def _before(seen: Tensor) -> int:
    """The number of the first that is true."""
    there = seen.nonzero()
    return int(there[0]) if len(there) else len(seen)


def _after(seen: Tensor) -> int:
    """The number behind the last that is true."""
    there = seen.nonzero()
    return int(there[-1]) + 1 if len(there) else 0


def pooled(context: EvictionContext, scores: Tensor, kernel: int, pooling: Pooling, window: int) -> Tensor:
    """Scores (b, h, s) over the `kernel` nearest positions, so that clusters of tokens stay together: their
    largest, or their sum over `kernel` (what is not there counts 0). The newest `window` tokens neither give
    to the prompt nor take from it.

    The largest: arXiv:2404.14469 (kernel 7), PyramidKV and HeadKV. The mean: SnapKV's published code and
    kvpress (kernel 5).
    """
    if kernel == 1:
        return scores
    looking = context.newest_query_positions(window)
    first = looking.masked_fill(looking < 0, looking.max()).amin(1) if window else looking.amax(1) + 1
    prompt = context.valid & (context.positions < first[:, None, None])
    # neighbours are found by position: tokens between them may have been evicted
    slot = context.positions.masked_fill(~prompt, 0)
    dense = scores.new_zeros(*scores.shape[:2], int(slot.max()) + 1).scatter_add(
        2, slot, scores.masked_fill(~prompt, 0.0)
    )
    pool = max_pool1d if pooling == "max" else avg_pool1d
    return pool(dense, kernel, stride=1, padding=kernel // 2).gather(2, slot).where(prompt, scores)
