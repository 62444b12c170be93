"""Every KV head keeps tokens of its own, as many as its policy gives it; the others are really gone.

Kept tokens lie row after row without padding (a row is one KV head of one sequence); tokens decoded since lie
in a dense tail. A query meets both and their outputs are merged by log-sum-exp. Nothing stored is ever
overwritten, and tokens keep the positions they had.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowkey.backends import fused, grouped, stock
from lowkey.backends.ragged import ragged
from lowkey.backends.segment import Part, Segment, merge_parts
from lowkey.core.types import Budget
from lowkey.models.attention_interface import Call
from lowkey.ops.precision import for_products
from lowkey.ops.ragged import append_to_rows, pad_rows, row_of, select_rows, starts_of, top_mask
from lowkey.policies.allocators import AllocationRequest
from lowkey.policies.base import CosAndSin, EvictionContext, Policy
from lowkey.storage.budgets import EvictionCosts
from lowkey.storage.codec import Codec, Plain
from lowkey.storage.positioned import RaggedLayer
from lowkey.storage.rollback import Snapshot, storage_bytes

STEP = 16  # the tail grows by so many tokens at a time
FAR = 1e30  # scores are held below it; infinite ones mean `stays` and `is not there`
TAIL = 128  # and joins the rows when it is so long: a copy of the layer, once in 128 steps


@dataclass(frozen=True)
class Candidates:
    """What may stay when a layer evicts: stored forms (b, h, s, r), positions, valid and carried (b, h, s);
    gaps behind shorter heads.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    valid: Tensor
    previous_scores: Tensor


@dataclass
class CacheWideEviction:
    """Where the layers of one cache meet when their allocator needs the scores of all.

    sliding_layers: of every sliding layer of the cache, how many tokens it holds at most, and the numbers that one of
    them takes.
    """

    layers: int = 1
    sliding_layers: tuple[tuple[int, int], ...] = ()
    waiting: list[tuple[EvictingLayer, Candidates, Tensor]] = field(default_factory=list)

    def enter(self, layer: EvictingLayer, found: Candidates, scores: Tensor) -> None:
        self.waiting.append((layer, found, scores))
        if layer.policy.resolved_allocator().scope == "layer" or len(self.waiting) == self.layers:
            self._decide()

    def _decide(self) -> None:
        # the others have forgotten what only looked
        layer, layer_slot = self.waiting[-1][0], self.waiting[0][0].layer_slot
        longest = max(s.shape[-1] for *_, s in self.waiting)
        # (n, b, h, s)
        scores = torch.stack([pad(s, (0, longest - s.shape[-1]), value=-torch.inf) for *_, s in self.waiting])
        split, tokens = layer.policy.resolved_allocator(), layer.tokens_seen().tolist()
        requests = [
            AllocationRequest(scores[:, i], layer.tokens_per_head(n), n, layer_slot, self.layers)
            for i, n in enumerate(tokens)
        ]
        counts = torch.stack([split.counts(r) for r in requests], dim=1)  # (n, b, h)
        for (own, found, s), c in zip(self.waiting, counts, strict=True):
            own.keep_best(found, s, c.to(s.device))
        self.waiting.clear()

    def held(self, layer: EvictingLayer) -> Iterator[Tensor]:
        """What waits for the other layers, and is freed when all have come."""
        for own, found, scores in self.waiting:
            if own is layer:
                yield from (*vars(found).values(), scores)


