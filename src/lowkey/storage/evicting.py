"""A layer whose policy decides which of its older tokens each head keeps.

New tokens are stored densely, by a codec and a packing, with sinks and recent tokens exact (`RowLayer`). An
eviction takes place after every chunk (a prompt, or a later turn), and after every `policy.every` steps of
decoding. The layer collects its *candidates* (sinks, rows and dense tokens), the policy scores them for each
KV head, and the allocator says how many each *row* keeps. A row is one KV head of one sequence, or the heads
of a sequence that share a latent; their scores are pooled. What is kept and has left the exact window moves
into the rows; all else is freed. Kept tokens keep their positions.

Nothing that is stored is ever overwritten, so a forward pass that fails can be undone (`rollback`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from lowkey.backends.segment import merge_parts
from lowkey.core.types import Budget
from lowkey.models.attention_interface import Call
from lowkey.ops.ragged import top_mask
from lowkey.policies.base import CosAndSin, EvictionContext, Policy
from lowkey.storage.base import StoringLayer
from lowkey.storage.budgets import EvictionCosts, protected_tokens, tokens_of_budget
from lowkey.storage.cache_wide_eviction import CacheWideEviction, Candidates
from lowkey.storage.candidate_layer import CandidateLayer
from lowkey.storage.chunk import visible_in_chunk
from lowkey.storage.codec import Codec, Plain
from lowkey.storage.exact import Exact, SinkPoints
from lowkey.storage.observed import Observed
from lowkey.storage.packing import Packing
from lowkey.storage.rollback import Snapshot, storage_bytes
from lowkey.storage.sparse_prefill import attend_to_important
from lowkey.storage.stepping import SteppingLayer

LARGEST_SCORE = 1e30  # finite, since +inf and -inf mean "stays in any case" and "there is no token"


class EvictingLayer(CandidateLayer):
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
        recorded_queries: (b, h, g, w, d), the queries of the decode steps since the last eviction; empty
            unless the policy will use them.
        decode_steps: steps of decoding so far, counted if the policy evicts after every so many.
        frozen: whether eviction is switched off.
        expected_tokens: tokens that will be given again after an eviction, for which the budget keeps room.
        gates: what the policy has learnt of this layer.
        observed: the attention of a small model that reads along, for layers that it guides.
        prompt_slots: slots that were seen before the first step of decoding.
        empty_call: the last call, without queries, for evictions that score nothing new.
        kept_of_chunk: within a call that answers important tokens alone, (b, t), which tokens are; else None.
    """

    saved_counters = (*CandidateLayer.saved_counters, "decode_steps", "frozen", "prompt_slots")

    gates: Mapping[str, Tensor] = MappingProxyType({})
    kept_of_chunk: Tensor | None = None
    observed: Observed = Observed()

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
        super().__init__(codec or Plain(), exact, packing, sink_points, policy.stateful)
        self.policy, self.rope, self.layer_slot = policy, rope, layer_slot
        self.cache_eviction = cache_eviction or CacheWideEviction()
        self._reset_counters()

    def _reset_counters(self) -> None:
        self.decode_steps = self.expected_tokens = self.prompt_slots = 0
        self.frozen = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty tensors for this batch size, device and dtype."""
        super().lazy_initialization(key_states, value_states)
        self.recorded_queries = key_states.new_empty(0)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are held, by attribute name."""
        if not self.is_initialized:
            return {}
        return super().tensors() | {"recorded_queries": self.recorded_queries}

    # -- bytes

    def nbytes(self) -> int:
        """The bytes of the storages that are really held, candidates of an eviction under way included."""
        return super().nbytes() + self._waiting_bytes()

    def predicted_nbytes(self) -> int:
        """As `RowLayer`'s, with recorded queries and candidates of an eviction under way."""
        if not self.is_initialized:
            return 0
        queries = self.recorded_queries.numel() * self.recorded_queries.element_size()
        return super().predicted_nbytes() + queries + self._waiting_bytes()

    def held_tensors(self) -> list[Tensor]:
        """All tensors that the layer keeps alive, candidates of an eviction under way included."""
        return [*super().held_tensors(), *self.cache_eviction.waiting_tensors(self)]

    def _waiting_bytes(self) -> int:
        """What `cache_eviction` holds for this layer, beyond what the layer holds itself."""
        own = storage_bytes(SteppingLayer.held_tensors(self))
        return storage_bytes(EvictingLayer.held_tensors(self)) - own

    def restore(self, before: Snapshot) -> None:
        """Go back to an earlier state, and give up an eviction that was under way."""
        super().restore(before)
        self.cache_eviction.waiting.clear()

    def costs(self) -> EvictionCosts:
        """The costs of this layer's whole cache."""
        b, itemsize, layers = len(self.offset), self.recent_k.element_size(), self.cache_eviction.layers
        rows, shapes = self.row_heads * layers, self.cache_eviction.shapes(tuple(self.shapes.values()))
        stored_bytes = [self._packed_token_bytes(of_layer) for of_layer in shapes]
        packed, beside = sum(stored_bytes) / layers, self.rows_positions.element_size() + self._score_bytes()
        sliding = itemsize * self.cache_eviction.sliding_numbers(self._stored_until() + self.expected_tokens)
        # the last block of a row is filled up, at most by all but one of its tokens
        filled = rows * (self.block - 1) * packed
        # tokens that are given again stay dense; those that fill no block yet are exact
        held_back = min(self.expected_tokens, self.block - 1)
        expected = self.expected_tokens * packed + held_back * (self._exact_token_bytes() - packed)
        return EvictionCosts(
            heads=rows,
            sequences=b,
            entry_bytes=tuple(each + beside for each in stored_bytes),
            fixed_bytes=layers * self.index_bytes() / b + sliding + filled,
            protected=protected_tokens(self.policy, self.exact),
            exact=self.exact,
            exact_extra_bytes=self._exact_token_bytes() + self._score_bytes() - packed - beside,
            slot_bytes=self._exact_token_bytes(),
            copy_bytes=packed,
            expected_tokens=self.expected_tokens,
            expected_bytes=rows * expected,
            rows_of_heads=self.cache_eviction.rows_of_heads,
        )

    # -- counts

    def tokens_seen(self) -> Tensor:
        """(b): how many tokens each sequence has seen, without padding and tokens that only score."""
        return (self._stored_until() - self.first_index[:, 0]).clamp_min(0)

    def protected_prompt(self) -> Tensor:
        """(b): how many first tokens of each sequence are its prompt and stay whatever they score."""
        prompt = min(self.prompt_slots, self._stored_until()) if self.policy.protect_prompt else 0
        return (prompt - self.first_index[:, 0]).clamp_min(0)

    def tokens_per_head(self, tokens: int, prompt: int = 0) -> float:
        """The budget of a sequence in tokens per head, on average over heads; see `tokens_of_budget`."""
        mean = tokens_of_budget(self.policy, tokens, prompt, self.expected_tokens)
        if mean is None:
            return self.costs().tokens_per_head(self.policy, tokens) if tokens else 0
        return mean

    def kept_positions(self, sequence: int) -> list[Tensor]:
        """For each KV head, the positions that were kept for a sequence of the batch, ascending."""
        candidates = self._candidates(None)
        rows = [
            positions[valid].sort().values
            for positions, valid in zip(
                candidates.positions[sequence], candidates.valid[sequence], strict=True
            )
        ]
        heads = (
            torch.arange(self.row_heads, device=self.device)
            .repeat_interleave(self.codec.heads_per_row)
            .unsqueeze(0)
        )
        return [rows[i] for i in self._in_model_order(heads)[0].tolist()]

    # -- attending

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Answer the call, store the new tokens, and evict if it is time; see `StoringLayer.attend`."""
        ordered = replace(call, query=self._in_codec_order(call.query))
        own_order = self._in_codec_order(keys), self._in_codec_order(values)
        if (out := self.plain_step(*own_order, ordered)) is not None:
            self._after_step(call)
            return self._in_model_order(out)
        self.make_compact()
        t = keys.shape[2]
        begins = self.prompt_slots == self.seen - t
        real = self.locate_tokens(call, t)
        is_step = bool(self.decoding_rows(t).all())
        if not is_step:
            self.check_decoding(t, self.policy.every, self.block)
        self.transient_tokens = self.score_only_tokens
        keys, values = own_order
        if t == self.seen and not is_step and self.policy.is_sparse and not self.frozen:
            out = self._sparse_prefill(keys, values, ordered, call, real)
            return self._in_model_order(out).to(values.dtype)
        buffers = self._take_in(keys, values, real)
        parts, repetition_lse = self._parts(keys, values, ordered, buffers, self.exact_rows(real))
        out = merge_parts(parts)[0] if len(parts) > 1 else parts[0][0]
        if is_step:
            self._after_step(call)
        else:
            if begins:
                self.prompt_slots = self.seen
            if repetition_lse is not None:
                repetition_lse = self._in_model_order(repetition_lse)
            self._evict(call, real, (keys, values), repetition_lse)
        return self._in_model_order(out).to(values.dtype)

    def _sparse_prefill(
        self, keys: Tensor, values: Tensor, ordered: Call, call: Call, real: Tensor
    ) -> Tensor:
        """Store a first chunk, evict, and answer only the tokens that are kept, over the kept ones.

        Args:
            keys: (b, h, t, d), heads in the codec's order.
            values: the same.
            ordered: the attention call, heads in the codec's order.
            call: the attention call.
            real: (b, t), which of the tokens are no padding.

        Returns:
            The output (b, h, g, t, d), heads in the codec's order.
        """
        self._take_in(keys, values, real)
        self.prompt_slots = self.seen
        transient = self.transient_tokens
        self.kept_of_chunk = real  # unless an eviction chooses
        try:
            self._evict(call, real, (keys, values))
            important = self.kept_of_chunk
        finally:
            self.kept_of_chunk = None
        if transient:  # they score in the next layers, too
            important = torch.cat([important[:, : important.shape[1] - transient], real[:, -transient:]], 1)
        return attend_to_important(ordered, keys, values, important)

    replay = StoringLayer.replay  # recorded queries score tokens again

    @property
    def calls_are_steps(self) -> bool:
        """Whether no call of several tokens evicts anything."""
        return self.frozen

    def flaw_of_guesses(self) -> str | None:
        """As `StoringLayer`'s; a policy must choose neither by guesses nor between them."""
        if not self.frozen and self.policy.every:
            return f"every={self.policy.every} evicts between a call's tokens; use every=0 or cache.freeze()"
        if not self.frozen and not self.seen:
            return (
                "the policy would choose by guesses that come with the prompt; use lowkey.generate_verified, "
                "or a cache without a policy"
            )
        return super().flaw_of_guesses()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens in place; see `CodedLayer.crop`."""
        super().crop(tokens_to_remove)
        self.prompt_slots = min(self.prompt_slots, self.seen)

    def earliest_crop(self) -> int:
        """As `RowLayer.earliest_crop`; with `every`, steps are counted and cannot be taken back."""
        return self.seen if self.policy.every else super().earliest_crop()

    def _most_steps(self) -> int:
        """A room ends with the step that evicts."""
        every = self.policy.every
        return super()._most_steps() if not every or self.frozen else every - self.decode_steps % every

    def _after_step(self, call: Call) -> None:
        """With `every`: count a step of decoding, and evict if it is time."""
        self.decode_steps += bool(self.policy.every)
        if not self.policy.every or self.frozen:
            return
        if self.policy.uses_queries:
            self.recorded_queries = self._with_recorded_queries(call.query, clone=True)
        if self.decode_steps % self.policy.every == 0:
            size = self.room_size
            self.make_compact()
            self.room_size = size  # the next room begins with the next step
            # the step's query was just recorded, so the call brings no other
            self._evict(replace(call, query=call.query[:, :, :, :0]), None, None)

    def _with_recorded_queries(self, query: Tensor, clone: bool = False) -> Tensor:
        """The recorded queries with these (b, h, g, t, d) behind them; `clone` if they are to be held."""
        if self.recorded_queries.numel():
            return torch.cat([self.recorded_queries, query], 3)
        return query.clone() if clone else query

    # -- evicting

    @property
    def packs_anew(self) -> bool:
        """Whether an eviction packs dense tokens anew, and so needs their latents."""
        return self.block > 1

    def evict(self) -> None:
        """Evict now, by the scores that the tokens have from earlier calls."""
        self.make_compact()
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
            chunk: keys and values (b, h, t, d) of the newest tokens in the codec's order, or None.
            repetition_lse: (b, h, g, t), with a repeated span; see `EvictionContext`.
        """
        tokens = self.tokens_seen()
        self._note_empty_call(call)
        if self._scores_decide_nothing(tokens):
            self._forget_transient()
            self.recorded_queries = self.recorded_queries.new_empty(0)
            return
        candidates = self._candidates(real)
        scores, mass = self._scored(call, candidates, chunk, repetition_lse)
        number = candidates.positions - self._first_positions()  # counted from each sequence's first token
        # a sequence for which this call is a step of decoding evicts nothing: alone, it would not either
        stepping = self.decoding_rows(call.query.shape[3])[:, None, None]
        candidates = replace(
            candidates,
            previous_scores=torch.where(stepping, candidates.previous_scores, scores),
            # tokens that only score come last, and are no longer candidates
            valid=candidates.valid & (number < tokens[:, None, None]),
            mass=mass,
        )
        recent = protected_tokens(self.policy, self.exact)[1]
        stays = stepping | (number < self.policy.sinks) | (number >= (tokens - recent)[:, None, None])
        stays = stays | (number < self.protected_prompt()[:, None, None]) | self._in_sink_slots(candidates)
        if self.policy.keeps_for_good and self.policy.budget is None:
            stays[..., candidates.sinks : candidates.sinks + candidates.in_rows] = True
        scores = scores.nan_to_num(0.0).clamp(-LARGEST_SCORE, LARGEST_SCORE)
        scores = scores.masked_fill(stays, torch.inf).masked_fill(~candidates.valid, -torch.inf)
        latents = None
        if self.packs_anew and not self.frozen:
            latents = self._latents_of_dense(chunk)
        stop = candidates.positions.shape[2] - self.transient_tokens
        candidates, scores = candidates.first(stop), scores[..., :stop]
        self._forget_transient()
        if self.frozen:
            self._remember(candidates)
        else:
            candidates = replace(candidates, latents=latents)
            self.cache_eviction.add(self, candidates, self._scores_of_all(scores))

    def _scores_of_all(self, scores: Tensor) -> Tensor:
        """Scores (b, R, s) of candidates, and behind them those of what else may stay; here there is none."""
        return scores

    def _scored(
        self,
        call: Call,
        candidates: Candidates,
        chunk: tuple[Tensor, Tensor] | None,
        repetition_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Scores (b, R, s) of the candidates of rows, and their mass if the allocator weighs any.

        Arguments are those of `_evict`.
        """
        context = self._context(call, candidates, chunk, repetition_lse)
        scores, mass = self.policy.score_and_mass(context)
        weighs = mass is not None and self.policy.resolved_allocator().weighs
        return self._pooled(scores), self._pooled(mass) if mass is not None and weighs else None

    def _note_empty_call(self, call: Call) -> None:
        """Remember a call without its queries, for evictions that score nothing new."""
        # not a slice of the queries, which would keep all of them alive
        no_query = call.query.new_empty(*call.query.shape[:3], 0, call.query.shape[4])
        self.empty_call = Call(no_query, None, None, call.scaling, call.softcap)

    def _pooled(self, scores: Tensor) -> Tensor:
        """Scores (b, h, s) of KV heads in the model's order -> scores (b, R, s) of rows."""
        scores = self._in_codec_order(scores.float())
        if self.codec.heads_per_row == 1:
            return scores
        heads = scores.unflatten(1, (self.row_heads, -1))
        return heads.amax(2) if self.policy.head_pooling == "max" else heads.mean(2)

    def _scores_decide_nothing(self, tokens: Tensor) -> bool:
        """Whether all of these tokens (b) stay, and no later eviction will read their scores.

        Raises:
            LowkeyError: for a budget of bytes that is too small.
        """
        if self.frozen and not self.score_only_tokens:
            return True
        if self.policy.budget is None:
            return False
        costs, sequences = self.costs(), torch.stack([tokens, self.protected_prompt()], 1).tolist()
        costs.check(self.policy, [n for n, _ in sequences])
        budget = Budget.parse(self.policy.budget)
        if self.block > 1 and budget.unit != "%":
            # dense tokens and rows have other blocks, and another sequence of the batch may need rows
            return False
        # dense tokens are cheaper than those of rows, but sinks among them are held twice
        in_bytes = budget.unit in ("bytes", "bytes/token")
        fits = all(
            costs.fits(self.policy, n) if in_bytes else self.tokens_per_head(n, prompt) >= n
            for n, prompt in sequences
        )
        return fits and (self.policy.needs_second_pass or not self.keeps_scores)

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
            # one row of positions may stand for a sequence or for each of its heads;
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
            transient=self.transient_tokens,
            layer=self.layer_slot,
            gates=self.gates,
        )

    def keep_best(self, candidates: Candidates, scores: Tensor, counts: Tensor) -> None:
        """Keep the candidates with the highest scores; see `CandidateLayer.keep_best`."""
        if self.kept_of_chunk is not None:  # of a first chunk, which is all dense
            chosen = top_mask(scores, counts).any(1)[:, candidates.sinks :]
            self.kept_of_chunk = torch.nn.functional.pad(
                chosen, (0, self.kept_of_chunk.shape[1] - chosen.shape[1])
            )
        super().keep_best(candidates, scores, counts)
        self.recorded_queries = self.recorded_queries.new_empty(0)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._reset_counters()
