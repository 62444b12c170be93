"""What the evicting layers of one cache share: candidates and scores, until their allocator can decide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowkey.policies.allocators import AllocationRequest

if TYPE_CHECKING:  # the layers import this module
    from lowkey.storage.evicting import EvictingLayer


@dataclass(frozen=True)
class Candidates:
    """The tokens of a layer that may stay when it evicts: sinks, then rows with gaps behind them, then dense.

    Args:
        positions: (b, R, s).
        valid: (b, R, s), False for gaps and padding.
        previous_scores: (b, R, s), what a stateful policy gave at earlier evictions; 0 for new tokens.
        sinks: how many of the s places are sinks that have left the dense tokens.
        in_rows: how many places behind them are those of the rows, as many as the longest row has tokens.
        latents: keys and values (b, G, s', r) of the dense tokens, if they have to be packed anew.
    """

    positions: Tensor
    valid: Tensor
    previous_scores: Tensor
    sinks: int
    in_rows: int
    latents: tuple[Tensor, Tensor] | None = None

    def first(self, stop: int) -> Candidates:
        """The first `stop` places."""
        cut = {name: getattr(self, name)[..., :stop] for name in ("positions", "valid", "previous_scores")}
        return replace(self, **cut)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that are held."""
        yield from (self.positions, self.valid, self.previous_scores, *(self.latents or ()))


@dataclass
class CacheWideEviction:
    """Collects the scores of a cache's layers until its allocator can decide.

    An allocator of scope `layer` decides at once for each layer, so a long prompt is never held whole. One of
    scope `cache` needs the scores of all layers; until the last layer has come, the candidates of the others
    are held here.

    Args:
        layers: how many layers of the cache evict.
        sliding_layers: for every sliding layer of the cache, (tokens that it holds at most, numbers that one
            of its tokens takes).
        rows_of_heads: for each layer, the row of each KV head; None if every head has a row of its own.
        waiting: the layers that have come in this forward pass, with their candidates and scores (b, h, s).
    """

    layers: int = 1
    sliding_layers: tuple[tuple[int, int], ...] = ()
    rows_of_heads: tuple[tuple[int, ...], ...] | None = None
    waiting: list[tuple[EvictingLayer, Candidates, Tensor]] = field(default_factory=list)

    def add(self, layer: EvictingLayer, candidates: Candidates, scores: Tensor) -> None:
        """Take the scores (b, h, s) of a layer, and evict if the allocator has all that it needs."""
        self.waiting.append((layer, candidates, scores))
        if layer.policy.resolved_allocator().scope == "layer" or len(self.waiting) == self.layers:
            self._decide()

    def _decide(self) -> None:
        # the newest layer answers for all: those before it have already left out the tokens that only score
        layer, first_slot = self.waiting[-1][0], self.waiting[0][0].layer_slot
        # layers may hold different numbers of tokens after an earlier eviction
        longest = max(s.shape[-1] for *_, s in self.waiting)
        scores = torch.stack([pad(s, (0, longest - s.shape[-1]), value=-torch.inf) for *_, s in self.waiting])
        allocator, tokens = layer.policy.resolved_allocator(), layer.tokens_seen().tolist()
        # a budget is a sequence's own, so each sequence of the batch is allocated by itself
        requests = [
            AllocationRequest(
                scores[:, i], layer.tokens_per_head(n), n, first_slot, self.layers, self.rows_of_heads
            )
            for i, n in enumerate(tokens)
        ]
        counts = torch.stack([allocator.counts(request) for request in requests], dim=1)  # (layers, b, h)
        for (own, candidates, s), c in zip(self.waiting, counts, strict=True):
            own.keep_best(candidates, s, c.to(s.device))
        self.waiting.clear()

    def waiting_tensors(self, layer: EvictingLayer) -> Iterator[Tensor]:
        """What is held here for one layer."""
        for own, candidates, scores in self.waiting:
            if own is layer:
                yield from (*candidates.tensors(), scores)
