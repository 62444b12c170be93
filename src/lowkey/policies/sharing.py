"""What a token allocator is (`TokenAllocator`), and what it is asked (`AllocationRequest`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from lowkey.core.options import Checked
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
        mass: (n, h, s), what the tokens weigh where shares of a layer's mass are counted; None for their
            scores.
    """

    scores: Tensor
    mean_tokens: float
    tokens_seen: int
    first_layer: int
    total_layers: int
    rows_of_heads: Sequence[Sequence[int]] | None = None
    protected: int = 0
    mass: Tensor | None = None

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
        weighs: whether counts depend on `AllocationRequest.mass`.
    """

    scope: ClassVar[Scope]
    summary: ClassVar[str]
    bounded: ClassVar[bool] = True
    scores_decide: ClassVar[Literal["nothing", "heads", "layers"]] = "layers"
    weighs: ClassVar[bool] = False

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
        return apportioned(request, own.double(), int(own.sum()))


def apportioned(request: AllocationRequest, weights: Tensor, total: int) -> Tensor:
    """Split `total` tokens over the heads in scope in proportion to weights (n, h), within what each can
    hold.
    """
    counts = apportion(weights.flatten(), total, request.minimum.flatten(), request.maximum.flatten())
    return counts.view(request.scores.shape[:2])


def equal_counts(known: KnownBefore) -> Tensor:
    """Counts (layers, h) if all layers get the same, and all heads of a layer."""
    h, rows = known.heads, []
    for layer in range(known.layers):
        total = min(max(known.share(layer, 1), h * known.protected), h * known.tokens_seen)
        rows.append([total // h + (head < total % h) for head in range(h)])
    return torch.tensor(rows)


def split_over_cache(known: KnownBefore, weights: Tensor, base: float) -> Tensor:
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
