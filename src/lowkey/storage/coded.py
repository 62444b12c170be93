"""A layer that stores every token in one form, with exact sinks and recent tokens if wanted.

The form is a codec's (plain or low rank), written down by a packing (the model's own numbers or integers).

Life of a token: it arrives in the *recent window*, where it is held exactly. When `exact.recent` newer tokens
have come, it is encoded and packed with the other stored tokens. If it is a sink, an exact copy is held
besides. Keys that are packed in blocks of tokens (KIVI) are stored one whole block at a time.

What a query sees: up to three segments with masks that share one softmax. Tokens within the query's own
window (the recent segment), sinks outside the window (the sink segment), and all other tokens in their stored
form. A token that is both stored and a sink is masked in the stored segment, so it counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lowkey.backends import fused, grouped
from lowkey.backends.segment import Part, Segment, merge_parts
from lowkey.core.types import LowkeyError
from lowkey.models.attention_interface import Call
from lowkey.storage.base import RECORD_FIRST
from lowkey.storage.codec import Codec, Plain
from lowkey.storage.exact import Exact, SinkPoints
from lowkey.storage.packing import Packing, Unpacked, joined_parts
from lowkey.storage.positioned import PositionedLayer, index_behind_last, take_tokens
from lowkey.storage.reading import attend_to_stored, reads_in_place
from lowkey.storage.rows import stored_densely

PackedTensors = dict[str, tuple[Tensor, ...]]
"""The tensors that a packing holds, of `keys` and of `values`."""
EMPTY = 2**31 - 1  # the index in a sink slot that no token has taken


class CodedLayer(PositionedLayer):
    """Stores all tokens but the recent ones in a codec's form; see the module's docstring.

    Blocks begin at each sequence's first real token, so padding changes no scale and nothing that a query
    sees. All sequences of a batch store the same number of tokens: as many as the sequence with the fewest
    has ready. The others hold up to one block more exactly, but show it to queries as it will be stored, so
    that a sequence gives the same result in a batch and alone.

    Args:
        codec: the form of stored tokens.
        exact: sinks and recent tokens, and what a chunk sees of itself; None for none.
        packing: how stored keys and values are written down; None for the model's own numbers.
        sink_points: how sinks are recognised; None if they are each sequence's first real tokens.

    Attributes:
        keys..., values...: the tensors of the packings, named by their fields (`keys_codes`, `keys_scale`).
        recent_k, recent_v: (b, h, recent, d), the tokens of the window, exact.
        sink_k, sink_v: (b, h, sinks, d), exact copies of the sinks.
        sink_index: (b, sinks), the index of the token in each sink slot, or EMPTY.
        end_index: (b, 1), the index behind each sequence's last real token, 0 while there is none. Held only
            with `form_depends_on_age`.
        front_start: the index of the first token that the dense tensors may hold. A subclass that moves
            tokens elsewhere raises it.
        transient_tokens: within a call, so many of the newest tokens will be forgotten at its end.
        form_depends_on_age: whether the numbers that a query sees of a token depend on how many tokens have
            come since. Padding between turns would then count as tokens, and is refused.
        is_lossless: whether tokens are stored as the model made them.
        block: tokens that are packed together; 1 where each is packed by itself.
        shapes: the heads G and the width r of stored `keys` and `values`.
    """

    def __init__(
        self,
        codec: Codec,
        exact: Exact | None = None,
        packing: tuple[Packing, Packing] | None = None,
        sink_points: SinkPoints | None = None,
    ) -> None:
        super().__init__(exact is not None and exact.prefill == "exact")
        self.codec, self.exact, self.sink_points = codec, exact or Exact(), sink_points
        self.packing = dict(zip(("keys", "values"), packing or (Unpacked(), Unpacked()), strict=True))
        self.block = max(p.block for p in self.packing.values())
        self.is_lossless = (self.codec, *self.packing.values()) == (Plain(), Unpacked(), Unpacked())
        self.form_depends_on_age = self.block > 1 or (self.exact.recent > 0 and not self.is_lossless)

    front_start: int = 0
    transient_tokens: int = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty tensors for this batch size, device and dtype."""
        b, h, _, d = key_states.shape
        self.device, n = key_states.device, self.exact.sinks
        self.codec = self.codec.to_match(key_states)
        self.sink_points = self.sink_points and self.sink_points.to(self.device)
        self.recent_k, self.recent_v = key_states.new_empty(b, h, 0, d), value_states.new_empty(b, h, 0, d)
        self.sink_k, self.sink_v = key_states.new_zeros(b, h, n, d), value_states.new_zeros(b, h, n, d)
        self.sink_index = torch.full((b, n), EMPTY, dtype=torch.int32, device=self.device)
        self.reset_rows(b)
        if self.form_depends_on_age:
            self.end_index = torch.zeros_like(self.first_index)
        # encoding no tokens tells the shapes and dtypes of the stored form
        none = self.codec.encode(self.recent_k, self.recent_v, self.positions_of(0, 0))
        self.shapes = {name: (x.shape[1], x.shape[3]) for name, x in zip(self.packing, none, strict=True)}
        for name, x in zip(self.packing, none, strict=True):
            self._set_packed(name, self.packing[name].pack(x))
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are held, by attribute name."""
        if not self.is_initialized:
            return {}
        stored = [attribute for name in self.packing for attribute in self.packed_attributes(name)]
        exact = ["recent_k", "recent_v", "sink_k", "sink_v", "sink_index"]
        rows = ["offset", "first_index", *(["end_index"] if self.form_depends_on_age else [])]
        return {name: getattr(self, name) for name in (*stored, *exact, *rows)}

    def growing_dims(self) -> dict[str, int]:
        """Stored tokens only grow; the window and the sinks are replaced."""
        packings = self.packing.items() if self.is_initialized else ()
        return {name: packing.axis for what, packing in packings for name in self.packed_attributes(what)}

    def predicted_nbytes(self) -> int:
        """The bytes of stored tokens, of exact ones in the model's dtype, and of the indices."""
        if not self.is_initialized:
            return 0
        b, h, _, d = self.recent_k.shape
        size, (stored, _) = self.recent_k.element_size(), self.storable()
        exact = (self.seen - self.front_start - stored + self.exact.sinks) * 2 * d * h * size
        packed = sum(
            heads * self.packing[name].nbytes(stored, width, size)
            for name, (heads, width) in self.shapes.items()
        )
        row_indices = (3 if self.form_depends_on_age else 2) * self.offset.element_size()
        return b * (packed + exact + row_indices + self.exact.sinks * self.sink_index.element_size())

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Store what leaves the window, then answer the call; see `StoringLayer.attend`."""
        real = self.locate_tokens(call, keys.shape[2])
        if self.form_depends_on_age:
            self.end_index = index_behind_last(real, self.seen, self.end_index)
        keys, values = self._in_codec_order(keys), self._in_codec_order(values)
        call = replace(call, query=self._in_codec_order(call.query))
        buffers = self._take_in(keys, values, real)
        exact = self.exact_rows(real)
        if self._reads_in_place(call):
            out = merge_parts(self._step_parts(call, *buffers, exact))[0].to(values.dtype)
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
        real = self.locate_tokens(call, keys.shape[2])
        if self.form_depends_on_age:
            self.end_index = index_behind_last(real, self.seen, self.end_index)
        self._take_in(self._in_codec_order(keys), self._in_codec_order(values), real)

    def earliest_crop(self) -> int:
        """The fewest tokens seen to which `crop` goes back: all tokens are held."""
        return 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens in place; see `StoringLayer.crop`.

        Raises:
            LowkeyError: if tokens that were evicted or compressed since would have to come back.
        """
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
            for name, packing in self.packing.items():
                parts = self.packed_tensors(name)
                # a packing counts its axis in tokens or in blocks of them
                units = [p.shape[packing.axis] * kept // stored if stored else 0 for p in parts]
                self._set_packed(
                    name,
                    tuple(p.narrow(packing.axis, 0, n).clone() for p, n in zip(parts, units, strict=True)),
                )
            gone = before - left if kept == stored else window
            self.recent_k, self.recent_v = (
                x[:, :, : window - gone].clone() for x in (self.recent_k, self.recent_v)
            )
        lost = (self.sink_index >= left)[:, None, :, None]
        self.sink_k, self.sink_v = (x.masked_fill(lost, 0) for x in (self.sink_k, self.sink_v))
        self.sink_index = self.sink_index.masked_fill(lost[:, 0, :, 0], EMPTY)

    def select_sequences(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Keep some sequences of the batch; see `StoringLayer.select_sequences`."""
        super().select_sequences(choose)
        if self.is_initialized:  # flush blocks held back for sequences that were removed
            self._store(self.recent_k, self.recent_v)

    def _in_codec_order(self, x: Tensor) -> Tensor:
        """Heads (b, h, ...) in the order in which the codec groups them."""
        return x if self.codec.order is None else x[:, self.codec.order]

    def _in_model_order(self, x: Tensor) -> Tensor:
        """The inverse of `_in_codec_order`."""
        return x if self.codec.order is None else x[:, self.codec.order.argsort()]

    # -- which tokens are stored

    def check_mask(self, call: Call, start: int, real: Tensor, first: Tensor) -> None:
        """Refuse padding between a sequence's tokens, and masks that show padding that is in no block.

        The window and the blocks count a sequence's tokens from its first real one on. A sequence may
        therefore end in padding, but not go on behind it.

        Raises:
            LowkeyError: for such masks.
        """
        if not self.form_depends_on_age:
            return
        tokens = torch.arange(self.seen, device=first.device)
        # a sequence goes on right behind its last real token, or begins with this chunk
        follows = (self.end_index == start) | (first >= start)
        end = index_behind_last(real, self.seen, self.end_index)
        within = (tokens[start:] >= first) & (tokens[start:] < end)
        if bool((real.any(1, keepdim=True) & ~follows).any()) or bool((real != within).any()):
            raise LowkeyError(
                "attention_mask: a row goes on behind padding, which a recent window or blocks of tokens "
                "(kivi) would count; pad on the left, or give rows of uneven turns a cache each: "
                "cache.branch(row)"
            )
        if self.block == 1 or not start:
            return
        padding = tokens[:start] < first
        shown = padding if call.mask is None else padding & call.mask[:, :, :start].any(1)
        if bool(shown.any()):
            raise LowkeyError(
                "attention_mask: shows tokens that were padding when they came; repeat the earlier mask"
            )

    def _first_slot_index(self) -> Tensor:
        """(b|1, 1): the index from which each sequence's tokens are stored; *slots* are counted from there.

        It is `front_start` or lies behind it. With blocks, it is the first index from there that lets a block
        begin at the sequence's first real token. Before that token is known, it is the largest that it may
        become, so that nothing is stored too early.
        """
        if self.block == 1:
            return self.first_index.new_full((1, 1), self.front_start)
        behind = (self.first_index - self.front_start).clamp_min(0) % self.block
        return self.front_start + torch.where(self.first_index < self.seen, behind, self.block - 1)

    def _slots_left(self, seen: Tensor) -> Tensor:
        """(b|1, n): how many slots of each sequence had left the window when `seen` (n) tokens were seen.

        Whole blocks only.
        """
        until = seen.clamp_max(self._stored_until()) - self.exact.recent
        return (until - self._first_slot_index()).clamp_min(0) // self.block * self.block

    def storable(self) -> tuple[int, int]:
        """(slots that every sequence has ready to be stored, slots that at least one has: a block more)."""
        if self.block == 1:
            return (max(0, self._stored_until() - self.front_start - self.exact.recent),) * 2
        left = self._slots_left(self.first_index.new_tensor([self.seen]))
        return int(left.min()), int(left.max())

    def _stored_until(self) -> int:
        """The index behind the last token that is to be stored: tokens that only score are not."""
        return self.seen - self.transient_tokens

    def _indices_of_slots(self, start: int, stop: int) -> Tensor:
        """(b|1, stop - start): the indices of the tokens in these slots of each sequence."""
        return torch.arange(start, stop, device=self.first_index.device) + self._first_slot_index()

    def _positions_of_slots(self, start: int, stop: int) -> Tensor:
        """(b, stop - start): the positions of the tokens in these slots."""
        return self._indices_of_slots(start, stop) - self.offset

    # -- writing

    def _store(self, buffer_k: Tensor, buffer_v: Tensor) -> None:
        """Store the tokens that leave the window.

        Args:
            buffer_k: (b, h, n, d), all tokens that are held exactly, up to the newest.
            buffer_v: the same.
        """
        start, (stop, _) = self.seen - self.front_start - buffer_k.shape[2], self.storable()
        if stop > start:
            new = self._packed(buffer_k, buffer_v, start, stop)
            for name, tensors in self._with_stored(new).items():
                self._set_packed(name, tensors)
        # clones, so that no view keeps the larger buffer alive
        self.recent_k = buffer_k[:, :, stop - start :].clone()
        self.recent_v = buffer_v[:, :, stop - start :].clone()

    def _packed(self, buffer_k: Tensor, buffer_v: Tensor, start: int, stop: int) -> PackedTensors:
        """Encode and pack the tokens of the slots from `start` to `stop`, all of which are in the buffers."""
        indices = self._indices_of_slots(start, stop)
        in_buffer = indices - (self.seen - buffer_k.shape[2])
        encoded = self.codec.encode(
            take_tokens(buffer_k, in_buffer), take_tokens(buffer_v, in_buffer), indices - self.offset
        )
        return {
            name: packing.pack(x) for (name, packing), x in zip(self.packing.items(), encoded, strict=True)
        }

    def _with_stored(self, new: PackedTensors) -> PackedTensors:
        """The stored tokens with these behind them."""
        return {
            name: joined_parts(self.packed_tensors(name), new[name], packing.axis)
            for name, packing in self.packing.items()
        }

    def packed_attributes(self, name: str) -> list[str]:
        """The attributes that hold what the packing of `keys` or `values` stores."""
        return [f"{name}_{field}" if field else name for field in self.packing[name].fields]

    def packed_tensors(self, name: str) -> tuple[Tensor, ...]:
        """What the packing of `keys` or `values` stores."""
        return tuple(getattr(self, attribute) for attribute in self.packed_attributes(name))

    def _set_packed(self, name: str, tensors: tuple[Tensor, ...]) -> None:
        for attribute, tensor in zip(self.packed_attributes(name), tensors, strict=True):
            setattr(self, attribute, tensor)

    def _find_sinks(self, values: Tensor, real: Tensor) -> None:
        """Give new tokens the free sink slots, in their order.

        Args:
            values: (b, h, t, d), by which sinks are recognised if there are sink points.
            real: (b, t), which of the new tokens are real.
        """
        start = self.seen - values.shape[2]
        index = torch.arange(start, self.seen, device=real.device)
        candidates = real & (index < self._stored_until())
        if self.sink_points is not None:
            candidates = candidates & self.sink_points.match(values)
        # the n-th candidate of a sequence gets the n-th free slot; past the last slot it gets none
        slot = (self.sink_index < EMPTY).sum(1, keepdim=True) + candidates.cumsum(1) - 1
        slots = torch.arange(self.exact.sinks, device=slot.device).unsqueeze(1)
        takes = candidates.unsqueeze(1) & (slot.unsqueeze(1) == slots)  # (b, sinks, t)
        self.sink_index = torch.where(takes.any(2), start + takes.int().argmax(2), self.sink_index).int()

    def _store_sinks(self, keys: Tensor, values: Tensor) -> None:
        """Copy the new tokens (b, h, t, d) that are sinks into their slots."""
        if not self.exact.sinks:
            return
        start = self.seen - keys.shape[2]
        in_chunk = self.sink_index.long() - start
        # slots of older sinks, and empty ones, have an index outside the chunk and stay as they are
        arrives = ((in_chunk >= 0) & (in_chunk < keys.shape[2]))[:, None, :, None]
        self.sink_k = torch.where(arrives, take_tokens(keys, in_chunk), self.sink_k)
        self.sink_v = torch.where(arrives, take_tokens(values, in_chunk), self.sink_v)

    # -- reading

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
        at = self.positions_of(self.seen - t, self.seen)
        parts: list[Part] = []
        if count:
            keys, values = (
                stored_densely(packing, self.packed_tensors(name), self.shapes[name][1])
                for name, packing in self.packing.items()
            )
            rows = len(self.offset) * call.query.shape[1] // self.codec.heads_per_row
            part = attend_to_stored(
                self.codec,
                call.query,
                at,
                keys,
                values,
                torch.full((rows,), count, device=self.device),
                self._positions_of_slots,
                call.scaling,
                call.softcap,
                None if mask is None else mask[..., :count],
            )
            parts.append(part)
        if ahead > count:
            # tokens that wait for other sequences: at most one block, seen as they will be stored
            waiting = self._packed(buffer_k, buffer_v, count, ahead)
            k, v = (p.unpack(waiting[name], self.shapes[name][1]) for name, p in self.packing.items())
            segment = self.codec.segment(call.query, k, v, self._positions_of_slots(count, ahead), at)
            segments.insert(0, replace(segment, mask=None if mask is None else mask[..., count:]))
        if segments:
            parts.append(grouped.partial(segments, call.scaling, call.softcap))
        return parts

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
