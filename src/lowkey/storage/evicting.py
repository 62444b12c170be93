"""A layer whose policy decides which of its older tokens each head keeps.

New tokens are stored densely, as in a `CodedLayer`: by a codec and a packing, with sinks and recent tokens
exact. An eviction takes place after every chunk (a prompt, or a later turn), and after every `policy.every`
steps of decoding. The layer collects its *candidates* (sinks, rows and dense tokens), the policy scores them
for each KV head, and the allocator says how many each *row* keeps. A row is one KV head of one sequence, or
the heads of a sequence that share a latent; their scores are pooled. What is kept and has left the exact
window moves into ragged rows (`lowkey.storage.rows`); all else is freed. Kept tokens keep their positions.

A query meets the dense tokens and the rows, and the outputs are merged by log-sum-exp. Nothing that is stored
is ever overwritten, so a forward pass that fails can be undone (`rollback`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lowkey.backends import grouped
from lowkey.backends.segment import Part, merge_parts
from lowkey.core.types import Budget
from lowkey.models.attention_interface import Call
from lowkey.ops.ragged import join_rows, pad_rows, row_of, select_rows, starts_of, top_mask
from lowkey.policies.base import CosAndSin, EvictionContext, Policy
from lowkey.storage.budgets import EvictionCosts
from lowkey.storage.cache_wide_eviction import CacheWideEviction, Candidates
from lowkey.storage.chunk import attend_to_chunk, visible_in_chunk
from lowkey.storage.codec import Codec, Plain
from lowkey.storage.coded import CodedLayer
from lowkey.storage.exact import Exact, SinkPoints
from lowkey.storage.packing import Packing
from lowkey.storage.positioned import RaggedLayer
from lowkey.storage.rollback import Snapshot, storage_bytes
from lowkey.storage.rows import (
    Rows,
    attend_to_rows,
    joined_rows,
    pack_rows,
    rows_nbytes,
    select_row_numbers,
    select_tokens,
    tokens_of_dense,
    unpack_rows,
)

LARGEST_SCORE = 1e30  # finite, since +inf and -inf mean "stays in any case" and "there is no token"


class EvictingLayer(RaggedLayer, CodedLayer):
    """Keeps in every row the tokens that a policy scores highest; see the module's docstring.

    Args:
        policy: score, allocator and budget.
        rope: cos and sin of the model at chosen positions, for policies that rotate keys or queries.
        layer_slot: which of the cache's evicting layers this is.
        cache_eviction: what the layers of one cache share; None for a layer on its own.
        codec: the form of stored tokens; None for the model's own.
        exact: sinks and recent tokens that are held as the model made them; None for none.
        packing: how stored keys and values are written down; None for the model's own numbers.
        sink_points: how sinks are recognised; None if they are each sequence's first tokens.

    Attributes:
        rows_keys..., rows_values...: the tensors of the packings of the kept tokens, row after row.
        rows_positions: (n), their positions.
        rows_starts: (b R + 1), where each row begins.
        rows_scores: (n), scores from earlier evictions; empty unless the policy is stateful.
        dense_scores: (b, R, w), the same for the w oldest dense tokens; empty unless the policy is stateful.
        recorded_queries: (b, h, g, w, d), the queries of the decode steps since the last eviction; empty
            unless the policy will use them.
        kept_entries: n.
        decode_steps: steps of decoding so far.
        frozen: whether eviction is switched off.
        score_only_tokens: so many tokens at the end of each chunk score the others and are then forgotten.
            They are neither stored nor counted as seen.
        repeated_span: (start, stop) if those tokens repeat an earlier part of the sequence, counted from its
            first token; else None.
        expected_tokens: tokens that will be given again after an eviction, for which the budget keeps room.
        empty_call: the last call, without queries, for evictions that score nothing new.
    """

    saved_counters = (*CodedLayer.saved_counters, "front_start", "kept_entries", "decode_steps", "frozen")

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
        super().__init__(codec or Plain(), exact, packing, sink_points)
        # padding between turns is refused whatever the form, see `RaggedLayer.check_mask`
        self.form_depends_on_age = False
        self.policy, self.rope, self.layer_slot = policy, rope, layer_slot
        self.cache_eviction = cache_eviction or CacheWideEviction()
        self._reset_counters()

    def _reset_counters(self) -> None:
        self.front_start = self.kept_entries = self.decode_steps = 0
        self.transient_tokens = self.expected_tokens = 0
        self.frozen = False
        self.repeated_span: tuple[int, int] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty tensors for this batch size, device and dtype."""
        super().lazy_initialization(key_states, value_states)
        b, h = key_states.shape[:2]
        self.row_heads = h // self.codec.heads_per_row
        starts = torch.zeros(b * self.row_heads + 1, dtype=torch.long, device=self.device)
        empty = {
            name: pack_rows(packing, key_states.new_empty(0, self._latents(name), width), starts)
            for (name, packing), (_, width) in zip(self.packing.items(), self.shapes.values(), strict=True)
        }
        no_scores = torch.zeros(0, dtype=torch.float32, device=self.device)
        positions = torch.zeros(0, dtype=torch.int32, device=self.device)
        self._set_rows(Rows(empty["keys"], empty["values"], positions, starts, no_scores))
        self.dense_scores = no_scores.new_zeros(b, self.row_heads, 0) if self.policy.stateful else no_scores
        self.recorded_queries = key_states.new_empty(0)

    def _latents(self, name: str) -> int:
        """How many latents of `keys` or `values` a row holds of each token."""
        return self.shapes[name][0] // self.row_heads

    def _row_attributes(self, name: str) -> list[str]:
        """The attributes that hold what the packing of `keys` or `values` stores of the rows."""
        return [f"rows_{attribute}" for attribute in self.packed_attributes(name)]

    @property
    def rows(self) -> Rows:
        """The kept tokens that have left the exact window."""
        keys, values = (
            tuple(getattr(self, attribute) for attribute in self._row_attributes(name))
            for name in self.packing
        )
        return Rows(keys, values, self.rows_positions, self.rows_starts, self.rows_scores)

    def _set_rows(self, rows: Rows) -> None:
        for name, parts in (("keys", rows.keys), ("values", rows.values)):
            for attribute, part in zip(self._row_attributes(name), parts, strict=True):
                setattr(self, attribute, part)
        self.rows_positions, self.rows_starts, self.rows_scores = rows.positions, rows.starts, rows.scores
        self.kept_entries = len(rows.positions)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are held, by attribute name."""
        if not self.is_initialized:
            return {}
        stored = [attribute for name in self.packing for attribute in self._row_attributes(name)]
        others = ("rows_positions", "rows_starts", "rows_scores", "dense_scores", "recorded_queries")
        return super().tensors() | {name: getattr(self, name) for name in (*stored, *others)}

    def growing_dims(self) -> dict[str, int]:
        """None: an eviction replaces all tensors."""
        return {}

    # -- bytes

    def nbytes(self) -> int:
        """The bytes of the storages that are really held, candidates of an eviction under way included."""
        return super().nbytes() + self._waiting_bytes()

    def _waiting_bytes(self) -> int:
        """What `cache_eviction` holds for this layer, beyond what the layer holds itself."""
        own = list(self.tensors().values())
        return storage_bytes([*own, *self.cache_eviction.waiting_tensors(self)]) - storage_bytes(own)

    def restore(self, before: Snapshot) -> None:
        """Go back to an earlier state, and give up an eviction that was under way."""
        super().restore(before)
        self.cache_eviction.waiting.clear()

    def _packed_token_bytes(self) -> float:
        """The bytes of one stored token of one row, without its position."""
        size = self.recent_k.element_size()
        return sum(
            self._latents(name) * packing.nbytes(packing.block, self.shapes[name][1], size) / packing.block
            for name, packing in self.packing.items()
        )

    def _exact_token_bytes(self) -> int:
        """The bytes of one exact token of one row."""
        return self.codec.heads_per_row * 2 * self.recent_k.shape[-1] * self.recent_k.element_size()

    @property
    def entry_bytes(self) -> float:
        """The bytes of one kept token of one row: keys, values, position and, if held, score."""
        score = 4 if self.policy.stateful else 0
        return self._packed_token_bytes() + self.rows_positions.element_size() + score

    def index_bytes(self) -> int:
        """The bytes that are held whatever is kept: row starts, where sequences begin, and sink slots."""
        b = len(self.offset)
        sinks = self.exact.sinks * self.sink_index.element_size()
        return len(self.rows_starts) * self.rows_starts.element_size() + b * (
            2 * self.offset.element_size() + sinks
        )

    def costs(self, tokens: Tensor) -> EvictionCosts:
        """The costs of this layer's whole cache, for sequences that have seen so many tokens (b)."""
        b, itemsize, layers = len(self.offset), self.recent_k.element_size(), self.cache_eviction.layers
        rows = self.row_heads * layers
        stored = self._stored_until() + self.expected_tokens
        sliding = itemsize * sum(
            min(stored, most) * numbers for most, numbers in self.cache_eviction.sliding_layers
        )
        scores = 4 if self.policy.stateful else 0  # of an exact token, in each row
        # the last block of a row is filled up, at most by all but one of its tokens
        filled = rows * (self.block - 1) * self._packed_token_bytes()
        # tokens that are given again stay dense; those that fill no block yet are exact
        held_back = min(self.expected_tokens, self.block - 1)
        extra = self._exact_token_bytes() - self._packed_token_bytes()
        expected = self.expected_tokens * self._packed_token_bytes() + held_back * extra
        return EvictionCosts(
            heads=rows,
            sequences=b,
            entry_bytes=self.entry_bytes,
            fixed_bytes=layers * self.index_bytes() / b + sliding + filled,
            exact_tokens=self.exact.sinks + self.exact.recent,
            exact_extra_bytes=self._exact_token_bytes() + scores - self.entry_bytes,
            expected_tokens=self.expected_tokens,
            expected_bytes=rows * expected,
        )

    def predicted_nbytes(self) -> int:
        """The bytes of dense tokens, of the rows, of indices, scores and recorded queries."""
        if not self.is_initialized:
            return 0
        size = self.recent_k.element_size()
        stored = sum(
            rows_nbytes(packing, self.rows_starts, self._latents(name), self.shapes[name][1], size)
            for name, packing in self.packing.items()
        )
        scores = self.kept_entries + self.dense_scores.numel() if self.policy.stateful else 0
        return (
            super().predicted_nbytes()
            + stored
            + self.kept_entries * self.rows_positions.element_size()
            + len(self.rows_starts) * self.rows_starts.element_size()
            + scores * 4
            + self.recorded_queries.numel() * self.recorded_queries.element_size()
            + self._waiting_bytes()
        )

    # -- counts

    def tokens_seen(self) -> Tensor:
        """(b): how many tokens each sequence has seen, without padding and tokens that only score."""
        return (self._stored_until() - self.first_index[:, 0]).clamp_min(0)

    def tokens_per_head(self, tokens: int) -> float:
        """The budget of a sequence that has seen `tokens` tokens.

        Returns:
            Tokens per head, on average over heads, without those that are expected.
        """
        if self.policy.budget is None:
            return tokens
        budget = Budget.parse(self.policy.budget)
        if budget.unit == "%":
            return max(0.0, budget.amount / 100 * (tokens + self.expected_tokens) - self.expected_tokens)
        if budget.unit == "tokens":
            return max(0.0, budget.amount - self.expected_tokens)
        return self.costs(self.tokens_seen()).tokens_per_head(self.policy, tokens) if tokens else 0

    def kept_positions(self, sequence: int) -> list[Tensor]:
        """For each KV head, the positions that are held for a sequence of the batch, ascending."""
        candidates = self._candidates(None)
        rows = [
            positions[valid].sort().values
            for positions, valid in zip(
                candidates.positions[sequence], candidates.valid[sequence], strict=True
            )
        ]
        heads = torch.arange(self.row_heads).repeat_interleave(self.codec.heads_per_row).unsqueeze(0)
        return [rows[i] for i in self._in_model_order(heads)[0].tolist()]

    # -- attending

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Answer the call, store the new tokens, and evict if it is time; see `StoringLayer.attend`."""
        t = keys.shape[2]
        real = self.locate_tokens(call, t)
        is_step = bool(self.decoding_rows(t).all())
        if not is_step:
            self.check_decoding(t, self.policy.every, self.block)
        self.transient_tokens = self.score_only_tokens
        keys, values = self._in_codec_order(keys), self._in_codec_order(values)
        ordered = replace(call, query=self._in_codec_order(call.query))
        buffers = self._take_in(keys, values, real)
        parts, repetition_lse = self._parts(keys, values, ordered, buffers, self.exact_rows(real))
        out = merge_parts(parts)[0] if len(parts) > 1 else parts[0][0]
        if is_step:
            self._after_step(call)
        else:
            chunk = (keys, values) if self.seen - self.front_start == t else None
            if repetition_lse is not None:
                repetition_lse = self._in_model_order(repetition_lse)
            self._evict(call, real, chunk, repetition_lse)
        return self._in_model_order(out).to(values.dtype)

    def _parts(
        self, keys: Tensor, values: Tensor, call: Call, buffers: tuple[Tensor, Tensor], exact: Tensor
    ) -> tuple[list[Part], Tensor | None]:
        """Attention over all that is held and the new tokens.

        Args:
            keys: (b, h, t, d), new, heads in the codec's order.
            values: the same.
            call: the attention call, heads in the codec's order.
            buffers: as `_take_in` returns them.
            exact: (b), the sequences that see the chunk as it came.

        Returns:
            The parts, and with a repeated span the log-sum-exp (b, h, g, t) over the span and over the tokens
            of the repetition itself.
        """
        if self.repeated_span is not None and call.query.shape[3] > 1:
            inside = self._in_repetition(keys.shape[2])
            mask = call.full_mask(self.seen)
            assert mask is not None  # of several queries
            split = [replace(call, mask=mask & side.unsqueeze(1)) for side in (inside, ~inside)]
            dense = [self._dense_part(side, buffers, exact) for side in split]
            rows = self._row_parts(call, split=True)
            lse = torch.stack([dense[0][1], *(part[1] for part in rows[::2])]).logsumexp(0)
            return [*dense, *rows], lse
        rows = self._row_parts(call)
        came_as_stored = self.is_lossless or (self.exact_prefill and bool(exact.all()))
        if self.seen - self.front_start == keys.shape[2] and came_as_stored:
            return [attend_to_chunk(call, keys, values, self.seen), *rows], None
        if rows:
            return [self._dense_part(call, buffers, exact), *rows], None
        out = grouped.attend(self._segments(call, *buffers, exact), call.scaling, call.softcap)
        return [(out, out.new_zeros(()))], None

    def _dense_part(self, call: Call, buffers: tuple[Tensor, Tensor], exact: Tensor) -> Part:
        segments = self._segments(call, *buffers, exact)
        return grouped.partial(segments, call.scaling, call.softcap)

    def _in_repetition(self, t: int) -> Tensor:
        """(b, s): which of the tokens seen are of the repeated span, or among the newest `t`."""
        index = torch.arange(self.seen, device=self.device)
        number = index - self.first_index
        start, stop = self.repeated_span or (0, 0)
        return ((number >= start) & (number < stop)) | (index >= self.seen - t)

    def _row_parts(self, call: Call, split: bool = False) -> list[Part]:
        """Attention over the rows; if `split`, over the repeated span and over all else by itself."""
        if not self.kept_entries:
            return []
        keys, values = self._unpacked(self.rows)
        positions, starts = self.rows_positions, self.rows_starts
        sets = [(keys, values, positions, starts)]
        if split:
            row = row_of(starts)
            number = positions - self._first_positions()[row // self.row_heads, 0, 0]
            start, stop = self.repeated_span or (0, 0)
            inside = (number >= start) & (number < stop)
            counts = torch.zeros_like(starts[1:]).index_add_(0, row, inside.long())
            sets = [
                (keys[chosen], values[chosen], positions[chosen], starts_of(lengths))
                for chosen, lengths in ((inside, counts), (~inside, starts.diff() - counts))
            ]
        at = self.positions_of(self.seen - call.query.shape[3], self.seen)
        return [
            attend_to_rows(self.codec, call.query, at, *some, call.scaling, call.softcap) for some in sets
        ]

    def _unpacked(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Keys (n, a, r_K) and values (n, a', r_V) of some rows."""
        keys, values = (
            unpack_rows(packing, parts, self.shapes[name][1], rows.starts)
            for (name, packing), parts in zip(self.packing.items(), (rows.keys, rows.values), strict=True)
        )
        return keys, values

    def _after_step(self, call: Call) -> None:
        """Count a step of decoding; evict if it is time."""
        self.decode_steps += 1
        if not self.policy.every or self.frozen:
            return
        if self.policy.uses_queries:
            self.recorded_queries = self._with_recorded_queries(call.query, clone=True)
        if self.decode_steps % self.policy.every == 0:
            # the step's query was just recorded, so the call brings no other
            self._evict(replace(call, query=call.query[:, :, :, :0]), None, None)

    def _with_recorded_queries(self, query: Tensor, clone: bool = False) -> Tensor:
        """The recorded queries with these (b, h, g, t, d) behind them; `clone` if they are to be held."""
        if self.recorded_queries.numel():
            return torch.cat([self.recorded_queries, query], 3)
        return query.clone() if clone else query

    # -- evicting

    def _old_rows(self) -> Rows:
        """The rows as they are before an eviction."""
        return self.rows

    def _candidates(self, real: Tensor | None) -> Candidates:
        """Sinks that have left the dense tokens, rows, and dense tokens, in this order.

        Args:
            real: (b, t), which of the newest tokens are no padding; None if all are.
        """
        b, old = len(self.offset), self._old_rows()
        sinks = (self.sink_index.long() - self.offset).unsqueeze(1).expand(-1, self.row_heads, -1)
        sinks_valid = (self.sink_index < self.front_start).unsqueeze(1).expand_as(sinks)
        in_rows, rows_valid = (
            x.unflatten(0, (b, self.row_heads)) for x in pad_rows(old.positions.long(), old.starts)
        )
        dense = self.positions_of(self.front_start, self.seen)
        valid = torch.arange(self.front_start, self.seen, device=self.device) >= self.first_index
        if real is not None:
            valid = torch.cat([valid[:, : valid.shape[1] - real.shape[1]], real], 1)
        dense, valid = (x.unsqueeze(1).expand(-1, self.row_heads, -1) for x in (dense, valid))
        scores = torch.zeros(b, self.row_heads, 0, device=self.device)
        if self.policy.stateful:
            in_row = pad_rows(old.scores, old.starts)[0].unflatten(0, (b, self.row_heads))
            new = dense.shape[2] - self.dense_scores.shape[2]
            scores = torch.cat(
                [
                    scores.new_zeros(sinks.shape),
                    in_row,
                    self.dense_scores,
                    scores.new_zeros(*dense.shape[:2], new),
                ],
                2,
            )
        else:
            scores = scores.new_zeros(1).expand(
                b, self.row_heads, sinks.shape[2] + in_rows.shape[2] + dense.shape[2]
            )
        return Candidates(
            torch.cat([sinks, in_rows, dense], 2),
            torch.cat([sinks_valid, rows_valid, valid], 2),
            scores,
            sinks.shape[2],
            in_rows.shape[2],
        )

    def _candidates_as_read(
        self, candidates: Candidates, chunk: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (b, h, s, d) of the candidates, heads in the model's order.

        Args:
            candidates: from `_candidates`.
            chunk: the dense tokens as they came, if the newest call brought all of them; else they are read
                as they are stored.
        """
        b, old = len(self.offset), self._old_rows()
        stored = []
        for latents in self._unpacked(old):
            dense = pad_rows(latents, old.starts)[0].unflatten(0, (b, self.row_heads))
            stored.append(dense.transpose(2, 3).flatten(1, 2))
        first = candidates.sinks
        positions = candidates.positions[..., first : first + candidates.in_rows]
        positions = positions.repeat_interleave(self.codec.heads_per_row, 1)
        rows = self.codec.rebuilt_keys(stored[0], positions), self.codec.expand_values(stored[1])
        both = zip((self.sink_k, self.sink_v), rows, chunk or self._dense_as_read(), strict=True)
        keys, values = (self._in_model_order(torch.cat(parts, 2)) for parts in both)
        return keys, values

    def _dense_as_read(self) -> tuple[Tensor, Tensor]:
        """Keys and values (b, h, s, d) of the dense tokens, as they are stored."""
        count = self.seen - self.front_start
        index = torch.arange(self.front_start, self.seen, device=self.device)
        slot = index - self._first_slot_index()
        stored = self.storable()[0]
        slots = self._indices_of_slots(0, stored) - self.offset
        latents = self._unpacked_dense()
        decoded = self.codec.rebuilt_keys(latents[0], slots), self.codec.expand_values(latents[1])
        is_stored = ((slot >= 0) & (slot < stored))[:, None, :, None]
        out = []
        for whole, recent in zip(decoded, (self.recent_k, self.recent_v), strict=True):
            exact = torch.nn.functional.pad(recent, (0, 0, count - recent.shape[2], 0))
            at = slot.clamp(0, max(0, stored - 1)).expand(len(exact), -1)[:, None, :, None].expand_as(exact)
            out.append(torch.where(is_stored, whole.gather(2, at), exact) if stored else exact)
        return out[0], out[1]

    def _unpacked_dense(self) -> tuple[Tensor, Tensor]:
        """Stored keys (b, G, s, r_K) and values (b, G', s, r_V) of all slots."""
        keys, values = (
            packing.unpack(self.packed_tensors(name), self.shapes[name][1])
            for name, packing in self.packing.items()
        )
        return keys, values

    def evict(self) -> None:
        """Evict now, by the scores that the tokens have from earlier calls."""
        self._evict(self.empty_call, None, None)

    def _evict(
        self,
        call: Call,
        real: Tensor | None,
        chunk: tuple[Tensor, Tensor] | None,
        repetition_lse: Tensor | None = None,
    ) -> None:
        """Score the candidates and pass them on to the allocator.

        Args:
            call: the attention call, heads in the model's order; its queries are the newest.
            real: (b, t), which of the newest tokens are no padding; None if all are.
            chunk: keys and values (b, h, t, d) in the codec's order, if these are all dense tokens.
            repetition_lse: (b, h, g, t), with a repeated span; see `EvictionContext`.
        """
        tokens = self.tokens_seen()
        # not a slice of the queries, which would keep all of them alive
        no_query = call.query.new_empty(*call.query.shape[:3], 0, call.query.shape[4])
        self.empty_call = Call(no_query, None, None, call.scaling, call.softcap)
        if self._scores_decide_nothing(tokens):
            self._forget_transient()
            self.recorded_queries = self.recorded_queries.new_empty(0)
            return
        candidates = self._candidates(real)
        scores = self._pooled(self.policy.score(self._context(call, candidates, chunk, repetition_lse)))
        number = candidates.positions - self._first_positions()  # counted from each sequence's first token
        # a sequence for which this call is a step of decoding evicts nothing: alone, it would not either
        stepping = self.decoding_rows(call.query.shape[3])[:, None, None]
        candidates = replace(
            candidates,
            previous_scores=torch.where(stepping, candidates.previous_scores, scores),
            # tokens that only score come last, and are no longer candidates
            valid=candidates.valid & (number < tokens[:, None, None]),
        )
        protected = max(self.policy.recent, self.exact.recent)
        stays = stepping | (number < self.policy.sinks) | (number >= (tokens - protected)[:, None, None])
        stays = stays | self._in_sink_slots(candidates)
        scores = scores.nan_to_num(0.0).clamp(-LARGEST_SCORE, LARGEST_SCORE)
        scores = scores.masked_fill(stays, torch.inf).masked_fill(~candidates.valid, -torch.inf)
        latents = None
        if self.block > 1 and not self.frozen:
            latents = self._latents_of_dense(chunk)
        stop = candidates.positions.shape[2] - self.transient_tokens
        candidates, scores = candidates.first(stop), scores[..., :stop]
        self._forget_transient()
        if self.frozen:
            self._remember(candidates)
        else:
            self.cache_eviction.add(self, replace(candidates, latents=latents), scores)

    def _forget_transient(self) -> None:
        """Drop the tokens that only scored the others."""
        count = self.transient_tokens
        if count:
            self.seen -= count
            self.transient_tokens = 0
            length = self.recent_k.shape[2] - count
            self.recent_k = self.recent_k[:, :, :length].clone()
            self.recent_v = self.recent_v[:, :, :length].clone()

    def _pooled(self, scores: Tensor) -> Tensor:
        """Scores (b, h, s) of KV heads in the model's order -> scores (b, R, s) of rows."""
        scores = self._in_codec_order(scores.float())
        if self.codec.heads_per_row == 1:
            return scores
        heads = scores.unflatten(1, (self.row_heads, -1))
        return heads.amax(2) if self.policy.head_pooling == "max" else heads.mean(2)

    def _in_sink_slots(self, candidates: Candidates) -> Tensor:
        """(b, 1, s): which candidates are held as exact sinks."""
        positions = candidates.positions[:, :1].unsqueeze(-1)
        sinks = (self.sink_index.long() - self.offset)[:, None, None]
        is_sink = (positions == sinks).any(-1)
        # rows never hold a sink, and another row may hold another position at the same place
        is_sink[..., candidates.sinks : candidates.sinks + candidates.in_rows] = False
        return is_sink

    def _scores_decide_nothing(self, tokens: Tensor) -> bool:
        """Whether all of these tokens (b) stay, and no later eviction will read their scores.

        Raises:
            LowkeyError: for a budget of bytes that is too small.
        """
        if self.frozen and not self.score_only_tokens:
            return True
        if self.policy.budget is None:
            return False
        self.costs(tokens).check(self.policy, tokens.tolist())
        fits = all(self.tokens_per_head(n) >= n for n in tokens.tolist())
        return fits and (self.policy.needs_second_pass or not self.policy.stateful)

    def _context(
        self,
        call: Call,
        candidates: Candidates,
        chunk: tuple[Tensor, Tensor] | None,
        repetition_lse: Tensor | None,
    ) -> EvictionContext:
        """What the policy's score is given."""
        queries, first = self._with_recorded_queries(call.query), self._first_positions()
        w, t = queries.shape[3], call.query.shape[3]

        def rope(positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
            # a score counts positions from each sequence's first token, the model may not
            shift = first.view(-1, 1).repeat_interleave(len(positions) // len(first), 0)
            return self.rope(positions + shift, like)

        span = None
        if self.repeated_span is not None:
            span = torch.tensor([self.repeated_span], device=self.device).expand(len(first), 2)
        keys, values = self._candidates_as_read(candidates, chunk)
        return EvictionContext(
            keys=keys,
            values=values,
            positions=self._of_heads(candidates.positions - first),
            valid=self._of_heads(candidates.valid),
            queries=queries,
            query_positions=self.query_positions(w, candidates.valid[:, 0, -t:] if t else None),
            scaling=call.scaling,
            softcap=call.softcap,
            rope=rope,
            previous_scores=self._of_heads(candidates.previous_scores),
            repeated_span=span,
            repetition_lse=repetition_lse,
            visible=visible_in_chunk(call, candidates.valid[:, 0, -t:] if t else None, self.seen, w),
        )

    def query_positions(self, count: int, real: Tensor | None) -> Tensor:
        """The positions (b, count) of the newest queries, counted from each sequence's first token.

        Args:
            count: how many, recorded ones included; those are never of padding.
            real: (b, t), which of the newest t are no padding, for those that are; None if all are.

        Returns:
            Positions, -1 for queries of padding.
        """
        at = self.positions_of(self.seen - count, self.seen) - self._first_positions().squeeze(2)
        if real is not None:
            at[:, count - real.shape[1] :] = at[:, count - real.shape[1] :].masked_fill(~real, -1)
        return at

    def _of_heads(self, x: Tensor) -> Tensor:
        """What rows have (b, R, s), for each KV head in the model's order (b, h, s)."""
        return self._in_model_order(x.repeat_interleave(self.codec.heads_per_row, 1))

    def _first_positions(self) -> Tensor:
        """(b, 1, 1): the position of each sequence's first token."""
        return (self.first_index - self.offset).unsqueeze(2)

    def _remember(self, candidates: Candidates) -> None:
        """Note the scores of candidates that all stay where they are."""
        if not self.policy.stateful:
            return
        first, last = candidates.sinks, candidates.sinks + candidates.in_rows
        valid = candidates.valid[..., first:last]
        self.rows_scores = candidates.previous_scores[..., first:last][valid]
        self.dense_scores = candidates.previous_scores[..., last:].clone()

    def _latents_of_dense(self, chunk: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Latents (b, G, s, r) of all dense tokens, for a packing that packs blocks of tokens.

        They are encoded from the tokens as they came where these are at hand, so that they are rounded once.
        """
        keys, values = chunk or self._dense_as_read()
        return self.codec.encode(keys, values, self.positions_of(self.front_start, self.seen))

    def keep_best(self, candidates: Candidates, scores: Tensor, counts: Tensor) -> None:
        """Keep the candidates with the highest scores in every row; the others are freed.

        Args:
            candidates: all tokens that may stay.
            scores: (b, R, s).
            counts: (b, R), how many each row keeps.
        """
        chosen = top_mask(scores, counts)
        first, last = candidates.sinks, candidates.sinks + candidates.in_rows
        leaving = max(0, self.seen - self.front_start - self.exact.recent)
        from_rows = chosen[..., first:last][candidates.valid[..., first:last]]
        from_dense = (chosen & ~self._in_sink_slots(candidates))[..., last : last + leaving]
        old = self._old_rows()
        old_lengths = chosen[..., first:last].sum(-1).flatten()
        old_starts, new_starts = starts_of(old_lengths), starts_of(from_dense.sum(-1).flatten())
        parts = []
        for i, (name, packing) in enumerate(self.packing.items()):
            kept = select_tokens(
                packing, (old.keys, old.values)[i], self.shapes[name][1], old.starts, from_rows
            )
            dense = self.packed_tensors(name) if candidates.latents is None else (candidates.latents[i],)
            new = tuple(tokens_of_dense(x[:, :, :leaving], self.row_heads, from_dense) for x in dense)
            if candidates.latents is not None and packing.block == 1:
                new = packing.pack(new[0])  # the other of keys and values is packed in blocks
            parts.append(joined_rows(packing, kept, old_starts, new, new_starts))
        positions = candidates.positions.int()
        merged = [
            join_rows(
                old.positions[from_rows],
                old_starts,
                positions[..., last : last + leaving][from_dense],
                new_starts,
            )
        ]
        if self.policy.stateful:
            seen = candidates.previous_scores
            merged.append(
                join_rows(
                    seen[..., first:last][candidates.valid[..., first:last]][from_rows],
                    old_starts,
                    seen[..., last : last + leaving][from_dense],
                    new_starts,
                )
            )
            self.dense_scores = seen[..., last + leaving :].clone()
        scores_kept = merged[1] if self.policy.stateful else self.rows_scores
        self._set_rows(Rows(parts[0], parts[1], merged[0], old_starts + new_starts, scores_kept))
        self._empty_slots(leaving)
        self.recorded_queries = self.recorded_queries.new_empty(0)

    def _empty_slots(self, leaving: int) -> None:
        """Drop all dense tokens but the window, once the kept ones are in the rows."""
        for name, packing in self.packing.items():
            empty = tuple(part.narrow(packing.axis, 0, 0).clone() for part in self.packed_tensors(name))
            self._set_packed(name, empty)
        self.front_start += leaving
        window = self.recent_k.shape[2] - (self.seen - self.front_start)
        self.recent_k, self.recent_v = (x[:, :, window:].clone() for x in (self.recent_k, self.recent_v))

    # -- moving

    def ragged(self) -> dict[str, tuple[str, ...]]:
        """Further tensors that lie row after row, by the name of the tensor that says where rows begin."""
        return {}

    def select_sequences(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Keep some sequences of the batch; see `StoringLayer.select_sequences`."""
        if not self.is_initialized:
            return
        _, numbers = self.chosen_rows(choose, self.row_heads)
        rows, ragged = self.rows, self.ragged()
        own = [attribute for name in self.packing for attribute in self._row_attributes(name)]
        flat = {*own, "rows_positions", "rows_starts", "rows_scores"}
        flat |= {name for starts, names in ragged.items() for name in (starts, *names)}
        new = {name: choose(t) for name, t in self.tensors().items() if name not in flat and t.ndim > 1}
        for starts, names in ragged.items():
            for name in names:
                new[name], begins = select_rows(getattr(self, name), getattr(self, starts), numbers)
            new[starts] = begins
        for name, tensor in new.items():
            setattr(self, name, tensor)
        parts = [
            select_row_numbers(packing, part, rows.starts, numbers)
            for packing, part in zip(self.packing.values(), (rows.keys, rows.values), strict=True)
        ]
        positions, row_starts = select_rows(rows.positions, rows.starts, numbers)
        scores = select_rows(rows.scores, rows.starts, numbers)[0] if self.policy.stateful else rows.scores
        self._set_rows(Rows(parts[0], parts[1], positions, row_starts, scores))
        self._store(self.recent_k, self.recent_v)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._reset_counters()
