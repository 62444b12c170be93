"""What the evicting layers of one cache share: candidates and scores, until their allocator can decide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowkey.policies.sharing import AllocationRequest
from lowkey.storage.budgets import budget_of, protected_tokens

if TYPE_CHECKING:  # the layers import this module
    from lowkey.storage.evicting import EvictingLayer


Shapes = tuple[tuple[int, int], ...]
"""(heads, width) of a layer's stored keys and of its stored values."""


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
        mass: (b, R, s), what the tokens weigh; see `Policy.score_and_mass`. None for their scores.
    """

    positions: Tensor
    valid: Tensor
    previous_scores: Tensor
    sinks: int
    in_rows: int
    latents: tuple[Tensor, Tensor] | None = None
    mass: Tensor | None = None

    def first(self, stop: int) -> Candidates:
        """The first `stop` places."""
        cut = {name: getattr(self, name)[..., :stop] for name in ("positions", "valid", "previous_scores")}
        return replace(self, **cut, mass=None if self.mass is None else self.mass[..., :stop])

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that are held."""
        yield from (self.positions, self.valid, self.previous_scores, *(self.latents or ()))
        if self.mass is not None:
            yield self.mass


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
        stored_shapes: for each layer, (heads, width) of stored keys and of stored values; None if all layers
            are alike.
        waiting: the layers that have come in this forward pass, with their candidates and scores (b, h, s).
    """

    layers: int = 1
    sliding_layers: tuple[tuple[int, int], ...] = ()
    rows_of_heads: tuple[tuple[int, ...], ...] | None = None
    stored_shapes: tuple[Shapes, ...] | None = None
    waiting: list[tuple[EvictingLayer, Candidates, Tensor]] = field(default_factory=list)

    def shapes(self, own: Shapes) -> tuple[Shapes, ...]:
        """The stored shapes of every layer that evicts, given those of one of them."""
        return self.stored_shapes or (own,) * self.layers

    def sliding_numbers(self, tokens: int) -> int:
        """How many numbers the sliding layers hold of a sequence of so many tokens."""
        return sum(min(tokens, most) * numbers for most, numbers in self.sliding_layers)

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
        masses = [c.mass for _, c, _ in self.waiting if c.mass is not None]  # of all layers, or of none
        mass = torch.stack([pad(m, (0, longest - m.shape[-1])) for m in masses]) if masses else None
        # a budget is a sequence's own, so each sequence of the batch is allocated by itself
        sinks, recent = protected_tokens(layer.policy, layer.exact)
        sequences = torch.stack([layer.tokens_seen(), layer.protected_prompt()], 1).tolist()
        requests = [
            AllocationRequest(
                scores[:, i],
                layer.tokens_per_head(n, prompt),
                n,
                first_slot,
                self.layers,
                self.rows_of_heads,
                min(n, max(prompt, sinks) + recent),
                None if mass is None else mass[:, i],
            )
            for i, (n, prompt) in enumerate(sequences)
        ]
        counts = torch.stack([self._counts(layer, request) for request in requests], 1)  # (layers, b, h)
        for (own, candidates, s), c in zip(self.waiting, counts, strict=True):
            own.keep_best(candidates, s, c.to(s.device))
        self.waiting.clear()

    def _counts(self, layer: EvictingLayer, request: AllocationRequest) -> Tensor:
        """How many tokens each layer and head keeps (n, h)."""
        policy, costs, n = layer.policy, layer.costs(), request.tokens_seen
        allocator = policy.resolved_allocator()
        in_bytes = budget_of(policy).unit in ("bytes", "bytes/token")
        competing = allocator.scope == "cache" and allocator.scores_decide == "layers"
        if not (n and in_bytes and competing) or costs.layers_are_alike or request.mean_tokens >= n:
            return allocator.counts(request)

        def counted(mean: float) -> Tensor:
            return allocator.counts(replace(request, mean_tokens=mean))

        # the budget bounds bytes, and only counts tell which layers these are in
        most = costs.most_tokens(
            costs.bytes_left(policy, n), lambda mean: costs.bytes_of(counted(mean).sum(1).tolist())
        )
        return counted(most)

    def waiting_tensors(self, layer: EvictingLayer) -> Iterator[Tensor]:
        """What is held here for one layer."""
        for own, candidates, scores in self.waiting:
            if own is layer:
                yield from (*candidates.tensors(), scores)
