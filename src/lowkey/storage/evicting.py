"""A layer in which every KV head keeps tokens of its own, as many as its policy gives it.

A *row* is one KV head of one sequence. The tokens that the last eviction kept lie in the rows, one behind
another without padding. Tokens decoded since lie in a dense *tail*, equally long in all rows. A query
meets both, and the two outputs are merged by log-sum-exp. When the tail is full, its tokens join the rows,
which costs one copy of the layer in 128 steps.

An eviction takes place after every chunk (a prompt, or a later turn), and after every `policy.every` steps of
decoding. The layer collects its *candidates* (rows, tail and chunk), the policy scores them, the allocator
says how many each head keeps, and the best of each head become the new rows. Evicted tokens are freed. Kept
tokens keep the positions they had. Nothing that is stored is ever overwritten, so a forward pass that fails
can be undone (`rollback`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lowkey.backends import grouped
from lowkey.backends.ragged import ragged
from lowkey.backends.segment import Part, Segment, merge_parts
from lowkey.core.types import Budget
from lowkey.models.attention_interface import Call
from lowkey.ops.precision import for_products
from lowkey.ops.ragged import append_to_rows, pad_rows, row_of, select_rows, starts_of, top_mask
from lowkey.policies.base import CosAndSin, EvictionContext, Policy
from lowkey.storage.budgets import EvictionCosts
from lowkey.storage.cache_wide_eviction import CacheWideEviction, Candidates
from lowkey.storage.chunk import attend_to_chunk, visible_in_chunk
from lowkey.storage.codec import Codec, Plain, as_read_later
from lowkey.storage.positioned import RaggedLayer
from lowkey.storage.rollback import Snapshot, storage_bytes

TAIL_STEP = 16  # the tail grows by so many tokens at a time
LONGEST_TAIL = 128  # tokens; then the tail joins the rows
LARGEST_SCORE = 1e30  # finite, since +inf and -inf mean "stays in any case" and "there is no token"


class EvictingLayer(RaggedLayer):
    """Keeps in every head the tokens that a policy scores highest; see the module's docstring.

    Args:
        policy: score, allocator and budget.
        rope: cos and sin of the model at chosen positions, for policies that rotate keys or queries.
        layer_slot: which of the cache's evicting layers this is.
        cache_eviction: what the layers of one cache share; None for a layer on its own.
        codec: the form of stored tokens; None for the model's own.

    Attributes:
        keys: (n, r_K), the kept keys of all rows, one behind another.
        values: (n, r_V), the same.
        positions: (n), their positions.
        starts: (b h + 1), where each row begins.
        previous_scores: (n), scores from earlier evictions; empty unless the policy is stateful.
        tail_k, tail_v: (b, h, room, r_K) and (b, h, room, r_V), the tail with some room to grow.
        recorded_queries: (b, h, g, w, d), the queries of the decode steps since the last eviction; empty
            unless the policy will use them.
        tail_length: tokens in the tail.
        kept_entries: n.
        decode_steps: steps of decoding so far.
        joined_length: how many of the tail's tokens had come at once and without room to grow. Always 0 in
            caches filled by this version; files of format 1 may hold another number.
        frozen: whether eviction is switched off.
        score_only_tokens: so many tokens at the end of each chunk score the others and are then forgotten.
            They are neither stored nor counted as seen.
        repeated_span: (start, stop) if those tokens repeat an earlier part of the sequence, counted from its
            first token; else None.
        expected_tokens: tokens that will be given again after an eviction, for which the budget keeps room.
        empty_call: the last call, without queries, for evictions that score nothing new.
    """

    keys: Tensor
    values: Tensor
    saved_counters = (
        *RaggedLayer.saved_counters,
        "tail_length",
        "kept_entries",
        "decode_steps",
        "joined_length",
        "frozen",
    )

    def __init__(
        self,
        policy: Policy,
        rope: CosAndSin,
        layer_slot: int = 0,
        cache_eviction: CacheWideEviction | None = None,
        codec: Codec | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.rope, self.layer_slot = policy, rope, layer_slot
        self.cache_eviction, self.codec = cache_eviction or CacheWideEviction(), codec or Plain()
        self._reset_counters()

    def _reset_counters(self) -> None:
        self.tail_length = self.kept_entries = self.decode_steps = self.joined_length = 0
        self.expected_tokens = 0
        self.frozen = False
        self.repeated_span: tuple[int, int] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty tensors for this batch size, device and dtype."""
        b, h = key_states.shape[:2]
        self.device, self.codec = key_states.device, self.codec.to_match(key_states)
        self.reset_rows(b)
        # encoding no tokens tells the widths and dtypes of the stored form
        stored = self.codec.encode(key_states[:, :, :0], value_states[:, :, :0], self.positions_of(0, 0))
        self.keys, self.values = (x.new_empty(0, x.shape[-1]) for x in stored)
        self.positions = torch.zeros(0, dtype=torch.int32, device=self.device)
        self.previous_scores = torch.zeros(0, dtype=torch.float32, device=self.device)
        self.starts = torch.zeros(b * h + 1, dtype=torch.long, device=self.device)
        self.tail_k, self.tail_v = (x.new_empty(b, h, 0, x.shape[-1]) for x in stored)
        self.recorded_queries = key_states.new_empty(0)
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are held, by attribute name."""
        if not self.is_initialized:
            return {}
        rows = ("keys", "values", "positions", "starts", "previous_scores")
        others = ("tail_k", "tail_v", "offset", "first_index", "recorded_queries")
        return {name: getattr(self, name) for name in (*rows, *others)}

    # -- bytes

    def nbytes(self) -> int:
        """The bytes of the storages that are really held, candidates of an eviction under way included."""
        return super().nbytes() + self._waiting_bytes()

    def _waiting_bytes(self) -> int:
        """What `cache_eviction` holds for this layer, beyond what the layer holds itself."""
        # candidates may be views of what the layer holds; each storage counts once
        own = list(self.tensors().values())
        return storage_bytes([*own, *self.cache_eviction.waiting_tensors(self)]) - storage_bytes(own)

    def restore(self, before: Snapshot) -> None:
        """Go back to an earlier state, and give up an eviction that was under way."""
        super().restore(before)
        self.cache_eviction.waiting.clear()

    @property
    def entry_bytes(self) -> int:
        """The bytes of one kept token of one head: key, value, position and, if held, score."""
        widths = self.keys.shape[-1] + self.values.shape[-1]
        score = self.previous_scores.element_size() if self.policy.stateful else 0
        return widths * self.keys.element_size() + self.positions.element_size() + score

    def index_bytes(self) -> int:
        """The bytes that are held whatever is kept: row starts, and where sequences begin."""
        b, h = self.tail_k.shape[:2]
        return (b * h + 1) * self.starts.element_size() + 2 * b * self.offset.element_size()

    def costs(self) -> EvictionCosts:
        """The costs of this layer's whole cache, whose layers are all alike."""
        b, h, _, key_width = self.tail_k.shape
        itemsize, heads = self.keys.element_size(), h * self.cache_eviction.layers
        stored = self.seen - self.score_only_tokens + self.expected_tokens
        sliding = itemsize * sum(
            min(stored, most) * numbers for most, numbers in self.cache_eviction.sliding_layers
        )
        # a single token that is given again begins a tail; several come as a chunk and join the rows
        tail = TAIL_STEP * itemsize * (key_width + self.tail_v.shape[-1])
        expected = tail if self.expected_tokens == 1 else self.expected_tokens * self.entry_bytes
        return EvictionCosts(
            heads=heads,
            sequences=b,
            entry_bytes=self.entry_bytes,
            fixed_bytes=self.cache_eviction.layers * self.index_bytes() / b + sliding,
            expected_tokens=self.expected_tokens,
            expected_bytes=heads * expected,
        )

    def predicted_nbytes(self) -> int:
        """The bytes of kept entries, of the tail with its room, of indices and of recorded queries."""
        if not self.is_initialized:
            return 0
        b, h, _, key_width = self.tail_k.shape
        token_bytes = (key_width + self.tail_v.shape[-1]) * self.keys.element_size()
        # the tail grows by whole steps, behind what came at once
        steps = -(-(self.tail_length - self.joined_length) // TAIL_STEP)
        room = self.joined_length + steps * TAIL_STEP
        return (
            self.kept_entries * self.entry_bytes
            + b * h * room * token_bytes
            + self.index_bytes()
            + self.recorded_queries.numel() * self.recorded_queries.element_size()
            + self._waiting_bytes()
        )

    # -- counts

    def tokens_seen(self) -> Tensor:
        """(b): how many tokens each sequence has seen, without padding and tokens that only score."""
        return (self.seen - self.score_only_tokens - self.first_index[:, 0]).clamp_min(0)

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
        return self.costs().tokens_per_head(self.policy, tokens) if tokens else 0

    def kept_positions(self, sequence: int) -> list[Tensor]:
        """For each KV head, the positions that are held for a sequence of the batch, ascending."""
        h = self.tail_k.shape[1]
        tail = self.positions_of(self.seen - self.tail_length, self.seen)[sequence]
        edges = self.starts[sequence * h : (sequence + 1) * h + 1].tolist()
        return [torch.cat([self.positions[a:b].long(), tail]) for a, b in itertools.pairwise(edges)]

    # -- attending

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Answer the call, store the new tokens, and evict if it is time; see `StoringLayer.attend`."""
        t = keys.shape[2]
        real = self.locate_tokens(call, t)
        if bool(self.decoding_rows(t).all()):
            # a step of decoding: the token joins the tail first and is then read with it
            self._append_to_tail(keys, values)
            out = merge_parts(self._stored_parts(call, self.seen))[0]
            self._after_step(call)
        else:
            # a chunk: its queries see all that is held and the chunk itself; then the layer evicts
            self.check_decoding(t, self.policy.every)
            stored = self._stored_parts(call, self.seen - t)
            parts = [*stored, self._chunk_part(keys, values, call, self.exact_rows(real))]
            out = merge_parts(parts)[0] if len(parts) > 1 else parts[0][0]
            # the log-sum-exp over the repeated span and over the tokens of the repetition itself
            repetition_lse = (
                None if self.repeated_span is None else torch.logaddexp(parts[0][1], parts[-1][1])
            )
            self._evict(call, self._candidates_with_chunk(keys, values, real), repetition_lse)
            self.seen -= self.score_only_tokens
        return out.to(values.dtype)

    def _stored_parts(self, call: Call, stop: int) -> list[Part]:
        """Attention over the rows, and over the tail, which ends at the token with index `stop`."""
        query = self.codec.project_query(call.query)
        shape, parts = query.shape[:4], []
        if len(self.keys):
            keys = self.codec.scoring_keys_of_rows(self.keys, self.positions, self.starts, shape[1])
            queries = query.flatten(2, 3).flatten(0, 1)
            for k, v, starts in self._rows_by_span(keys):
                out, lse = ragged(queries, k, v, starts, call.scaling, call.softcap)
                parts.append((self.codec.expand_output(out.view(*shape, -1)), lse.view(shape)))
        if self.tail_length:
            tail_k, tail_v = (x[:, :, : self.tail_length] for x in (self.tail_k, self.tail_v))
            positions = self.positions_of(stop - self.tail_length, stop).unsqueeze(1)
            keys = self.codec.scoring_keys(tail_k, positions)
            segment = Segment(*(for_products(x) for x in (query, keys, tail_v)))
            out, lse = grouped.partial([segment], call.scaling, call.softcap)
            parts.append((self.codec.expand_output(out), lse))
        return parts

    def _rows_by_span(self, keys: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(keys, values, starts) of the rows; if a span is repeated, of it first and then of the others."""
        if self.repeated_span is None:
            return [(keys, self.values, self.starts)]
        row = row_of(self.starts)
        # a span is counted from the first token of its sequence, to which the rows of h heads belong
        token = self.positions - self._first_positions()[row // self.tail_k.shape[1], 0, 0]
        inside = (token >= self.repeated_span[0]) & (token < self.repeated_span[1])
        counts = torch.zeros_like(self.starts[1:]).index_add_(0, row, inside.long())
        both = (inside, counts), (~inside, self.starts.diff() - counts)
        return [(keys[chosen], self.values[chosen], starts_of(lengths)) for chosen, lengths in both]

    def _chunk_part(self, keys: Tensor, values: Tensor, call: Call, exact: Tensor) -> Part:
        """Attention of a chunk's queries over the chunk itself, before any of it is evicted.

        Args:
            keys: (b, h, t, d).
            values: (b, h, t, d).
            call: the attention call.
            exact: (b), the sequences that see the chunk as it came; the others see it as it will be stored.
        """
        exact = exact[:, None, None, None]
        if not bool(exact.all()):
            positions = self.positions_of(self.seen - keys.shape[2], self.seen)
            k, v = as_read_later(self.codec, keys, values, positions)
            keys, values = torch.where(exact, keys, k), torch.where(exact, values, v)
        return attend_to_chunk(call, keys, values, self.seen)

    # -- storing

    def _append_to_tail(self, keys: Tensor, values: Tensor) -> None:
        """Put one new token (b, h, 1, d) at the end of the tail."""
        k, v = self.codec.encode(keys, values, self.positions_of(self.seen - 1, self.seen))
        if self.tail_length == self.tail_k.shape[2]:
            self.tail_k, self.tail_v = (
                torch.cat([x, x.new_zeros(*x.shape[:2], TAIL_STEP, x.shape[3])], 2)
                for x in (self.tail_k, self.tail_v)
            )
        elif torch.is_grad_enabled():
            # writing in place would change numbers that a graph may have saved for the backward pass
            self.tail_k, self.tail_v = self.tail_k.clone(), self.tail_v.clone()
        self.tail_k[:, :, self.tail_length], self.tail_v[:, :, self.tail_length] = k[:, :, 0], v[:, :, 0]
        self.tail_length += 1

    def _after_step(self, call: Call) -> None:
        """Count a step of decoding; evict or empty the tail if it is time."""
        self.decode_steps += 1
        if self.policy.every and self.policy.uses_queries and not self.frozen:
            self.recorded_queries = self._with_recorded_queries(call.query, clone=True)
        if self.policy.every and self.decode_steps % self.policy.every == 0 and not self.frozen:
            # the step's query was just recorded, so the call brings no other
            without_queries = replace(call, query=call.query[:, :, :, :0])
            self._evict(without_queries, self._stored_candidates(self.seen))
        elif self.tail_length - self.joined_length >= LONGEST_TAIL:
            self._join_tail_to_rows()

    def _with_recorded_queries(self, query: Tensor, clone: bool = False) -> Tensor:
        """The recorded queries with these (b, h, g, t, d) behind them; `clone` if they are to be held."""
        if self.recorded_queries.numel():
            return torch.cat([self.recorded_queries, query], 3)
        return query.clone() if clone else query

    def _join_tail_to_rows(self) -> None:
        """Move the tail's tokens to the end of their rows."""
        rows, length = len(self.starts) - 1, self.tail_length
        positions = self.positions_of(self.seen - length, self.seen).int()
        positions = positions.repeat_interleave(self.tail_k.shape[1], 0)  # (b h, length)
        self.keys = append_to_rows(self.keys, self.starts, self.tail_k[:, :, :length].flatten(0, 1))
        self.values = append_to_rows(self.values, self.starts, self.tail_v[:, :, :length].flatten(0, 1))
        self.positions = append_to_rows(self.positions, self.starts, positions)
        if self.policy.stateful:
            unscored = self.previous_scores.new_zeros(rows, length)
            self.previous_scores = append_to_rows(self.previous_scores, self.starts, unscored)
        # every row became longer by `length`, so row i begins i times that later
        self.starts = self.starts + torch.arange(rows + 1, device=self.device) * length
        self.kept_entries += rows * length
        self._clear_tail()

    def _clear_tail(self) -> None:
        self.tail_k, self.tail_v = (
            x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (self.tail_k, self.tail_v)
        )
        self.tail_length = self.joined_length = 0

    # -- evicting

    def _stored_candidates(self, stop: int) -> Candidates:
        """The tokens of the rows and of the tail, which ends at the token with index `stop`."""
        b, h = self.tail_k.shape[:2]

        def dense(flat: Tensor) -> Tensor:
            return pad_rows(flat, self.starts)[0].unflatten(0, (b, h))

        valid = pad_rows(self.positions, self.starts)[1].unflatten(0, (b, h))
        scores = (
            dense(self.previous_scores)
            if self.policy.stateful
            else torch.zeros_like(valid, dtype=torch.float32)
        )
        rows = Candidates(dense(self.keys), dense(self.values), dense(self.positions.long()), valid, scores)
        positions = self.positions_of(stop - self.tail_length, stop).unsqueeze(1).expand(b, h, -1)
        tail = Candidates(
            self.tail_k[:, :, : self.tail_length],
            self.tail_v[:, :, : self.tail_length],
            positions,
            torch.ones_like(positions, dtype=torch.bool),
            torch.zeros_like(positions, dtype=torch.float32),
        )
        return rows.followed_by(tail)

    def _candidates_with_chunk(self, keys: Tensor, values: Tensor, real: Tensor) -> Candidates:
        """The tokens of rows, tail and a chunk (b, h, t, d), given which of the chunk are real (b, t)."""
        b, h, t, _ = keys.shape
        positions = self.positions_of(self.seen - t, self.seen)
        k, v = self.codec.encode(keys, values, positions)
        chunk = Candidates(
            k,
            v,
            positions.unsqueeze(1).expand(b, h, t),
            real.unsqueeze(1).expand(b, h, t),
            torch.zeros(b, h, t, device=k.device),
        )
        return chunk if self.seen == t else self._stored_candidates(self.seen - t).followed_by(chunk)

    def evict(self) -> None:
        """Evict now, by the scores that the tokens have from earlier calls."""
        self._evict(self.empty_call, self._stored_candidates(self.seen))

    def _evict(self, call: Call, candidates: Candidates, repetition_lse: Tensor | None = None) -> None:
        """Score the candidates and pass them on to the allocator.

        Args:
            call: the attention call; its queries are the newest.
            candidates: all tokens that may stay.
            repetition_lse: (b, h, g, t), with a repeated span; see `EvictionContext`.
        """
        tokens = self.tokens_seen()
        # not a slice of the queries, which would keep all of them alive
        no_query = call.query.new_empty(*call.query.shape[:3], 0, call.query.shape[4])
        self.empty_call = Call(no_query, None, None, call.scaling, call.softcap)
        if self._scores_decide_nothing(tokens):
            scores = candidates.previous_scores
        else:
            scores = self.policy.score(self._context(call, candidates, repetition_lse)).float()
        token = candidates.positions - self._first_positions()  # counted from each sequence's first token
        # a sequence for which this call is a step of decoding evicts nothing: alone, it would not either
        stepping = self.decoding_rows(call.query.shape[3])[:, None, None]
        candidates = replace(
            candidates,
            previous_scores=torch.where(stepping, candidates.previous_scores, scores),
            # tokens that only score come last, and are no longer candidates
            valid=candidates.valid & (token < tokens[:, None, None]),
        )
        recent = token >= (tokens - self.policy.recent)[:, None, None]
        stays = stepping | (token < self.policy.sinks) | recent
        # no score of a policy may reach the infinities, which mean "stays" and "is no token"
        scores = scores.nan_to_num(0.0).clamp(-LARGEST_SCORE, LARGEST_SCORE)
        scores = scores.masked_fill(stays, torch.inf).masked_fill(~candidates.valid, -torch.inf)
        if self.frozen:  # all real tokens stay, so there is nothing to wait for
            self.keep_best(candidates, scores, candidates.valid.sum(-1))
        else:
            self.cache_eviction.add(self, candidates, scores)

    def _scores_decide_nothing(self, tokens: Tensor) -> bool:
        """Whether all of these tokens (b) stay, and no later eviction will read their scores.

        Raises:
            LowkeyError: for a budget of bytes that is too small.
        """
        if self.frozen and not self.score_only_tokens:
            return True
        if self.policy.budget is None:
            return False
        self.costs().check(self.policy, tokens.tolist())
        fits = all(self.tokens_per_head(n) >= n for n in tokens.tolist())
        return fits and (self.policy.needs_second_pass or not self.policy.stateful)

    def _context(self, call: Call, candidates: Candidates, repetition_lse: Tensor | None) -> EvictionContext:
        """What the policy's score is given."""
        queries = self._with_recorded_queries(call.query)
        w, t = queries.shape[3], call.query.shape[3]
        first = self._first_positions()
        query_positions = self.positions_of(self.seen - w, self.seen) - first.squeeze(2)
        if t:  # queries of padding get position -1; recorded ones are never of padding
            padding = ~candidates.valid[:, 0, -t:]
            query_positions[:, w - t :] = query_positions[:, w - t :].masked_fill(padding, -1)

        def rope(positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
            # one row of positions may stand for a sequence or for each of its heads;
            # a score counts positions from each sequence's first token, the model may not
            shift = first.view(-1, 1).repeat_interleave(len(positions) // len(first), 0)
            return self.rope(positions + shift, like)

        span = None
        if self.repeated_span is not None:
            span = torch.tensor([self.repeated_span], device=self.device).expand(len(first), 2)
        return EvictionContext(
            keys=self.codec.expand_keys(self.codec.scoring_keys(candidates.keys, candidates.positions)),
            values=self.codec.expand_values(candidates.values),
            positions=candidates.positions - first,
            valid=candidates.valid,
            queries=queries,
            query_positions=query_positions,
            scaling=call.scaling,
            softcap=call.softcap,
            rope=rope,
            previous_scores=candidates.previous_scores,
            repeated_span=span,
            repetition_lse=repetition_lse,
            visible=visible_in_chunk(call, candidates.valid[:, 0, -t:] if t else None, self.seen, w),
        )

    def _first_positions(self) -> Tensor:
        """(b, 1, 1): the position of each sequence's first token."""
        return (self.first_index - self.offset).unsqueeze(2)

    def keep_best(self, candidates: Candidates, scores: Tensor, counts: Tensor) -> None:
        """Keep the candidates with the highest scores in every head; the others are freed.

        Args:
            candidates: all tokens that may stay.
            scores: (b, h, s).
            counts: (b, h), how many each head keeps.
        """
        chosen = top_mask(scores, counts)
        self.keys, self.values = candidates.keys[chosen], candidates.values[chosen]
        self.positions = candidates.positions[chosen].int()
        if self.policy.stateful:
            self.previous_scores = candidates.previous_scores[chosen]
        self.starts, self.kept_entries = starts_of(counts.flatten()), int(counts.sum())
        # the queries have scored, and the tail's tokens were among the candidates
        self.recorded_queries = self.recorded_queries.new_empty(0)
        self._clear_tail()

    # -- moving

    def ragged(self) -> dict[str, tuple[str, ...]]:
        """The tensors that lie row after row, by the name of the tensor that says where rows begin."""
        scores = ("previous_scores",) if self.policy.stateful else ()
        return {"starts": ("keys", "values", "positions", *scores)}

    def select_sequences(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Keep some sequences of the batch; see `StoringLayer.select_sequences`."""
        if not self.is_initialized:
            return
        _, rows = self.chosen_rows(choose, self.tail_k.shape[1])
        ragged = self.ragged()
        flat = {name for starts, names in ragged.items() for name in (starts, *names)}
        # tensors of one dimension are empty placeholders that have no sequences
        new = {name: choose(t) for name, t in self.tensors().items() if name not in flat and t.ndim > 1}
        for starts, names in ragged.items():
            for name in names:
                new[name], begins = select_rows(getattr(self, name), getattr(self, starts), rows)
            new[starts] = begins
        for name, t in new.items():
            setattr(self, name, t)
        self.kept_entries = len(self.keys)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._reset_counters()
