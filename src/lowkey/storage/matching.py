"""An evicting layer whose kept tokens answer for the dropped ones (Attention Matching, arXiv:2602.16284).

An eviction leaves keys as they are and gives the tokens that it keeps a bias and new values, which are fitted
to what reference queries got before. A token that has been fitted may be fitted again, or dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowkey.models.attention_interface import Call
from lowkey.ops.least_squares import bounded_least_squares, drawn
from lowkey.ops.matching_pursuit import pursued
from lowkey.ops.ragged import pad_rows, top_mask
from lowkey.policies.base import CosAndSin, EvictionContext, Policy
from lowkey.storage.biased import Biased, with_ones
from lowkey.storage.cache_wide_eviction import CacheWideEviction, Candidates
from lowkey.storage.codec import Codec
from lowkey.storage.evicting import EvictingLayer
from lowkey.storage.exact import Exact, SinkPoints
from lowkey.storage.flaws import first_flaw
from lowkey.storage.packing import Packing
from lowkey.storage.rollback import storage_bytes
from lowkey.storage.stepping import SteppingLayer


class MatchingLayer(EvictingLayer):
    """An `EvictingLayer` that fits what it keeps; see the module's docstring.

    It stores keys and values as the model made them, with a bias beside each key, never in low rank.

    Attributes:
        reference_queries: (b, h, g, w, d), the queries of a second pass that will be matched; empty unless
            one is under way.
        reference_real: (b, w), which of them are no padding.
        pending: within a call, what an eviction under way will match: keys with the channel of their biases,
            values, and queries with a channel of ones.
    """

    reference_queries: Tensor
    reference_real: Tensor
    # A policy with `references`, `bound` and `ridge`.
    policy: Any
    pending: EvictionContext | None = None

    def __init__(
        self,
        policy: Policy,
        rope: CosAndSin,
        layer_slot: int = 0,
        cache_eviction: CacheWideEviction | None = None,
        codec: Codec | None = None,
        exact: Exact | None = None,
        packing: tuple[Packing, Packing] | None = None,
        sink_points: SinkPoints | None = None,
    ) -> None:
        super().__init__(policy, rope, layer_slot, cache_eviction, Biased(), exact, packing, sink_points)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty tensors for this batch size, device and dtype."""
        super().lazy_initialization(key_states, value_states)
        self._forget_references()

    def _forget_references(self) -> None:
        self.reference_queries = self.recent_k.new_empty(0)
        self.reference_real = torch.zeros(0, dtype=torch.bool, device=self.device)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are held, by attribute name."""
        if not self.is_initialized:
            return {}
        own = ("reference_queries", "reference_real")
        return super().tensors() | {name: getattr(self, name) for name in own}

    # -- bytes

    def predicted_nbytes(self) -> int:
        """As `EvictingLayer`'s, with the reference queries of a second pass."""
        if not self.is_initialized:
            return 0
        queries, real = self.reference_queries, self.reference_real
        return super().predicted_nbytes() + queries.numel() * queries.element_size() + real.numel()

    def held_tensors(self) -> list[Tensor]:
        """All tensors that the layer keeps alive, what a fit under way needs included."""
        return [*super().held_tensors(), *self._pending_tensors()]

    def _pending_tensors(self) -> Iterator[Tensor]:
        if (context := self.pending) is not None:
            yield from (context.keys, context.values, context.positions, context.valid, context.queries)
            yield from (context.query_positions, context.previous_scores)
            yield from () if context.visible is None else (context.visible,)

    def _waiting_bytes(self) -> int:
        return storage_bytes(self.held_tensors()) - storage_bytes(SteppingLayer.held_tensors(self))

    def own_flaw(self, heads: int, key_width: int, value_width: int) -> str | None:
        """Check the reference queries; see `PositionedLayer.own_flaw`."""
        queries, real, b = self.reference_queries, self.reference_real, len(self.offset)
        if not queries.numel():
            return None if queries.ndim == real.ndim == 1 and not len(real) else "it asks by no queries"
        fits = queries.ndim == 5 and (*queries.shape[:2], queries.shape[4]) == (b, heads, key_width)
        return first_flaw(
            None if fits else f"reference_queries is of shape {tuple(queries.shape)}",
            None if real.shape == (b, queries.shape[-2]) else f"reference_real is of {tuple(real.shape)}",
        )

    # -- references

    def _evict(
        self,
        call: Call,
        real: Tensor | None,
        chunk: tuple[Tensor, Tensor] | None,
        repetition_lse: Tensor | None = None,
    ) -> None:
        tokens = self.tokens_seen()
        if self.repeated_span is not None and not self._scores_decide_nothing(tokens):
            self._record_references(call.query, real, tokens)
            if self.frozen:  # more of the second pass is to come
                self._note_empty_call(call)
                self._forget_transient()
                return
        super()._evict(call, real, chunk, repetition_lse)
        if self.frozen:
            self.pending = None

    def _record_references(self, queries: Tensor, real: Tensor | None, tokens: Tensor) -> None:
        """Hold some of the queries (b, h, g, t, d) of a piece, as many of each sequence's as are its share.

        Args:
            queries: of the piece.
            real: (b, t), which of them are no padding; None if all are.
            tokens: (b), how many tokens each sequence has, all of which will be repeated.
        """
        b, t = len(queries), queries.shape[3]
        place = torch.arange(t, device=queries.device)
        chosen = place % _stride(tokens, self.policy.references) == 0
        chosen = chosen if real is None else chosen & real
        columns = chosen.any(0)
        new, chosen = queries[:, :, :, columns], chosen.expand(b, -1)[:, columns]
        if self.reference_queries.numel():
            new = torch.cat([self.reference_queries, new], 3)
            chosen = torch.cat([self.reference_real, chosen], 1)
        self.reference_queries, self.reference_real = new, chosen.contiguous()

    def _context(
        self,
        call: Call,
        candidates: Candidates,
        chunk: tuple[Tensor, Tensor] | None,
        repetition_lse: Tensor | None,
    ) -> EvictionContext:
        """As `EvictingLayer`'s, with biases, the reference queries, and without tokens that only score."""
        context = super()._context(call, candidates, chunk, repetition_lse)
        old, (b, h, s, _) = self._old_rows(), context.keys.shape
        biases = context.keys.new_zeros(b, h, s, 1)
        first, last = candidates.sinks, candidates.sinks + candidates.in_rows
        biases[:, :, first:last] = pad_rows(old.keys[0][..., -1], old.starts)[0].unflatten(0, (b, h))
        if self.reference_queries.numel():
            queries, visible = self.reference_queries, None
            at = torch.where(self.reference_real, self.seen, -1)  # behind all tokens
            span = self.first_index.new_tensor([[0, self.seen]]).expand(b, -1)
        else:
            queries, visible, span = context.queries, context.visible, None
            chosen = context.query_positions >= 0
            behind = chosen.flip(1).cumsum(1).flip(1) - 1  # real queries that come later
            chosen = chosen & (behind % _stride(chosen.sum(1), self.policy.references) == 0)
            columns = chosen.any(0)
            queries, at = queries[:, :, :, columns], context.query_positions.masked_fill(~chosen, -1)
            at, visible = at[:, columns], visible if visible is None else visible[:, columns]
        valid = context.valid & (torch.arange(s, device=self.device) < s - self.transient_tokens)
        context = replace(
            context,
            keys=torch.cat([context.keys, biases], -1),
            valid=valid,
            queries=with_ones(queries),
            query_positions=at,
            visible=visible,
            repeated_span=span,
        )
        # a rope that holds tensors of this call alone would keep them alive
        self.pending = replace(context, rope=self.rope, repeated_span=None, repetition_lse=None)
        return context

    # -- fitting

    def keep_best(self, candidates: Candidates, scores: Tensor, counts: Tensor) -> None:
        """As `EvictingLayer.keep_best`; then tokens that need not stay as they are get biases and values."""
        context, self.pending = self.pending, None
        if self.policy.keys == "pursuit" and context is not None and context.queries.shape[3]:
            scores = _by_pursuit(context, scores, counts, self.policy.bound, self.policy.ridge)
        chosen = top_mask(scores, counts) & candidates.valid
        dropped = (candidates.valid & ~chosen).any(-1, keepdim=True)
        free = chosen & scores.isfinite() & dropped
        first, last = candidates.sinks, candidates.sinks + candidates.in_rows
        stop = last + max(0, self.seen - self.front_start - self.exact.recent)
        in_rows = (chosen & ~self._in_sink_slots(candidates))[..., first:stop]
        super().keep_best(candidates, scores, counts)
        self._forget_references()
        if context is None or not context.queries.shape[3] or not bool(free.any()):
            return
        missing = (0, context.keys.shape[2] - chosen.shape[2])  # tokens that only scored
        biases, values = matched_tokens(
            context, pad(chosen, missing), pad(free, missing), self.policy.bound, self.policy.ridge
        )
        fitted, rows = free[..., first:stop][in_rows], self.rows
        new_keys, new_values = rows.keys[0].clone(), rows.values[0].clone()
        at = free[..., first:stop]
        new_keys[fitted, 0, -1] = biases[:, :, first:stop][at]
        new_values[fitted, 0] = values[:, :, first:stop][at]
        self._set_rows(replace(rows, keys=(new_keys,), values=(new_values,)))