class EvictingLayer(RaggedLayer):
    """Held: keys (n, r_K), values (n, r_V), where (n, their positions), starts (b h + 1); tail_k, tail_v (b,
    h, <= 128, r); offset, first (b, 1); if the policy needs them: carried (n) scores, asked (b, h, g, w, d)
    queries since the last eviction.

    layer_slot, round: which compressible layer of the cache this is, and where it meets the others. score_only_tokens: so
    many tokens at the end of each chunk are used to score the others and are not stored, nor counted as seen.
    piece: which tokens they repeat, if they do, (from, to) as counted from each row's first. frozen: nothing
    more is evicted. expected_tokens: so many are given again behind, within the budget.
    """

    keys: Tensor  # type: ignore[assignment]
    values: Tensor  # type: ignore[assignment]
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
        self.policy, self.rope, self.layer_slot, self.cache_eviction, self.codec = (
            policy,
            rope,
            layer_slot,
            cache_eviction or CacheWideEviction(),
            codec or Plain(),
        )
        self.tail_length = self.kept_entries = self.decode_steps = self.joined_length = (
            self.expected_tokens
        ) = 0
        self.frozen = False
        self.repeated_span: tuple[int, int] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        b, h = key_states.shape[:2]
        self.device, self.codec = key_states.device, self.codec.to_match(key_states)
        self.reset_rows(b)
        stored = self.codec.encode(key_states[:, :, :0], value_states[:, :, :0], self.positions_of(0, 0))
        self.keys, self.values = (x.new_empty(0, x.shape[-1]) for x in stored)
        self.positions = torch.zeros(0, dtype=torch.int32, device=self.device)
        self.previous_scores = torch.zeros(0, dtype=torch.float32, device=self.device)
        self.starts = torch.zeros(b * h + 1, dtype=torch.long, device=self.device)
        self.tail_k, self.tail_v = (x.new_empty(b, h, 0, x.shape[-1]) for x in stored)
        self.recorded_queries = key_states.new_empty(0)
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        names = (
            "keys",
            "values",
            "positions",
            "starts",
            "previous_scores",
            "tail_k",
            "tail_v",
            "offset",
            "first_index",
            "recorded_queries",
        )
        return {name: getattr(self, name) for name in names} if self.is_initialized else {}

    def nbytes(self) -> int:
        return super().nbytes() + self._waiting_bytes()

    def _waiting_bytes(self) -> int:
        """Within a forward pass: what the round holds, less what is held in any case."""
        own = list(self.tensors().values())
        return storage_bytes([*own, *self.cache_eviction.held(self)]) - storage_bytes(own)

    def restore(self, before: Snapshot) -> None:
        super().restore(before)
        self.cache_eviction.waiting.clear()

    @property
    def entry_bytes(self) -> int:
        """What one kept token of one head takes."""
        widths = self.keys.shape[-1] + self.values.shape[-1]
        return (
            widths * self.keys.element_size()
            + self.positions.element_size()
            + (self.previous_scores.element_size() if self.policy.stateful else 0)
        )

    def index_bytes(self) -> int:
        """What is held whatever is kept."""
        b, h = self.tail_k.shape[:2]
        return (b * h + 1) * self.starts.element_size() + 2 * b * self.offset.element_size()

    def costs(self, tokens: Tensor) -> EvictionCosts:
        """Of this cache, in a batch whose rows have seen so many tokens (b)."""
        b, h, _, width = self.tail_k.shape
        size, stay, heads = (
            self.keys.element_size(),
            self.seen - self.score_only_tokens + self.expected_tokens,
            h * self.cache_eviction.layers,
        )
        beside = size * sum(min(stay, most) * numbers for most, numbers in self.cache_eviction.sliding_layers)
        tail = STEP * size * (width + self.tail_v.shape[-1])  # which a single token begins
        coming = heads * (tail if self.expected_tokens == 1 else self.expected_tokens * self.entry_bytes)
        return EvictionCosts(
            heads,
            b,
            self.entry_bytes,
            self.cache_eviction.layers * self.index_bytes() / b + beside,
            0,
            self.expected_tokens,
            coming,
        )

    def predicted_nbytes(self) -> int:
        if not self.is_initialized:
            return 0
        b, h, _, width = self.tail_k.shape
        dense = (width + self.tail_v.shape[-1]) * self.keys.element_size()
        room = self.joined_length + -(-(self.tail_length - self.joined_length) // STEP) * STEP
        asked = self.recorded_queries.numel() * self.recorded_queries.element_size()
        return (
            self.kept_entries * self.entry_bytes
            + b * h * room * dense
            + self.index_bytes()
            + asked
            + self._waiting_bytes()
        )

    def tokens_seen(self) -> Tensor:
        """(b): how many each row has seen, padding not counted."""
        return (self.seen - self.score_only_tokens - self.first_index[:, 0]).clamp_min(0)

    def tokens_per_head(self, tokens: int) -> float:
        """The budget of a row that has seen so many tokens, per head on average, without what is to come."""
        if self.policy.budget is None:
            return tokens
        budget = Budget.parse(self.policy.budget)
        if budget.unit in ("%", "tokens"):
            return max(
                0.0,
                (
                    budget.amount / 100 * (tokens + self.expected_tokens)
                    if budget.unit == "%"
                    else budget.amount
                )
                - self.expected_tokens,
            )
        return self.costs(self.tokens_seen()).pay(self.policy, tokens) if tokens else 0

    def kept_positions(self, row: int) -> list[Tensor]:
        """Per KV head the positions held for this row of the batch, ascending."""
        h = self.tail_k.shape[1]
        tail = self.positions_of(self.seen - self.tail_length, self.seen)[row]
        edges = self.starts[row * h : (row + 1) * h + 1].tolist()
        return [torch.cat([self.positions[a:b].long(), tail]) for a, b in itertools.pairwise(edges)]

    # -- attending

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        t = keys.shape[2]
        real = self.locate_tokens(call, t)
        if bool(self.decoding_rows(t).all()):
            self._append_to_tail(keys, values)
            out = merge_parts(self._stored_parts(call, self.seen))[0]
            self._after_step(call)
        else:
            self.check_decoding(t, self.policy.every)
            parts = [
                *self._stored_parts(call, self.seen - t),
                self._chunk_part(keys, values, call, self.exact_rows(real)),
            ]
            out = merge_parts(parts)[0] if len(parts) > 1 else parts[0][0]
            repeating = None if self.repeated_span is None else torch.logaddexp(parts[0][1], parts[-1][1])
            self._evict(call, self._candidates_with_chunk(keys, values, real), repeating)
            self.seen -= self.score_only_tokens
        return out.to(values.dtype)

    def _stored_parts(self, call: Call, stop: int) -> list[Part]:
        """Attention over the kept tokens and over the tail, which ends at token `stop`; each (b, h, g, t, d)
        with its log-sum-exp.
        """
        query = self.codec.project_query(call.query)
        shape, parts = query.shape[:4], []
        if len(self.keys):
            keys = self.codec.scoring_keys_of_rows(self.keys, self.positions, self.starts, shape[1])
            rows = query.flatten(2, 3).flatten(0, 1)
            for k, v, starts in self._rows_by_span(keys):
                out, lse = ragged(rows, k, v, starts, call.scaling, call.softcap)
                parts.append((self.codec.expand_output(out.view(*shape, -1)), lse.view(shape)))
        if self.tail_length:
            keys = self.codec.scoring_keys(
                self.tail_k[:, :, : self.tail_length],
                self.positions_of(stop - self.tail_length, stop).unsqueeze(1),
            )
            tail = (for_products(x) for x in (query, keys, self.tail_v[:, :, : self.tail_length]))
            out, lse = grouped.partial([Segment(*tail)], call.scaling, call.softcap)
            parts.append((self.codec.expand_output(out), lse))
        return parts

    def _rows_by_span(self, keys: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Keys, values and starts of the rows; those of the piece that is repeated, if one is, and then the
        others.
        """
        if self.repeated_span is None:
            return [(keys, self.values, self.starts)]
        row = row_of(self.starts)
        place = self.positions - self._first_positions()[row // self.tail_k.shape[1], 0, 0]
        inside = (place >= self.repeated_span[0]) & (place < self.repeated_span[1])
        counts = torch.zeros_like(self.starts[1:]).index_add_(0, row, inside.long())
        both = (inside, counts), (~inside, self.starts.diff() - counts)
        return [(keys[chosen], self.values[chosen], starts_of(lengths)) for chosen, lengths in both]

    def _chunk_part(self, keys: Tensor, values: Tensor, call: Call, exact: Tensor) -> Part:
        """Attention of a chunk's queries over the chunk itself, before anything of it is evicted; in rows
        `exact` (b) as it came.
        """
        t, exact = keys.shape[2], exact[:, None, None, None]
        if not bool(exact.all()):
            k, v = self._as_stored(keys, values)
            keys, values = torch.where(exact, keys, k), torch.where(exact, values, v)
        if self.seen == t and call.softcap is None:
            out = stock.attend(call.query, keys, values, call.mask, call.scaling)
            return out, out.new_zeros(out.shape[:-1])
        mask = call.full_mask(self.seen)
        mask = None if mask is None else mask[..., -t:]
        if (
            mask is not None
            and fused.gives_lse(call.query, keys, call.softcap)
            and bool((mask == torch.ones_like(mask[:1]).tril()).all())
        ):
            return fused.causal(call.query, keys, values, call.scaling)
        return grouped.partial([Segment(call.query, keys, values, mask)], call.scaling, call.softcap)

    def _as_stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A chunk's keys and values as they will be read later."""
        positions = self.positions_of(self.seen - keys.shape[2], self.seen)
        k, v = self.codec.encode(keys, values, positions)
        return self.codec.expand_keys(
            self.codec.scoring_keys(k, positions.unsqueeze(1))
        ), self.codec.expand_values(v)

    # -- storing

    def _append_to_tail(self, keys: Tensor, values: Tensor) -> None:
        k, v = self.codec.encode(keys, values, self.positions_of(self.seen - 1, self.seen))
        if self.tail_length == self.tail_k.shape[2]:
            self.tail_k, self.tail_v = (
                torch.cat([x, x.new_zeros(*x.shape[:2], STEP, x.shape[3])], 2)
                for x in (self.tail_k, self.tail_v)
            )
        elif torch.is_grad_enabled():
            # a graph may need what they held
            self.tail_k, self.tail_v = self.tail_k.clone(), self.tail_v.clone()
        self.tail_k[:, :, self.tail_length], self.tail_v[:, :, self.tail_length] = k[:, :, 0], v[:, :, 0]
        self.tail_length += 1

    def _after_step(self, call: Call) -> None:
        self.decode_steps += 1
        if self.policy.every and self.policy.uses_queries and not self.frozen:
            self.recorded_queries = (
                torch.cat([self.recorded_queries, call.query], 3)
                if self.recorded_queries.numel()
                else call.query.clone()
            )
        if self.policy.every and self.decode_steps % self.policy.every == 0 and not self.frozen:
            self._evict(replace(call, query=call.query[:, :, :, :0]), self._stored_candidates(self.seen))
        elif self.tail_length - self.joined_length >= TAIL:
            self._join_tail_to_rows()

    def _join_tail_to_rows(self) -> None:
        """The tail becomes part of the rows."""
        rows = len(self.starts) - 1
        at = (
            self.positions_of(self.seen - self.tail_length, self.seen)
            .int()
            .repeat_interleave(self.tail_k.shape[1], 0)
        )
        pairs = (self.keys, self.tail_k), (self.values, self.tail_v)
        self.keys, self.values = (
            append_to_rows(kept, self.starts, x[:, :, : self.tail_length].flatten(0, 1)) for kept, x in pairs
        )
        self.positions = append_to_rows(self.positions, self.starts, at)
        if self.policy.stateful:
            self.previous_scores = append_to_rows(
                self.previous_scores, self.starts, self.previous_scores.new_zeros(rows, self.tail_length)
            )
        self.starts = self.starts + torch.arange(rows + 1, device=self.device) * self.tail_length
        self.kept_entries += rows * self.tail_length
        self._clear_tail()

    def _clear_tail(self) -> None:
        self.tail_k, self.tail_v = (
            x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (self.tail_k, self.tail_v)
        )
        self.tail_length = self.joined_length = 0

    # -- evicting

    def _stored_candidates(self, stop: int) -> Candidates:
        """Kept tokens and tail, which ends at token `stop`."""
        b, h = self.tail_k.shape[:2]
        rows = [
            pad_rows(x, self.starts)[0].unflatten(0, (b, h))
            for x in (self.keys, self.values, self.positions.long())
        ]
        real = pad_rows(self.positions, self.starts)[1].unflatten(0, (b, h))
        carried = (
            pad_rows(self.previous_scores, self.starts)[0].unflatten(0, (b, h))
            if self.policy.stateful
            else real.float() * 0
        )
        at = self.positions_of(stop - self.tail_length, stop).unsqueeze(1).expand(b, h, -1)
        return Candidates(
            torch.cat([rows[0], self.tail_k[:, :, : self.tail_length]], 2),
            torch.cat([rows[1], self.tail_v[:, :, : self.tail_length]], 2),
            torch.cat([rows[2], at], 2),
            torch.cat([real, torch.ones_like(at, dtype=torch.bool)], 2),
            torch.cat([carried, torch.zeros_like(at, dtype=torch.float32)], 2),
        )

    def _candidates_with_chunk(self, keys: Tensor, values: Tensor, real: Tensor) -> Candidates:
        """Kept tokens, tail, and the chunk (b, h, t, d), of which `real` (b, t) says what is no padding."""
        b, h, t, _ = keys.shape
        positions = self.positions_of(self.seen - t, self.seen)
        k, v = self.codec.encode(keys, values, positions)
        at = positions.unsqueeze(1).expand(b, h, t)
        new = Candidates(k, v, at, real.unsqueeze(1).expand(b, h, t), torch.zeros(b, h, t, device=k.device))
        if self.seen == t:
            return new
        old = self._stored_candidates(self.seen - t)
        return Candidates(
            *(torch.cat(pair, 2) for pair in zip(vars(old).values(), vars(new).values(), strict=True))
        )

    def evict(self) -> None:
        """Now, by the scores that the tokens carry."""
        self._evict(self.empty_call, self._stored_candidates(self.seen))

    def _evict(self, call: Call, found: Candidates, repeating: Tensor | None = None) -> None:
        """Score what is there and let the round decide; the call's queries are the newest."""
        tokens = self.tokens_seen()
        # a slice would keep all queries alive
        nothing = call.query.new_empty(*call.query.shape[:3], 0, call.query.shape[4])
        self.empty_call = Call(nothing, None, None, call.scaling, call.softcap)
        scores = (
            found.previous_scores
            if self._scores_decide_nothing(tokens)
            else self.policy.score(self._context(call, found, repeating)).float()
        )
        number = found.positions - self._first_positions()  # counted from each row's first token
        steps = self.decoding_rows(call.query.shape[3])[:, None, None]
        # a step beside padding evicts nothing, as it would not alone
        carried = torch.where(steps, found.previous_scores, scores)
        found = replace(found, previous_scores=carried, valid=found.valid & (number < tokens[:, None, None]))
        stays = (
            steps | (number < self.policy.sinks) | (number >= (tokens - self.policy.recent)[:, None, None])
        )
        scores = (
            scores.nan_to_num(0.0)
            .clamp(-FAR, FAR)
            .masked_fill(stays, torch.inf)
            .masked_fill(~found.valid, -torch.inf)
        )
        self.keep_best(found, scores, found.valid.sum(-1)) if self.frozen else self.cache_eviction.enter(
            self, found, scores
        )

    def _scores_decide_nothing(self, tokens: Tensor) -> bool:
        """Whether scores decide nothing, now or later."""
        if self.policy.budget is None or (self.frozen and not self.score_only_tokens):
            return bool(self.frozen and not self.score_only_tokens)
        self.costs(tokens).check(self.policy, tokens.tolist())
        fits = all(self.tokens_per_head(n) >= n for n in tokens.tolist())
        return fits and (self.policy.needs_second_pass or not self.policy.stateful)

    def _context(self, call: Call, found: Candidates, repeating: Tensor | None) -> EvictionContext:
        queries = (
            torch.cat([self.recorded_queries, call.query], 3) if self.recorded_queries.numel() else call.query
        )
        w, t = queries.shape[3], call.query.shape[3]
        begins = self._first_positions()
        at = self.positions_of(self.seen - w, self.seen) - begins.squeeze(2)
        if t:
            at[:, w - t :] = at[:, w - t :].masked_fill(~found.valid[:, 0, -t:], -1)
        keys = self.codec.expand_keys(self.codec.scoring_keys(found.keys, found.positions))
        values = self.codec.expand_values(found.values)

        def rope(at: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
            return self.rope(at + begins.view(-1, 1).repeat_interleave(len(at) // len(begins), 0), like)

        piece = (
            None
            if self.repeated_span is None
            else torch.tensor([self.repeated_span], device=self.device).expand(len(begins), 2)
        )
        about = (
            call.scaling,
            call.softcap,
            rope,
            found.previous_scores,
            piece,
            repeating,
            self._visible_in_chunk(call, found, w),
        )
        return EvictionContext(keys, values, found.positions - begins, found.valid, queries, at, *about)

    def _visible_in_chunk(self, call: Call, found: Candidates, w: int) -> Tensor | None:
        """(b|1, w, t): what each of the newest queries sees of the chunk, where that is not all real tokens
        up to its own.
        """
        t = call.query.shape[3]
        if call.mask is None or not t:
            return None
        own, real = call.mask[:, :, self.seen - t :], found.valid[:, 0, -t:]
        causal = torch.ones(t, t, dtype=torch.bool, device=self.device).tril() & real.unsqueeze(1)
        return None if bool(((own == causal) | ~real.unsqueeze(2)).all()) else pad(own, (0, 0, w - t, 0))

    def _first_positions(self) -> Tensor:
        """(b, 1, 1): the position of each row's first token."""
        return (self.first_index - self.offset).unsqueeze(2)

    def keep_best(self, found: Candidates, scores: Tensor, counts: Tensor) -> None:
        """Keep the top_mask `counts` (b, h) candidates of every head; the rest is freed."""
        chosen = top_mask(scores, counts)
        self.keys, self.values = found.keys[chosen], found.values[chosen]
        self.positions = found.positions[chosen].int()
        self.previous_scores = found.previous_scores[chosen] if self.policy.stateful else self.previous_scores
        self.starts, self.kept_entries = starts_of(counts.flatten()), int(counts.sum())
        self.recorded_queries = self.recorded_queries.new_empty(0)
        self._clear_tail()

    def ragged(self) -> dict[str, tuple[str, ...]]:
        """What lies row after row, by the name of where the rows begin."""
        return {
            "starts": ("keys", "values", "positions", *(("previous_scores",) if self.policy.stateful else ()))
        }

    def select_sequences(self, choose: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        _, rows = self.chosen_rows(choose, self.tail_k.shape[1])
        ragged = self.ragged()
        flat = {name for starts, names in ragged.items() for name in (starts, *names)}
        found = {name: choose(t) for name, t in self.tensors().items() if name not in flat and t.ndim > 1}
        for starts, names in ragged.items():
            for name in names:
                found[name], begins = select_rows(getattr(self, name), getattr(self, starts), rows)
            found[starts] = begins
        for name, t in found.items():
            setattr(self, name, t)
        self.kept_entries = len(self.keys)

    def reset(self) -> None:
        super().reset()
        self.tail_length = self.kept_entries = self.decode_steps = self.joined_length = (
            self.expected_tokens
        ) = 0
        self.frozen, self.repeated_span = False, None
