"""An evicting layer in which chunks of tokens that leave the window become one row each, or none."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowkey.backends import grouped
from lowkey.backends.segment import Part, Segment
from lowkey.backends.stored import StepSegment
from lowkey.models.attention_interface import Call
from lowkey.ops.chunk_gate import chunks_to_pool
from lowkey.ops.ragged import join_rows, pad_rows, row_of, starts_of, top_mask
from lowkey.ops.rope import rotate, unrotate
from lowkey.policies.chunks import LARGEST_CHUNK, ChunkPolicy
from lowkey.storage.budgets import EvictionCosts, protected_tokens
from lowkey.storage.cache_wide_eviction import Candidates
from lowkey.storage.evicting import EvictingLayer
from lowkey.storage.flaws import first_flaw, unlike
from lowkey.storage.packing import Unpacked
from lowkey.storage.rebuilding import Rotation
from lowkey.storage.rows import stored_in_rows

POOLED = ("pooled_keys", "pooled_values", "pooled_positions", "pooled_counts", "pooled_scores")


class PoolingLayer(EvictingLayer):
    """An `EvictingLayer` of a `ChunkPolicy`.

    What an eviction takes from the window goes by whole chunks, the oldest first. A chunk's row is held as it
    is read, in the model's own width, whatever form the others are stored in; log(tokens of the chunk) is
    added to its score. A row counts in the budget as a token does.

    Attributes:
        pooled_keys, pooled_values: (n, a, d), of all rows of chunks, one row of the layer behind another; a
            is how many KV heads share a row of the layer. In each, chunks of fewer tokens come first. Keys
            are rotated to the centre of the chunk.
        pooled_positions: (n), the centres.
        pooled_counts: (n), tokens of each chunk.
        pooled_scores: (n), by which rows of chunks are kept.
        pooled_starts: (b R + 1), where each row of the layer begins.
        chunk_state: (b, h, z), what the policy remembers between chunks, heads in the model's order.
        most_pooled: rows of chunks of the longest row; None until they are counted.
    """

    policy: ChunkPolicy
    pooled_keys: Tensor
    pooled_values: Tensor
    pooled_positions: Tensor
    pooled_counts: Tensor
    pooled_scores: Tensor
    pooled_starts: Tensor
    chunk_state: Tensor
    most_pooled: int | None = None
    _chunk_sizes: tuple[int, ...] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty tensors for this batch size, device and dtype."""
        super().lazy_initialization(key_states, value_states)
        b, h = key_states.shape[:2]
        heads = self.codec.heads_per_row
        self._set_pooled(
            (
                key_states.new_empty(0, heads, key_states.shape[3]),
                value_states.new_empty(0, heads, value_states.shape[3]),
                torch.zeros(0, dtype=torch.int32, device=self.device),
                torch.zeros(0, dtype=torch.uint8, device=self.device),
                torch.zeros(0, device=self.device),
            ),
            torch.zeros(b * self.row_heads + 1, dtype=torch.long, device=self.device),
        )
        self.chunk_state = torch.zeros(b, h, self.policy.state_width, device=self.device)

    def _set_pooled(self, parts: tuple[Tensor, ...], starts: Tensor) -> None:
        for name, part in zip(POOLED, parts, strict=True):
            setattr(self, name, part)
        self.pooled_starts, self.most_pooled = starts, None
        self._chunk_sizes = None

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """The numbers of tokens that chunks have, ascending; looked at once after each eviction."""
        if self._chunk_sizes is None:
            self._chunk_sizes = tuple(self.pooled_counts.unique().tolist())
        return self._chunk_sizes

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are held, by attribute name."""
        if not self.is_initialized:
            return {}
        own = (*POOLED, "pooled_starts", "chunk_state")
        return super().tensors() | {name: getattr(self, name) for name in own}

    def ragged(self) -> dict[str, tuple[str, ...]]:
        """See `RowLayer.ragged`."""
        return super().ragged() | {"pooled_starts": POOLED}

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.most_pooled = None

    # -- bytes

    def index_bytes(self) -> int:
        """The bytes that are held whatever is kept, those of the policy's state included."""
        return super().index_bytes() + self._own_index_bytes()

    def _own_index_bytes(self) -> int:
        return len(self.pooled_starts) * self.pooled_starts.element_size() + 4 * self.chunk_state.numel()

    def _pooled_bytes(self) -> int:
        """Bytes of a chunk's row: keys and values, position, count and score."""
        return self._exact_token_bytes() + 4 + 1 + 4

    def predicted_nbytes(self) -> int:
        """As `EvictingLayer`'s, with the rows of chunks."""
        if not self.is_initialized:
            return 0
        rows = len(self.pooled_positions) * self._pooled_bytes()
        return super().predicted_nbytes() + rows + self._own_index_bytes()

    def costs(self) -> EvictionCosts:
        """As `EvictingLayer.costs`; an entry takes as much as the dearer of a token and a chunk's row."""
        costs = super().costs()
        entries = tuple(max(each, float(self._pooled_bytes())) for each in costs.entry_bytes)
        dearer = sum(entries) / len(entries) - costs.mean_entry_bytes
        return replace(
            costs,
            entry_bytes=entries,
            exact_extra_bytes=costs.exact_extra_bytes - dearer,
        )

    def own_flaw(self, heads: int, key_width: int, value_width: int) -> str | None:
        """Check the rows of chunks; see `RaggedLayer.own_flaw`."""
        n, a, b, starts = (
            len(self.pooled_positions),
            self.codec.heads_per_row,
            len(self.offset),
            self.pooled_starts,
        )
        flaw = first_flaw(
            unlike("pooled_keys", self.pooled_keys, n, a, key_width),
            unlike("pooled_values", self.pooled_values, n, a, value_width),
            unlike("pooled_counts", self.pooled_counts, n),
            unlike("pooled_scores", self.pooled_scores, n),
            unlike("pooled_starts", starts, b * self.row_heads + 1),
            unlike("chunk_state", self.chunk_state, b, heads, self.policy.state_width),
        )
        if flaw:
            return flaw
        if int(starts[0]) != 0 or int(starts[-1]) != n or bool((starts.diff() < 0).any()):
            return "rows of chunks do not begin one behind the other"
        if bool((self.pooled_counts < 1).any()):
            return "a chunk has no tokens"
        row = torch.arange(len(starts) - 1, device=starts.device).repeat_interleave(starts.diff())
        index = self.pooled_positions.long() + self.offset[:, 0][row // self.row_heads]
        outside = bool(((index < 0) | (index >= self.front_start)).any())
        return "chunks are not among the tokens seen" if outside else None

    # -- attending

    def _row_segments(self, rotation: Rotation | None) -> list[StepSegment]:
        found, starts, heads = super()._row_segments(rotation), self.pooled_starts, self.codec.heads_per_row
        if not len(self.pooled_positions):
            return found
        row, first = row_of(starts), starts[:-1]
        for size in self.chunk_sizes:  # chunks of one size lie together in a row
            lengths = torch.zeros_like(first).index_add_(0, row, (self.pooled_counts == size).long())
            keys, values = (
                replace(
                    stored_in_rows(Unpacked(), (x,), x.shape[2], starts), first=first.repeat_interleave(heads)
                )
                for x in (self.pooled_keys, self.pooled_values)
            )
            of_heads = lengths.repeat_interleave(heads)
            bias = torch.full(of_heads.shape, math.log(size), device=self.device)
            found.append(StepSegment(keys, values, of_heads, bias=bias))
            first = first + lengths
        return found

    def _row_parts(self, call: Call, split: bool = False) -> list[Part]:
        parts = super()._row_parts(call, split)
        if not len(self.pooled_positions):
            return parts
        query = self._in_model_order(call.query)
        keys, values, counts = self._pooled_densely()
        segment = Segment(query, keys.to(query.dtype), values.to(query.dtype), bias=counts.float().log())
        out, lse = grouped.partial([segment], call.scaling, call.softcap)
        part = self._in_codec_order(out), self._in_codec_order(lse)
        return [*parts, *([(part[0], torch.full_like(lse, -torch.inf))] if split else []), part]

    def _pooled_densely(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values (b, h, m, d) and counts (b, h, m) of the rows of chunks, 0 behind shorter rows."""
        if self.most_pooled is None:
            self.most_pooled = int(self.pooled_starts.diff().max())
        b, n = len(self.offset), len(self.pooled_positions)
        alike = n == (len(self.pooled_starts) - 1) * self.most_pooled
        dense = []
        for flat in (self.pooled_keys, self.pooled_values, self.pooled_counts):
            x = flat.unflatten(0, (-1, self.most_pooled)) if alike else pad_rows(flat, self.pooled_starts)[0]
            dense.append(x.unflatten(0, (b, self.row_heads)))
        keys, values = (self._in_model_order(x.transpose(2, 3).flatten(1, 2)) for x in dense[:2])
        return keys, values, self._of_heads(dense[2])

    # -- evicting

    def _candidates(self, real: Tensor | None) -> Candidates:
        """As `CandidateLayer._candidates`, with the rows of chunks right behind the sinks."""
        found, b = super()._candidates(real), len(self.offset)
        if not len(self.pooled_positions):
            return found
        positions, there = (
            x.unflatten(0, (b, self.row_heads))
            for x in pad_rows(self.pooled_positions.long(), self.pooled_starts)
        )
        return replace(
            found,
            positions=_inserted(found.positions, positions, found.sinks),
            valid=_inserted(found.valid, there, found.sinks),
            previous_scores=_inserted(found.previous_scores, positions.float() * 0, found.sinks),
            sinks=found.sinks + positions.shape[2],
        )

    def _pooled_places(self, candidates: Candidates) -> slice:
        """Which of the candidates are rows of chunks."""
        return slice(self.exact.sinks, candidates.sinks)

    def _candidates_as_read(
        self, candidates: Candidates, chunk: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """See `CandidateLayer._candidates_as_read`."""
        keys, values = super()._candidates_as_read(candidates, chunk)
        if not len(self.pooled_positions):
            return keys, values
        own = self._pooled_densely()
        first = self.exact.sinks
        return _inserted(keys, own[0], first), _inserted(values, own[1], first)

    def _in_sink_slots(self, candidates: Candidates) -> Tensor:
        """See `CandidateLayer._in_sink_slots`: a chunk is no sink, wherever its centre lies."""
        is_sink = super()._in_sink_slots(candidates)
        is_sink[..., self._pooled_places(candidates)] = False
        return is_sink

    def keep_best(self, candidates: Candidates, scores: Tensor, counts: Tensor) -> None:
        """Pool the oldest chunks, as many as the counts demand, and keep the best of their rows.

        Args:
            candidates: all tokens and rows that may stay.
            scores: (b, R, s); infinite for what stays as it is.
            counts: (b, R), how many tokens and rows each row of the layer keeps.
        """
        places = self._pooled_places(candidates)
        is_row = torch.zeros(candidates.valid.shape[2], dtype=torch.bool, device=self.device)
        is_row[places] = True
        held = (candidates.valid & is_row).sum(-1)
        others = candidates.valid & ~is_row
        may_go = others & scores.isfinite()
        begin, numbers = self._numbers_of_chunks(candidates, may_go)
        first, allowed = self._chunks_that_go(numbers, may_go, others, begin, held, counts)
        goes = may_go & (numbers < first.unsqueeze(-1))
        rows = self._new_rows(candidates, numbers, goes)
        self._keep_rows(held, rows, allowed)
        # the others stay as they came
        stays = others & ~goes
        without: dict[str, Any] = {
            name: torch.cat([x[..., : places.start], x[..., places.stop :]], -1)
            for name, x in (
                ("positions", candidates.positions),
                ("valid", candidates.valid),
                ("previous_scores", candidates.previous_scores),
            )
        }
        kept = torch.cat([stays[..., : places.start], stays[..., places.stop :]], -1)
        rest = replace(candidates, **without, sinks=places.start)
        super().keep_best(rest, torch.where(kept, 1.0, -torch.inf), kept.sum(-1))

    def _numbers_of_chunks(self, candidates: Candidates, may_go: Tensor) -> tuple[Tensor, Tensor]:
        """(where chunks begin in each sequence (b, 1), the number of each candidate's chunk (b, R, s))."""
        sinks = self.policy.sinks if self.exact.rule else protected_tokens(self.policy, self.exact)[0]
        begin = self.protected_prompt().clamp_min(sinks).unsqueeze(1)
        number = candidates.positions - self._first_positions() - begin.unsqueeze(2)
        return begin, (number // self.policy.chunk).clamp_min(0).masked_fill(~may_go, 0)

    def _chunks_that_go(
        self, numbers: Tensor, may_go: Tensor, others: Tensor, begin: Tensor, held: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(first chunk that stays (b, R), how many rows there may be (b, R)); see `chunks_to_pool`."""
        chunks = int(numbers.max()) + 1 if numbers.numel() else 0
        sizes = torch.zeros(*numbers.shape[:2], chunks, dtype=torch.long, device=self.device)
        sizes.scatter_add_(2, numbers, may_go.long())
        ends = begin + self.policy.chunk * torch.arange(1, chunks + 1, device=self.device)  # (b, chunks)
        recent = protected_tokens(self.policy, self.exact)[1]
        whole = (ends <= (self.tokens_seen() - recent).unsqueeze(1)).unsqueeze(1).expand_as(sizes)
        fixed = others.sum(-1) - may_go.sum(-1)
        budget = counts.to(self.device).maximum(fixed)
        return chunks_to_pool(sizes, whole, fixed, held, budget, self.policy.keep)

    def _new_rows(
        self, candidates: Candidates, numbers: Tensor, goes: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor] | None:
        """The rows of chunks that leave the window now.

        Args:
            candidates: all of them.
            numbers: (b, R, s), of their chunks.
            goes: (b, R, s), which tokens leave.

        Returns:
            (keys and values (b, R, m, a, d), centres, counts and scores (b, R, m); which of them there are);
            None if no token leaves.
        """
        if not bool(goes.any()):
            return None
        low, high = int(numbers[goes].min()), int(numbers[goes].max()) + 1
        place = (numbers - low).clamp(0, high - low - 1)
        shape = (*goes.shape[:2], high - low)
        counts = torch.zeros(shape, dtype=torch.long, device=self.device).scatter_add_(2, place, goes.long())
        total = torch.zeros_like(counts).scatter_add_(2, place, candidates.positions * goes)
        centres = total // counts.clamp_min(1)
        keys, values = self._candidates_as_read(candidates, None)
        keys = self._rotated(keys.float(), self._of_heads(candidates.positions), back=True)
        place, weight = self._of_heads(place), self._of_heads(goes / counts.clamp_min(1).gather(2, place))
        means = []
        for x in (keys, values.float()):
            index = place.unsqueeze(-1).expand_as(x)
            # a sum of what leaves alone: what stays may be far larger
            x = torch.where(weight.unsqueeze(-1) > 0, x * weight.unsqueeze(-1), 0.0)
            mean = x.new_zeros(*x.shape[:2], shape[2], x.shape[3]).scatter_add_(2, index, x)
            means.append(mean)
        number = torch.arange(low, high, device=self.device)
        active = self._of_heads(counts > 0)
        keys, values, scores, self.chunk_state = self.policy.rows(
            means[0], means[1], number, self.chunk_state, active, self.layer_slot, self.gates
        )
        keys = self._rotated(keys, self._of_heads(centres), back=False)
        by_row = [
            self._in_codec_order(x).unflatten(1, (self.row_heads, -1)).transpose(2, 3) for x in (keys, values)
        ]
        parts = (*by_row, centres, counts, self._pooled(scores))
        return parts, counts > 0

    def _rotated(self, keys: Tensor, positions: Tensor, back: bool) -> Tensor:
        """Keys (b, h, s, d) at positions (b, h, s), rotated or, with `back`, as before their rotation."""
        cos, sin = self.rope(positions.flatten(0, 1), keys)
        turned = (unrotate if back else rotate)(keys.flatten(0, 1).unsqueeze(1), cos.float(), sin.float())
        return turned.squeeze(1).unflatten(0, positions.shape[:2])

    def _keep_rows(
        self, held: Tensor, new: tuple[tuple[Tensor, ...], Tensor] | None, allowed: Tensor
    ) -> None:
        """Keep the rows of chunks with the highest scores, those that are held and new ones together.

        Args:
            held: (b, R), how many are held.
            new: as `_new_rows` returns them.
            allowed: (b, R), how many there may be.
        """
        old_scores, there = pad_rows(self.pooled_scores, self.pooled_starts)
        old_scores = old_scores.masked_fill(~there, -torch.inf).unflatten(0, held.shape)
        there = there.unflatten(0, held.shape)
        if new is None:
            if bool((held <= allowed).all()):
                return
            parts = tuple(
                getattr(self, name).new_zeros(*held.shape, 0, *getattr(self, name).shape[1:])
                for name in POOLED
            )
            exists = there[..., :0]
        else:
            parts, exists = new
        scores = torch.cat([old_scores, parts[4].masked_fill(~exists, -torch.inf)], 2)
        best = top_mask(scores, allowed) & ~scores.isneginf()
        from_old, from_new = best[..., : there.shape[2]], best[..., there.shape[2] :]
        old_starts, new_starts = (starts_of(x.sum(-1).flatten()) for x in (from_old, from_new))
        joined = []
        for name, part in zip(POOLED, parts, strict=True):
            old = getattr(self, name)
            joined.append(
                join_rows(old[from_old[there]], old_starts, part[from_new].to(old.dtype), new_starts)
            )
        starts = old_starts + new_starts
        # by row, and in a row by the number of tokens
        order = (row_of(starts) * (LARGEST_CHUNK + 1) + joined[3].long()).argsort(stable=True)
        self._set_pooled(tuple(x[order] for x in joined), starts)


def _inserted(x: Tensor, more: Tensor, at: int) -> Tensor:
    """A tensor (b, h, s, ...) with other places put in at one."""
    return torch.cat([x[:, :, :at], more.to(x.dtype), x[:, :, at:]], 2)
