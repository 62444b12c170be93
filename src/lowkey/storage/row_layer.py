"""A layer whose older tokens lie in ragged rows, where every row holds tokens of its own.

New tokens are stored densely, as in a `CodedLayer`. Rows (`lowkey.storage.rows`) hold what was kept of older
ones. A query meets the dense tokens and the rows, and the outputs are merged by log-sum-exp. What moves
tokens from the dense part into the rows is up to a subclass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lowkey.backends import grouped
from lowkey.backends.segment import Part
from lowkey.backends.stored import Rebuilding, StepSegment
from lowkey.models.attention_interface import Call
from lowkey.ops.ragged import row_of, select_rows, starts_of
from lowkey.storage.chunk import attend_to_chunk
from lowkey.storage.codec import Codec, Plain
from lowkey.storage.coded import CodedLayer
from lowkey.storage.exact import Exact, SinkPoints
from lowkey.storage.packing import Packing
from lowkey.storage.positioned import RaggedLayer, take_tokens
from lowkey.storage.reading import attend_to_stored, positions_in_rows, reads_in_place
from lowkey.storage.rebuilding import Rotation
from lowkey.storage.rows import (
    Rows,
    attend_to_rows,
    pack_rows,
    rows_nbytes,
    select_row_numbers,
    stored_in_rows,
    unpack_rows,
)
from lowkey.storage.step_counts import View
from lowkey.storage.stepping import Room
from lowkey.storage.unmasked import attend_to_repetition


class RowLayer(RaggedLayer, CodedLayer):
    """Dense newer tokens beside older ones in ragged rows; see the module's docstring.

    Args:
        codec: the form of stored tokens.
        exact: sinks and recent tokens that are held as the model made them; None for none.
        packing: how stored keys and values are written down; None for the model's own numbers.
        sink_points: how sinks are recognised; None if they are each sequence's first tokens.
        keeps_scores: whether a score is held with every token.

    Attributes:
        rows_keys..., rows_values...: the tensors of the packings of the tokens in rows, row after row.
        rows_positions: (n), their positions.
        rows_starts: (b R + 1), where each row begins.
        rows_scores: (n), their scores; empty without `keeps_scores`.
        dense_scores: (b, R, w), the scores of the w oldest dense tokens; empty without `keeps_scores`.
        kept_entries: n.
        row_heads: R, the rows of each sequence.
        score_only_tokens: so many tokens at the end of each chunk score the others and are then forgotten.
            They are neither stored nor counted as seen.
        repeated_span: (start, stop) if those tokens repeat an earlier part of the sequence, counted from its
            first token; else None.
    """

    saved_counters = (*CodedLayer.saved_counters, "front_start", "kept_entries")
    repeated_span: tuple[int, int] | None = None
    kept_entries = 0
    tokens_of_longest_row: int | None = None  # None until it is counted

    def __init__(
        self,
        codec: Codec,
        exact: Exact | None = None,
        packing: tuple[Packing, Packing] | None = None,
        sink_points: SinkPoints | None = None,
        keeps_scores: bool = False,
    ) -> None:
        super().__init__(codec, exact, packing, sink_points)
        self.keeps_scores = keeps_scores
        # padding between turns is refused whatever the form, see `RaggedLayer.check_mask`
        self.form_depends_on_age = False

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
        self.dense_scores = no_scores.new_zeros(b, self.row_heads, 0) if self.keeps_scores else no_scores

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
        self.tokens_of_longest_row = None
        self.kept_entries = len(rows.positions)

    def longest_row(self) -> int:
        """The tokens of the longest row, which are counted once after each change."""
        if self.tokens_of_longest_row is None:
            self.tokens_of_longest_row = int(self.rows_starts.diff().max())
        return self.tokens_of_longest_row

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are held, by attribute name."""
        if not self.is_initialized:
            return {}
        stored = [attribute for name in self.packing for attribute in self._row_attributes(name)]
        others = ("rows_positions", "rows_starts", "rows_scores", "dense_scores")
        return super().tensors() | {name: getattr(self, name) for name in (*stored, *others)}

    def growing_dims(self) -> dict[str, int]:
        """None: an eviction replaces all tensors."""
        return {}

    # -- bytes

    def _packed_token_bytes(
        self,
        shapes: tuple[tuple[int, int], ...] | None = None,
        packings: Mapping[str, Packing] | None = None,
    ) -> float:
        """The bytes of one stored token of one row, without its position.

        Args:
            shapes: (heads, width) of stored keys and values; None for this layer's own.
            packings: of keys and values; None for the layer's own.
        """
        size, shapes = self.recent_k.element_size(), shapes or tuple(self.shapes.values())
        return sum(
            heads // self.row_heads * packing.nbytes(packing.block, width, size) / packing.block
            for packing, (heads, width) in zip((packings or self.packing).values(), shapes, strict=True)
        )

    def _rows_bytes(self, packings: Mapping[str, Packing], starts: Tensor) -> int:
        """The bytes of the keys and values of rows that begin at `starts`."""
        size = self.recent_k.element_size()
        return sum(
            rows_nbytes(packing, starts, self._latents(name), self.shapes[name][1], size)
            for name, packing in packings.items()
        )

    def _exact_token_bytes(self) -> int:
        """The bytes of one exact token of one row."""
        return self.codec.heads_per_row * 2 * self.recent_k.shape[-1] * self.recent_k.element_size()

    @property
    def entry_bytes(self) -> float:
        """The bytes of one token in one row: keys, values, position and, if held, score."""
        return self._packed_token_bytes() + self.rows_positions.element_size() + self._score_bytes()

    def _score_bytes(self) -> int:
        """The bytes of the score of one token in one row."""
        return self.dense_scores.element_size() if self.keeps_scores else 0

    def index_bytes(self) -> int:
        """The bytes that are held whatever is kept: row starts, where sequences begin, and sink slots."""
        sinks = self.exact.sinks * self.sink_index.element_size()
        of_rows = len(self.rows_starts) * self.rows_starts.element_size()
        return of_rows + len(self.offset) * (2 * self.offset.element_size() + sinks)

    def predicted_nbytes(self) -> int:
        """The bytes of dense tokens, of the rows, of indices and of scores."""
        if not self.is_initialized:
            return 0
        scores = (self.kept_entries + self.dense_scores.numel()) * self._score_bytes()
        positions = self.kept_entries * self.rows_positions.element_size()
        starts = len(self.rows_starts) * self.rows_starts.element_size()
        stored = self._rows_bytes(self.packing, self.rows_starts)
        return super().predicted_nbytes() + stored + positions + starts + scores

    # -- attending

    def _takes_plain_steps(self) -> bool:
        alone = self.repeated_span is None and not self.score_only_tokens
        return alone and super()._takes_plain_steps()

    def _segments_of_step(
        self, room: Room, softcap: float | None, rotation: Rotation | None
    ) -> list[StepSegment] | None:
        own = super()._segments_of_step(room, softcap, rotation)
        return None if own is None else [*self._row_segments(rotation), *own]

    def _row_segments(self, rotation: Rotation | None) -> list[StepSegment]:
        """The tokens in rows, with a row for each KV head."""
        return [self._segment_of(self.rows, self.packing, rotation)] if self.kept_entries else []

    def _segment_of(
        self, rows: Rows, packings: Mapping[str, Packing], rotation: Rotation | None
    ) -> StepSegment:
        """The tokens of some rows, of which there are some, with a row for each KV head."""
        heads, starts = self.codec.heads_per_row, rows.starts
        keys, values = (
            stored_in_rows(packing, parts, self.shapes[name][1], starts).repeated(
                heads // self._latents(name)
            )
            for (name, packing), parts in zip(packings.items(), (rows.keys, rows.values), strict=True)
        )
        rebuilding = None
        if rotation is not None:
            maps = self.codec.key_maps(heads * self.row_heads)
            firsts = starts[:-1].repeat_interleave(heads)
            rebuilding = Rebuilding(*maps, rows.positions, firsts, rotation)
        lengths = starts.diff().repeat_interleave(heads)
        return StepSegment(keys, values, lengths, self.codec != Plain(), 0, rebuilding)

    def _parts_of_step(self, call: Call, room: Room, view: View) -> list[Part]:
        """See `SteppingLayer._parts_of_step`."""
        return [*super()._parts_of_step(call, room, view), *self._row_parts(call)]

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
        if self.repeated_span is not None:
            if self._repeats_whole_sequences(call):
                k, v = self._dense_as_read((keys, values))
                repeated, lse = attend_to_repetition(call.query, k, v, self.repeated_span, call.scaling)
                return [repeated], lse
            inside = self._in_repetition(keys.shape[2])
            mask = call.full_mask(self.seen)
            mask = mask if mask is not None else inside.new_ones(1, 1, self.seen)
            split = [replace(call, mask=mask & side.unsqueeze(1)) for side in (inside, ~inside)]
            dense = [self._dense_part(side, buffers, exact) for side in split]
            rows = self._row_parts(call, split=True)
            lse = torch.stack([dense[0][1], *(part[1] for part in rows[::2])]).logsumexp(0)
            return [*dense, *rows], lse
        rows = self._row_parts(call)
        came_as_stored = self.is_lossless or (self.exact_prefill and bool(exact.all()))
        sinks_are_dense = not self.exact.sinks or not self.front_start
        if self.seen - self.front_start == keys.shape[2] and came_as_stored and sinks_are_dense:
            return [attend_to_chunk(call, keys, values, self.seen), *rows], None
        if self._reads_in_place(call):
            return [*self._step_parts(call, *buffers, exact), *rows], None
        if (part := self._unmasked_part(call, *buffers, exact)) is not None:
            return [part, *rows], None
        if rows:
            return [self._dense_part(call, buffers, exact), *rows], None
        out = grouped.attend(self._segments(call, *buffers, exact), call.scaling, call.softcap)
        return [(out, out.new_zeros(()))], None

    def _repeats_whole_sequences(self, call: Call) -> bool:
        """Whether all tokens are dense, and the new ones repeat a span of them in every sequence."""
        t, span = call.query.shape[3], self.repeated_span or (0, 0)
        all_dense = not self.front_start and self.transient_tokens == t
        return all_dense and span[0] < min(span[1], self.seen - t) and self._is_unmasked(call)

    def _dense_part(self, call: Call, buffers: tuple[Tensor, Tensor], exact: Tensor) -> Part:
        segments = self._segments(call, *buffers, exact)
        return grouped.partial(segments, call.scaling, call.softcap)

    def _in_repetition(self, t: int) -> Tensor:
        """(b, s): which of the tokens seen are of the repeated span, or among the newest `t`."""
        index = torch.arange(self.seen, device=self.device)
        return self._in_span(index - self.first_index) | (index >= self.seen - t)

    def _in_span(self, number: Tensor) -> Tensor:
        """Which tokens, numbered from their sequence's first, lie in the repeated span."""
        start, stop = self.repeated_span or (0, 0)
        return (number >= start) & (number < stop)

    def _row_parts(self, call: Call, split: bool = False) -> list[Part]:
        """Attention over the rows; if `split`, over the repeated span and over all else by itself."""
        if not self.kept_entries:
            return []
        return self._parts_of(self.rows, self.packing, call, split, self.longest_row)

    def _parts_of(
        self,
        rows: Rows,
        packings: Mapping[str, Packing],
        call: Call,
        split: bool,
        longest: Callable[[], int],
    ) -> list[Part]:
        """Attention over some rows, of which `longest` tells the most tokens; see `_row_parts`."""
        positions, starts = rows.positions, rows.starts
        at = self.positions_of(self.seen - call.query.shape[3], self.seen)
        if not split and self._reads_in_place(call):
            keys_stored, values_stored = (
                stored_in_rows(packing, parts, self.shapes[name][1], starts)
                for (name, packing), parts in zip(packings.items(), (rows.keys, rows.values), strict=True)
            )
            of_rows = positions_in_rows(positions, starts, len(self.offset), self.codec.heads_per_row)
            part = attend_to_stored(
                self.codec,
                call.query,
                at,
                keys_stored,
                values_stored,
                starts.diff(),
                of_rows,
                call.scaling,
                call.softcap,
                longest=longest(),
            )
            return [part]
        keys, values = self._unpacked(rows, packings)
        sets = [(keys, values, positions, starts)]
        if split:
            row = row_of(starts)
            inside = self._in_span(positions - self._first_positions()[row // self.row_heads, 0, 0])
            counts = torch.zeros_like(starts[1:]).index_add_(0, row, inside.long())
            sets = [
                (keys[chosen], values[chosen], positions[chosen], starts_of(lengths))
                for chosen, lengths in ((inside, counts), (~inside, starts.diff() - counts))
            ]
        return [
            attend_to_rows(self.codec, call.query, at, *some, call.scaling, call.softcap) for some in sets
        ]

    def _reads_in_place(self, call: Call) -> bool:
        """Whether this call's queries meet stored tokens as they are packed."""
        rows = self.rows
        return super()._reads_in_place(call) and reads_in_place(call.query, (*rows.keys, *rows.values))

    def _unpacked(self, rows: Rows, packings: Mapping[str, Packing] | None = None) -> tuple[Tensor, Tensor]:
        """Keys (n, a, r_K) and values (n, a', r_V) of rows, in the layer's packings if none are given."""
        both = zip((packings or self.packing).items(), (rows.keys, rows.values), strict=True)
        keys, values = (
            unpack_rows(packing, parts, self.shapes[name][1], rows.starts) for (name, packing), parts in both
        )
        return keys, values

    def _first_positions(self) -> Tensor:
        """(b, 1, 1): the position of each sequence's first token."""
        return (self.first_index - self.offset).unsqueeze(2)

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

    # -- moving

    def _dense_as_read(self, chunk: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Keys and values (b, h, s, d) of the dense tokens, older ones as queries see them.

        Args:
            chunk: keys and values (b, h, t, d) of the newest of them as they came, or None.
        """
        if chunk is not None and chunk[0].shape[2] == self.seen - self.front_start:
            return chunk
        keys, values = self._unpacked_dense()
        slots = self._positions_of_slots(0, keys.shape[2])
        keys = self._of_dense(self.recent_k, self.codec.rebuilt_keys(keys, slots))
        values = self._of_dense(self.recent_v, self.codec.expand_values(values))
        if self.exact.sinks:
            tokens = torch.arange(self.front_start, self.seen, device=self.device)
            in_slot = self.sink_index.unsqueeze(1) == tokens.unsqueeze(1)  # (b, s, sinks)
            is_sink, slot = in_slot.any(2)[:, None, :, None], in_slot.int().argmax(2)
            keys = torch.where(is_sink, take_tokens(self.sink_k, slot), keys)
            values = torch.where(is_sink, take_tokens(self.sink_v, slot), values)
        return _newest_replaced((keys, values), chunk)

    def _latents_of_dense(self, chunk: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Latents (b, G, s, r) of all dense tokens, for a packing that packs blocks of tokens.

        Tokens are encoded as they came where these are at hand, so that they are rounded once. Stored latents
        are taken as they are: maps that do not invert each other would change them.

        Args:
            chunk: keys and values (b, h, t, d) of the newest tokens as they came, or None.
        """
        new = None
        if chunk is not None:
            start = self.seen - chunk[0].shape[2]
            new = self.codec.encode(*chunk, self.positions_of(start, self.seen))
            if start == self.front_start:
                return new
        exact = self._of_dense(self.recent_k), self._of_dense(self.recent_v)
        encoded = self.codec.encode(*exact, self.positions_of(self.front_start, self.seen))
        stored = self._unpacked_dense()
        old = self._of_dense(encoded[0], stored[0]), self._of_dense(encoded[1], stored[1])
        return _newest_replaced(old, new)

    def _of_dense(self, exact: Tensor, stored: Tensor | None = None) -> Tensor:
        """All dense tokens (b, heads, s, width), from those of the window and those of the slots.

        Args:
            exact: (b, heads, n, width), the newest tokens, of which those that are in no slot are taken.
            stored: (b, heads, slots, width), the stored tokens; None for zeros in their places.
        """
        missing = self.seen - self.front_start - exact.shape[2]
        exact = torch.nn.functional.pad(exact, (0, 0, missing, 0))
        if stored is None or not stored.shape[2]:
            return exact
        if self.block == 1:  # all sequences have the same tokens in slots
            return torch.cat([stored, exact[:, :, stored.shape[2] :]], 2)
        slot = torch.arange(self.front_start, self.seen, device=self.device) - self._first_slot_index()
        # a sequence that is ahead of the others reads tokens that wait for them as they will be stored
        left = self._slots_left(self.first_index.new_tensor([self.seen]))
        is_stored = ((slot >= 0) & (slot < left))[:, None, :, None]
        at = slot.clamp(0, stored.shape[2] - 1).expand(len(exact), -1)[:, None, :, None]
        return torch.where(is_stored, stored.gather(2, at.expand_as(exact)), exact)

    def _unpacked_dense(self) -> tuple[Tensor, Tensor]:
        """Keys (b, G, s, r_K) and values (b, G', s, r_V) of all slots that some sequence has ready."""
        (count, ahead), tensors = self.storable(), {name: self.packed_tensors(name) for name in self.packing}
        if ahead > count:
            tensors = self._with_stored(self._packed(self.recent_k, self.recent_v, count, ahead))
        keys, values = (p.unpack(tensors[name], self.shapes[name][1]) for name, p in self.packing.items())
        return keys, values

    def _forget_transient(self) -> None:
        """Drop the tokens that only scored the others."""
        count = self.transient_tokens
        if count:
            self.seen -= count
            self.transient_tokens = 0
            length = self.recent_k.shape[2] - count
            self.recent_k = self.recent_k[:, :, :length].clone()
            self.recent_v = self.recent_v[:, :, :length].clone()

    def _empty_slots(self, leaving: int) -> None:
        """Drop all dense tokens but the window, once the kept ones are in the rows."""
        for name, packing in self.packing.items():
            empty = tuple(part.narrow(packing.axis, 0, 0).clone() for part in self.packed_tensors(name))
            self._set_packed(name, empty)
        self.front_start += leaving
        window = self.recent_k.shape[2] - (self.seen - self.front_start)
        self.recent_k, self.recent_v = (x[:, :, window:].clone() for x in (self.recent_k, self.recent_v))

    def earliest_crop(self) -> int:
        """The fewest tokens seen to which `crop` goes back: those that were seen at the last eviction."""
        moved = self.front_start + self.exact.recent if self.front_start else 0
        return max(moved, self.front_start + self.dense_scores.shape[-1])

    def ragged(self) -> dict[str, tuple[str, ...]]:
        """Further tensors that lie row after row, by the name of the tensor that says where rows begin."""
        return {}

    def selected_by_subclass(self) -> set[str]:
        """Further tensors that lie row after row, of which a subclass selects sequences itself."""
        return set()

    def select_sequences(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Keep some sequences of the batch; see `StoringLayer.select_sequences`."""
        if not self.is_initialized:
            return
        self.make_compact()
        _, numbers = self.chosen_rows(choose, self.row_heads)
        rows, ragged = self.rows, self.ragged()
        own = [attribute for name in self.packing for attribute in self._row_attributes(name)]
        flat = {*own, "rows_positions", "rows_starts", "rows_scores", *self.selected_by_subclass()}
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
        scores = select_rows(rows.scores, rows.starts, numbers)[0] if self.keeps_scores else rows.scores
        self._set_rows(Rows(parts[0], parts[1], positions, row_starts, scores))
        self._store(self.recent_k, self.recent_v)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.front_start = self.kept_entries = self.transient_tokens = 0
        self.repeated_span = None


def _newest_replaced(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Keys and values (b, h, s, d) with others (b, h, t, d) in the place of the newest."""
    if new is None:
        return old
    keys, values = (torch.cat([x[:, :, : -y.shape[2]], y], 2) for x, y in zip(old, new, strict=True))
    return keys, values
