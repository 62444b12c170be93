"""What a policy is: a score, an allocator and a trigger. What a score sees: a Scene."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from lowkey.options import check, option
from lowkey.policies.allocators import ALLOCATORS, Allocator, HeadImportance
from lowkey.types import Budget, LowkeyError

Rope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
BLOCK = 2**25  # attention weights formed at once: 128 MiB, and a few copies


@dataclass(frozen=True)
class Scene:
    """One layer's candidates when it is time to evict.

    keys (b, h, s, d) rotated, as attention reads them, and values (b, h, s, d); positions (b, h, s), counted from each row's first
    token whatever the model calls it, and valid (b, h, s): False for padding and for the gaps of shorter heads. queries (b, h, g, w, d):
    all since the last eviction, rotated, of the newest w tokens, at query_positions (b, w), -1 for padding. rope: cos and sin at
    positions so counted. looking: the queries only look and are not stored. carried (b, h, s): scores kept from earlier evictions, 0 for
    new tokens.
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
    carried: Tensor
    looking: bool = False

    def weights(self, last: int, first: int = 0) -> Tensor:
        """Attention (b, h, g, w, s) in fp32 of the newest `last` queries, without the newest `first` of these; padding gets 0."""
        stop = self.queries.shape[3] - first
        chosen = slice(max(0, self.queries.shape[3] - last), stop)
        queries, at = self.queries[:, :, :, chosen], self.query_positions[:, chosen]
        g, w = queries.shape[2:4]
        scores = (queries.flatten(2, 3) @ self.keys.mT).unflatten(2, (g, w)).float() * self.scaling
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        seen = self.valid.unsqueeze(2) & (self.positions.unsqueeze(2) <= at[:, None, :, None])
        return scores.masked_fill(~seen.unsqueeze(2), -torch.inf).softmax(-1).nan_to_num(0.0)


@dataclass(frozen=True)
class Policy(ABC):
    """Which tokens every head keeps, and when that is decided.

    budget: what is kept of the tokens seen, per head on average: `10%`, `512 tokens`, `1.5 GiB` or `4 KiB/token`. allocator: how it is
    split over layers and heads, a name of ALLOCATORS or an object. sinks, recent: the first and the newest tokens of each row
    stay, whatever their score; they count in the budget. every: also evict after so many decode steps; 0: only after a prompt or chunk.
    """

    summary: ClassVar[str]
    paper: ClassVar[str]
    looks: ClassVar[bool] = True  # whether the score reads queries
    carries: ClassVar[bool] = False  # whether scores are kept with the tokens, for the next eviction
    repeats: ClassVar[bool] = False  # whether the context must be repeated before it can be scored; `lowkey.prefill` does it
    layer: ClassVar[str] = "evicting"  # which cache layer it needs

    budget: Budget | str
    allocator: str | Allocator = "uniform"
    sinks: int = option(4, at_least=0, at_most=2**24)
    recent: int = option(8, at_least=0, at_most=2**24)
    every: int = option(0, at_least=0, at_most=2**24)

    def __post_init__(self) -> None:
        parsed = Budget.parse(self.budget)
        object.__setattr__(self, "budget", parsed)
        check(self)
        if parsed.unit == "tokens" and parsed.amount < self.sinks + self.recent:
            raise LowkeyError(self.too_small(parsed.amount))
        if isinstance(self.allocator, str) and self.allocator not in ALLOCATORS:
            raise LowkeyError(f"allocator {self.allocator!r} is unknown; choose one of {', '.join(ALLOCATORS)}")

    def too_small(self, tokens: float) -> str:
        return (
            f"budget {self.budget}: {tokens:g} tokens per head do not hold the {self.sinks} sinks and {self.recent} recent tokens that are "
            "always kept; raise the budget or lower sinks or recent"
        )

    def split(self) -> Allocator:
        return ALLOCATORS[self.allocator]() if isinstance(self.allocator, str) else self.allocator

    @property
    def turns(self) -> bool:
        """Whether the score asks the model for rotations at other times than the model does."""
        return False

    def fitted(self, heads: HeadImportance) -> Self:
        """Ready to use: with an allocator that has the head importance it asks for."""
        return replace(self, allocator=self.split().fitted(heads))

    @abstractmethod
    def score(self, scene: Scene) -> Tensor:
        """(b, h, s): the higher, the more worth keeping. What it says of protected or invalid tokens is ignored."""


def attention_sums(scene: Scene, last: int = 0, squared: bool = False) -> Tensor:
    """Attention (b, h, g, s) or its square, summed over the newest `last` queries (0: all); few at a time, to bound memory."""
    b, h, g, w = scene.queries.shape[:4]
    last = min(last or w, w)
    total = torch.zeros(b, h, g, scene.keys.shape[2], device=scene.keys.device)
    step = max(1, BLOCK // total.numel())
    for first in range(0, last, step):
        weights = scene.weights(min(first + step, last), first)
        total += (weights.square() if squared else weights).sum(3)
    return total


def pooled(scores: Tensor, kernel: int) -> Tensor:
    """Each score raised to the largest among its neighbours (b, h, s), so that clusters of tokens stay together (arXiv:2404.14469)."""
    return torch.nn.functional.max_pool1d(scores, kernel, stride=1, padding=kernel // 2) if kernel > 1 else scores