def _stride(counts: Tensor, most: int) -> Tensor:
    """(b, 1): every how many of so many things (b) `most` of them can be taken."""
    return (-(-counts // most)).clamp_min(1).unsqueeze(1)


# -- which tokens stay


def _by_pursuit(
    context: EvictionContext, scores: Tensor, counts: Tensor, bound: float, ridge: float
) -> Tensor:
    """Scores by which orthogonal matching pursuit's choice stays.

    Args:
        context: as in `matched_tokens`.
        scores: (b, h, s), infinite for tokens that stay as they are, and -inf for those that cannot stay.
        counts: (b, h), how many tokens stay.
        bound: largest absolute value of a bias.
        ridge: how strongly weights are drawn to 1.

    Returns:
        The scores, 1 and 0 where they were finite.
    """
    (b, h, s), fixed, open_ = scores.shape, scores.isposinf(), scores.isfinite()
    gram = scores.new_zeros(b, h, s, s, dtype=torch.float64)
    for weights in context.attention():
        rows = pad(weights.nan_to_num(0.0).flatten(2, 3), (0, max(0, s - weights.shape[-1])))[..., :s]
        gram += rows.mT @ rows
    # what tokens that may be dropped got together, times what each of them got
    target = gram @ open_.double().unsqueeze(3)
    found = pursued(
        gram.flatten(0, 1),
        target.flatten(0, 1)[..., 0],
        open_.flatten(0, 1),
        (counts - fixed.sum(2)).clamp_min(0).flatten(),
        ridge,
        math.exp(-bound),
        math.exp(bound),
    )
    return torch.where(open_, found.view(b, h, s).to(scores.dtype), scores)


# -- the two least-squares problems


@dataclass(frozen=True)
class _Problem:
    """Normal equations of one KV head of one sequence.

    Args:
        at: (sequence, KV head).
        own: (t), the tokens that are fitted.
        kept: (n), all tokens that stay.
        gram: (t, t).
        target: (t, width).
    """

    at: tuple[int, int]
    own: Tensor
    kept: Tensor
    gram: Tensor
    target: Tensor


def matched_tokens(
    context: EvictionContext, chosen: Tensor, free: Tensor, bound: float, ridge: float
) -> tuple[Tensor, Tensor]:
    """Biases and values with which the chosen tokens answer as all tokens did.

    Args:
        context: keys (b, h, s, d + 1) whose last channel holds biases, divided by the scaling of scores;
            queries (b, h, g, w, d + 1) whose last channel is 1.
        chosen: (b, h, s), the tokens that stay.
        free: (b, h, s), those of them that are fitted; the others stay as they are.
        bound: largest absolute value that is added to a bias.
        ridge: how strongly weights are drawn to 1 and values to what they are; see `drawn`.

    Returns:
        The channel of biases (b, h, s) and values (b, h, s, d), new where tokens are fitted.
    """
    keys, values = context.keys.clone(), context.values.clone()
    for problem in _problems(context, chosen, free, 1):
        for weights in _of_head(context, problem):
            own = weights[:, problem.own]
            fixed = weights[:, problem.kept].sum(1) - own.sum(1)
            # padding has no weight at all, and nothing to match
            _add(problem, own, (weights.sum(1) - fixed).unsqueeze(1))
        mass = bounded_least_squares(
            problem.gram, problem.target[:, 0], ridge, math.exp(-bound), math.exp(bound)
        )
        i, j = problem.at
        keys[i, j, problem.own, -1] += (mass.log() / context.scaling).to(keys.dtype)
    left = replace(context, keys=keys, valid=chosen)  # attention as it will be
    for problem in _problems(context, chosen, free, values.shape[3]):
        i, j = problem.at
        before = context.values[i, j].float().masked_fill(~context.valid[i, j].unsqueeze(1), 0.0)
        for old, new in zip(_of_head(context, problem), _of_head(left, problem), strict=True):
            _add(problem, new[:, problem.own], (old - new) @ before)
        if bool(problem.gram.diagonal().any()):
            change = torch.linalg.solve(drawn(problem.gram, ridge), problem.target)
            values[i, j, problem.own] = (before[problem.own] + change).to(values.dtype)
    return keys[..., -1], values


def _problems(context: EvictionContext, chosen: Tensor, free: Tensor, width: int) -> Iterator[_Problem]:
    """The problem of every KV head that has tokens to fit, with empty normal equations."""
    for at in free.any(-1).nonzero().tolist():
        own, kept = (x[at[0], at[1]].nonzero().squeeze(1) for x in (free, chosen))
        gram = torch.zeros(len(own), len(own), dtype=torch.float64, device=own.device)
        yield _Problem((at[0], at[1]), own, kept, gram, gram.new_zeros(len(own), width))


def _of_head(context: EvictionContext, problem: _Problem) -> Iterator[Tensor]:
    """The weights (g w, s) of all reference queries of one KV head of one sequence, in blocks."""
    (i, j), s = problem.at, context.keys.shape[2]
    one = {
        name: getattr(context, name)[i : i + 1, j : j + 1]
        for name in ("keys", "values", "positions", "valid", "queries", "previous_scores")
    }
    visible = context.visible
    own = replace(
        context,
        **one,
        query_positions=context.query_positions[i : i + 1],
        visible=visible if visible is None or len(visible) == 1 else visible[i : i + 1],
    )
    for weights in own.attention():
        # a query may come before every token that is left
        yield pad(weights.nan_to_num(0.0)[0, 0].flatten(0, 1), (0, s - weights.shape[-1]))


def _add(problem: _Problem, rows: Tensor, wanted: Tensor) -> None:
    """Add equations `rows @ x = wanted` to the normal equations."""
    problem.gram.add_(rows.mT @ rows)
    problem.target.add_(rows.mT @ wanted)
