"""A layer that stores every token in one form, with exact sinks and recent tokens if wanted.

The form is a codec's (plain or low rank), written down by a packing (the model's own numbers or integers);
`stored_tokens` says which tokens are stored.

What a query sees: up to three segments with masks that share one softmax. Tokens within the query's own
window (the recent segment), sinks outside the window (the sink segment), and all other tokens in their stored
form. A token that is both stored and a sink is masked in the stored segment, so it counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lowkey.backends import fused, grouped
from lowkey.backends.segment import Part, Segment, merge_parts, merge_seen
from lowkey.backends.stored import Rebuilding, StepSegment, StoredRows
from lowkey.core.types import LowkeyError
from lowkey.models.attention_interface import Call
from lowkey.storage.base import RECORD_FIRST
from lowkey.storage.chunk import attend_to_chunk
from lowkey.storage.codec import Plain
from lowkey.storage.positioned import index_behind_last
from lowkey.storage.reading import attend_to_stored, reads_in_place
from lowkey.storage.rebuilding import Rotation
from lowkey.storage.rows import exact_segment, stored_densely
from lowkey.storage.step_counts import View, aligned
from lowkey.storage.stepping import Room
from lowkey.storage.stored_tokens import EMPTY, StoredTokens
from lowkey.storage.unmasked import attend_by_age


class CodedLayer(StoredTokens):
    """Stores all tokens but the recent ones in a codec's form; see the module's docstring."""

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Store what leaves the window, then answer the call; see `StoringLayer.attend`."""
        keys, values = self._in_codec_order(keys), self._in_codec_order(values)
        call = replace(call, query=self._in_codec_order(call.query))
        if (out := self.plain_step(keys, values, call)) is not None:
            return self._in_model_order(out)
        self.make_compact()
        real = self.locate_tokens(call, keys.shape[2])
        if self.form_depends_on_age:
            self.end_index = index_behind_last(real, self.seen, self.end_index)
        buffers = self._take_in(keys, values, real)
        exact = self.exact_rows(real)
        if self._reads_in_place(call):
            out = merge_parts(self._step_parts(call, *buffers, exact))[0].to(values.dtype)
        elif (part := self._unmasked_part(call, *buffers, exact)) is not None:
            out = part[0].to(values.dtype)
        else:
            segments = self._segments(call, *buffers, exact)
            out = grouped.attend(segments, call.scaling, call.softcap)
        return self._in_model_order(out)

    def _take_in(self, keys: Tensor, values: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens.

        Args:
            keys: (b, h, t, d), heads in the codec's order.
            values: the same.
            real: (b, t), which of the tokens are no padding.

        Returns:
            Keys and values (b, h, n, d) of the window as it was and the new tokens: all that is exact.
        """
        if self.exact.sinks:
            self._find_sinks(self._in_model_order(values), real)
        # of the window and the chunk together, the oldest are now stored
        buffer_k, buffer_v = torch.cat([self.recent_k, keys], 2), torch.cat([self.recent_v, values], 2)
        self._store(buffer_k, buffer_v)
        self._store_sinks(keys, values)
        return buffer_k, buffer_v

    def replay(self, keys: Tensor, values: Tensor, call: Call | None) -> None:
        """Store recorded tokens again; see `StoringLayer.replay`."""
        if call is None:
            return
        ordered = self._in_codec_order(keys), self._in_codec_order(values)
        if self._take_plain_step(*ordered, call) is not None:
            return
        self.make_compact()
        real = self.locate_tokens(call, keys.shape[2])
        if self.form_depends_on_age:
            self.end_index = index_behind_last(real, self.seen, self.end_index)
        self._take_in(*ordered, real)

    def earliest_crop(self) -> int:
        """The fewest tokens seen to which `crop` goes back: all tokens are held."""
        return 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens in place; see `StoringLayer.crop`.

        Raises:
            LowkeyError: if tokens that were evicted or compressed since would have to come back.
        """
        self.make_compact()
        before, left = self.seen, self.seen - abs(tokens_to_remove)
        if left < (earliest := self.earliest_crop()):
            raise LowkeyError(
                f"crop({tokens_to_remove}): tokens were evicted since; at most {before - earliest} can be "
                f"removed; {RECORD_FIRST}"
            )
        (stored, _), window = self.storable(), self.recent_k.shape[2]
        self.seen, begun = left, self.first_index < left
        if self.form_depends_on_age:
            self.end_index = torch.where(begun, self.end_index.clamp_max(left), 0)
        self.first_index, self.offset = self.first_index.clamp_max(left), self.offset.where(begun, left)
        if self.is_lossless:
            # what is stored and the window are of one form, so the window can be filled again
            stored_now = (*self.packed_tensors("keys"), *self.packed_tensors("values"))
            recent = [
                torch.cat(pair, 2) for pair in zip(stored_now, (self.recent_k, self.recent_v), strict=True)
            ]
            recent = [x[:, :, : left - self.front_start] for x in recent]
            self._set_packed("keys", (recent[0][:, :, :0].clone(),))
            self._set_packed("values", (recent[1][:, :, :0].clone(),))
            self._store(*recent)
        else:
            kept, _ = self.storable()
            exact = left - self.front_start - kept
            if kept < stored and exact:
                raise LowkeyError(
                    f"crop({tokens_to_remove}): {exact} of the tokens that stay would have to be exact again "
                    f"and are compressed; {RECORD_FIRST}"
                )
            self._keep_stored(kept, stored)
            gone = before - left if kept == stored else window
            self.recent_k, self.recent_v = (
                x[:, :, : window - gone].clone() for x in (self.recent_k, self.recent_v)
            )
        lost = (self.sink_index >= left)[:, None, :, None]
        self.sink_k, self.sink_v = (x.masked_fill(lost, 0) for x in (self.sink_k, self.sink_v))
        self.sink_index = self.sink_index.masked_fill(lost[:, 0, :, 0], EMPTY)

    def select_sequences(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Keep some sequences of the batch; see `StoringLayer.select_sequences`."""
        self.make_compact()
        super().select_sequences(choose)
        if self.is_initialized:  # flush blocks held back for sequences that were removed
            self._store(self.recent_k, self.recent_v)

    # -- reading

    def _segments_of_step(
        self, room: Room, softcap: float | None, rotation: Rotation | None
    ) -> list[StepSegment] | None:
        if rotation is None and not self.codec.meets_stored_keys(softcap):
            return None
        if self.dtype == torch.float64:
            return None  # kernels compute in fp32
        segments: list[StepSegment] = []
        if self.exact.sinks:
            segments.append(exact_segment(self.sink_k, self.sink_v))
        if room.stored + room.ahead:
            dense = self._dense_rows()
            for start in room.sequences.runs()[0]:
                segments.append(self._run_segment(*dense, start, room, rotation))
        window = [] if self.encodes_at_once else [exact_segment(self.recent_k, self.recent_v)]
        return [*segments, *window]

    def _run_segment(
        self, keys: StoredRows, values: StoredRows, start: np.ndarray, room: Room, rotation: Rotation | None
    ) -> StepSegment:
        """A run of dense stored tokens, with a row for each KV head.

        Args:
            keys: all dense tokens, with a row for each stored head.
            values: the same.
            start: (b), the first slot of each sequence.
            room: of the steps.
            rotation: see `SteppingLayer._segments_of_step`.
        """
        heads, begin = self.recent_k.shape[1], aligned(start)
        keys, values = (
            x.repeated(heads // self.shapes[name][0]).from_tokens(self._of_heads_in(begin))
            for x, name in ((keys, "keys"), (values, "values"))
        )
        rebuilding = None
        if rotation is not None:
            at = room.sequences.slot - room.sequences.offset
            lowest, stop = int(at.min()), int(at.max()) + room.stored + room.ahead
            positions = torch.arange(lowest, stop, dtype=torch.int32, device=self.device)
            firsts = self._of_heads_in(at - lowest + begin)
            rebuilding = Rebuilding(*self.codec.key_maps(heads), positions, firsts, rotation)
        hidden = self._of_heads_in(start - begin)
        return StepSegment(keys, values, None, self.codec != Plain(), hidden, rebuilding)

    def _of_heads_in(self, x: np.ndarray) -> Tensor:
        """Numbers of sequences (b) as those of their KV heads (b h)."""
        return torch.from_numpy(np.repeat(x, self.recent_k.shape[1])).to(self.device)

    def _parts_of_step(self, call: Call, room: Room, view: View) -> list[Part]:
        """See `SteppingLayer._parts_of_step`."""
        parts: list[Part] = []
        if count := int(view.dense.max()):
            slots, (starts, stops) = np.arange(count), room.sequences.runs()
            seen = ((slots >= starts[..., None]) & (slots < stops[..., None])).any(0)
            mask = self._mask(seen & (slots < view.dense[:, None]))
            parts.append(self._attend_to_dense(call, count, mask))
        window, exact = slice(int(view.window.min()), view.stop), []
        if window.start < window.stop:
            mask = self._mask(np.arange(window.start, window.stop) >= view.window[:, None])
            exact = [Segment(call.query, self.recent_k[:, :, window], self.recent_v[:, :, window], mask)]
        if self.exact.sinks:
            mask = self._mask(np.arange(self.exact.sinks) < view.sinks[:, None])
            exact.append(Segment(call.query, self.sink_k, self.sink_v, mask))
        if exact:
            parts.append(grouped.partial(exact, call.scaling, call.softcap))
        return parts

    def _mask(self, seen: np.ndarray) -> Tensor | None:
        """Which tokens (b, s) the query of each sequence sees, as a mask; None if it sees all."""
        return None if seen.all() else torch.from_numpy(seen).unsqueeze(1).to(self.device)

    def _segments(self, call: Call, buffer_k: Tensor, buffer_v: Tensor, exact: Tensor) -> list[Segment]:
        """What the queries attend to: stored tokens, the window with the chunk, and the sinks.

        Args:
            call: the attention call.
            buffer_k: (b, h, n, d), the tokens that were held exactly before this call, and the new ones.
            buffer_v: the same.
            exact: (b), the sequences that see this chunk exactly.
        """
        # many queries beside exact tokens: rebuilt keys can join the exact ones in one fused product
        expand = not self._only_stored_tokens_are_seen(exact) and call.query.shape[3] >= fused.QUERIES
        stored = self._stored_segment(call, buffer_k, buffer_v, expand)
        mask, segments = self._exact_segments(call, buffer_k, buffer_v, exact)
        return [replace(stored, mask=mask), *segments]

    def _is_unmasked(self, call: Call) -> bool:
        """Whether a long call's queries see all tokens up to their own, and sinks are the first tokens."""
        plain = call.mask is None and self.sink_points is None
        return (
            plain and fused.gives_lse(call.query, self.recent_k, call.softcap) and not self.first_index.any()
        )

    def _unmasked_part(self, call: Call, buffer_k: Tensor, buffer_v: Tensor, exact: Tensor) -> Part | None:
        """Attention over dense tokens and sinks without masks; None if it needs some.

        Arguments are those of `_segments`.
        """
        sinks, start = self.exact.sinks, self.front_start
        if not self._is_unmasked(call) or self.transient_tokens or 0 < start < sinks:
            return None
        if self.exact_prefill and bool(exact.any()):
            if self.seen - start > call.query.shape[3] or (start and sinks):
                return None
            return attend_to_chunk(call, buffer_k, buffer_v, self.seen)
        some_are_exact = not self._only_stored_tokens_are_seen(exact)
        far = self._stored_segment(call, buffer_k, buffer_v, expand=some_are_exact)
        if some_are_exact and far.query is not call.query:
            return None  # queries meet stored tokens in another basis than exact ones
        if sinks and not start:
            n = min(sinks, far.keys.shape[2])
            keys, values = (
                torch.cat([x[:, :, :n], y[:, :, n:]], 2)
                for x, y in ((self.sink_k, far.keys), (self.sink_v, far.values))
            )
            far = replace(far, keys=keys, values=values)
        held, recent = self.seen - start, self.exact.recent
        part = attend_by_age(far, call.query, (buffer_k, buffer_v), held, recent, self.block, call.scaling)
        if sinks and start:
            part = merge_seen(part, fused.rectangle(call.query, self.sink_k, self.sink_v, call.scaling))
        return part

    def _exact_segments(
        self, call: Call, buffer_k: Tensor, buffer_v: Tensor, exact: Tensor
    ) -> tuple[Tensor | None, list[Segment]]:
        """(the slots that queries see as they are stored (b|1, t, slots) or None, what they see exactly).

        Arguments are those of `_segments`.
        """
        mask = call.full_mask(self.seen)
        if self._only_stored_tokens_are_seen(exact):
            return None if mask is None else mask[..., self.front_start :], []
        mask = mask if mask is not None else self.offset.new_ones(1, 1, self.seen, dtype=torch.bool)
        seen_exactly, sink_index = self._seen_exactly(call, exact), self.sink_index.long()
        far = mask & ~seen_exactly  # tokens that are read in stored form, or as sinks
        tokens = torch.arange(self.seen, device=sink_index.device)
        is_sink = (sink_index.unsqueeze(2) == tokens).any(1, keepdim=True)
        start = self.seen - buffer_k.shape[2]
        segments = [Segment(call.query, buffer_k, buffer_v, (mask & seen_exactly)[..., start:])]
        if self.exact.sinks:
            sinks = Segment(call.query, self.sink_k, self.sink_v, self._mask_at(far, sink_index))
            segments.append(sinks)
        return self._mask_of_slots(far & ~is_sink, self.storable()[1]), segments

    def _reads_in_place(self, call: Call) -> bool:
        """Whether this call's queries meet stored tokens as they are packed."""
        held = [x for name in self.packing for x in self.packed_tensors(name)]
        readable = all(packing.bits is not None for packing in self.packing.values())
        return readable and reads_in_place(call.query, held)

    def _step_parts(self, call: Call, buffer_k: Tensor, buffer_v: Tensor, exact: Tensor) -> list[Part]:
        """Attention over `_segments` for a few queries, which read stored tokens as they are packed.

        Arguments are those of `_segments`.
        """
        (count, ahead), t = self.storable(), call.query.shape[3]
        mask, segments = self._exact_segments(call, buffer_k, buffer_v, exact)
        parts: list[Part] = []
        if count:
            parts.append(self._attend_to_dense(call, count, None if mask is None else mask[..., :count]))
        if ahead > count:
            # tokens that wait for other sequences: at most one block, seen as they will be stored
            waiting = self._packed(buffer_k, buffer_v, count, ahead)
            k, v = (p.unpack(waiting[name], self.shapes[name][1]) for name, p in self.packing.items())
            at = self.positions_of(self.seen - t, self.seen)
            segment = self.codec.segment(call.query, k, v, self._positions_of_slots(count, ahead), at)
            segments.insert(0, replace(segment, mask=None if mask is None else mask[..., count:]))
        if segments:
            parts.append(grouped.partial(segments, call.scaling, call.softcap))
        return parts

    def _dense_rows(self) -> tuple[StoredRows, StoredRows]:
        """Dense keys and values as kernels read them, a row for each stored head."""
        keys, values = (
            stored_densely(packing, self.packed_tensors(name), self.shapes[name][1])
            for name, packing in self.packing.items()
        )
        return keys, values

    def _attend_to_dense(self, call: Call, count: int, mask: Tensor | None) -> Part:
        """Attention of a few queries over the first `count` dense stored tokens, as they are packed."""
        rows = len(self.offset) * call.query.shape[1] // self.codec.heads_per_row
        return attend_to_stored(
            self.codec,
            call.query,
            self.positions_of(self.seen - call.query.shape[3], self.seen),
            *self._dense_rows(),
            torch.full((rows,), count, device=self.device),
            self._positions_of_slots,
            call.scaling,
            call.softcap,
            mask,
            count,
            alike=True,
        )

    def _only_stored_tokens_are_seen(self, exact: Tensor) -> bool:
        """Whether no query sees any token exactly, given the sequences (b) that see their chunk exactly."""
        chunk_is_exact = self.exact_prefill and bool(exact.any())
        some_are_exact = self.exact.sinks or self.exact.recent or self.block > 1 or self.transient_tokens
        return not (some_are_exact or chunk_is_exact)

    def _stored_segment(self, call: Call, buffer_k: Tensor, buffer_v: Tensor, expand: bool) -> Segment:
        """All stored tokens, and those that will be stored when the other sequences have caught up."""
        stored, ahead = self.storable()
        tensors = {name: self.packed_tensors(name) for name in self.packing}
        if ahead > stored:
            # packed now and not kept: queries must see these tokens as they will be stored
            tensors = self._with_stored(self._packed(buffer_k, buffer_v, stored, ahead))
        keys, values = (
            packing.unpack(tensors[name], self.shapes[name][1]) for name, packing in self.packing.items()
        )
        query_positions = self.positions_of(self.seen - call.query.shape[3], self.seen)
        positions = self._positions_of_slots(0, ahead)
        return self.codec.segment(call.query, keys, values, positions, query_positions, expand)

    def _seen_exactly(self, call: Call, exact: Tensor) -> Tensor:
        """(b|1, t, s): the tokens that each query sees exactly, within its own window or in an exact chunk.

        A window ends at its query, so a prompt read at once gives what it gives chunk by chunk.
        """
        t, device = call.query.shape[3], self.offset.device
        # when the i-th query asks, it has been seen itself: counts from seen - t + 1 on
        left = self._slots_left(torch.arange(self.seen - t + 1, self.seen + 1, device=device))
        tokens = torch.arange(self.seen, device=device)
        in_window = (tokens - self._first_slot_index()).unsqueeze(1) >= left.unsqueeze(2)
        if not self.exact_prefill:
            return in_window
        return in_window | ((tokens >= self.seen - t) & exact[:, None, None])

    def _mask_of_slots(self, mask: Tensor, count: int) -> Tensor:
        """A mask over tokens (b|1, t, s) as a mask over the first `count` slots."""
        if self.block == 1:
            return mask[..., self.front_start : self.front_start + count]
        return self._mask_at(mask, self._indices_of_slots(0, count))

    def _mask_at(self, mask: Tensor, index: Tensor) -> Tensor:
        """A mask over tokens (b|1, t, s) at some indices (b|1, n); tokens that have not come are not seen."""
        b, t = max(len(mask), len(index)), mask.shape[1]
        # clamped so that it can be gathered; the comparison below hides what was out of range
        at = index.clamp(max=self.seen - 1).unsqueeze(1).expand(b, t, -1)
        return mask.expand(b, -1, -1).gather(2, at) & (index < self.seen).unsqueeze(1)
