"""Which tokens a layer holds in which form, and how they get there.

A token arrives in the *recent window*, where it is held exactly. When `exact.recent` newer tokens have come,
it is encoded and packed with the other stored tokens. If it is a sink, an exact copy is held besides. Keys
that are packed in blocks of tokens (KIVI) are stored one whole block at a time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lowkey.core.types import LowkeyError
from lowkey.models.attention_interface import Call
from lowkey.storage.codec import Codec, Plain
from lowkey.storage.exact import Exact, SinkPoints
from lowkey.storage.packing import Packing, Unpacked, joined_parts
from lowkey.storage.positioned import index_behind_last, take_tokens
from lowkey.storage.step_counts import NEVER, Sequences, copied
from lowkey.storage.stepping import SteppingLayer

PackedTensors = dict[str, tuple[Tensor, ...]]
"""The tensors that a packing holds, of `keys` and of `values`."""
EMPTY = 2**31 - 1  # the index in a sink slot that no token has taken
MOST_RUNS = 8  # of stored tokens between sinks that a plain step reads; each is a segment of the kernel


class StoredTokens(SteppingLayer):
    """Holds all tokens but the recent ones in a codec's form; `CodedLayer` says what queries see of them.

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
        self.encodes_at_once = not self.is_lossless and self.exact.recent == 0 and self.block == 1
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
        size, (stored, held_exactly) = self.recent_k.element_size(), self._slots_held()
        exact = (held_exactly + self.exact.sinks) * 2 * d * h * size
        packed = sum(
            heads * self.packing[name].nbytes(stored, width, size)
            for name, (heads, width) in self.shapes.items()
        )
        row_indices = (3 if self.form_depends_on_age else 2) * self.offset.element_size()
        indices = row_indices + self.exact.sinks * self.sink_index.element_size()
        return b * (packed + exact + indices) + self.prepared_bytes()

    def _in_codec_order(self, x: Tensor) -> Tensor:
        """Heads (b, h, ...) in the order in which the codec groups them."""
        return x if self.codec.order is None else x[:, self.codec.order]

    def _in_model_order(self, x: Tensor) -> Tensor:
        """The inverse of `_in_codec_order`."""
        return x if self.codec.order is None else x[:, self.codec.inverse_order]

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

    def _packed(
        self, buffer_k: Tensor, buffer_v: Tensor, start: int, stop: int, seen: int | None = None
    ) -> PackedTensors:
        """Encode and pack the tokens of the slots from `start` to `stop`, all of which are in the buffers.

        The buffers end with the newest token, when `seen` tokens had been seen; None for now.
        """
        indices = self._indices_of_slots(start, stop)
        in_buffer = indices - ((self.seen if seen is None else seen) - buffer_k.shape[2])
        encoded = self.codec.encode(
            take_tokens(buffer_k, in_buffer), take_tokens(buffer_v, in_buffer), indices - self.offset
        )
        return {
            name: packing.pack(x) for (name, packing), x in zip(self.packing.items(), encoded, strict=True)
        }

    def _slots_held(self) -> tuple[int, int]:
        """(dense slots that are stored, tokens of the window), free ones of a room included."""
        if (room := self.room) is not None:
            return room.stored + room.ahead, room.window + (0 if self.encodes_at_once else room.steps)
        stored, _ = self.storable()
        return stored, self.seen - self.front_start - stored

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

    # -- plain steps

    def _takes_plain_steps(self) -> bool:
        readable = all(packing.bits is not None for packing in self.packing.values())
        return readable and not self.transient_tokens

    def _looked_at(self) -> Sequences | None:
        first, offset, before = copied(self.first_index)[:, 0], copied(self.offset)[:, 0], self.seen - 1
        if (first >= before).any():
            return None  # a sequence has not begun
        if self.form_depends_on_age and (copied(self.end_index) != before).any():
            return None  # a sequence has ended in padding
        sinks = np.sort(copied(self.sink_index).astype(np.int64), 1)
        slot = self.front_start + np.maximum(first - self.front_start, 0) % self.block
        if self.encodes_at_once and (sinks == EMPTY).any():
            return None  # a token that comes may be a sink
        own = Sequences(first, offset, slot, np.where(sinks < EMPTY, sinks, NEVER))
        return own if len(own.runs()[0]) <= MOST_RUNS else None

    def _ready(self, sequences: Sequences, seen: int) -> np.ndarray:
        return np.maximum(seen - self.exact.recent - sequences.slot, 0) // self.block * self.block

    def _store_ahead(self, count: int, ahead: int) -> None:
        new = self._packed(self.recent_k, self.recent_v, count, count + ahead, self.seen - 1)
        for name, tensors in self._with_stored(new).items():
            self._set_packed(name, tensors)

    def _reserve(self, count: int) -> None:
        for name, packing in self.packing.items():
            longer = []
            for part in self.packed_tensors(name):
                shape = list(part.shape)
                shape[packing.axis] = count
                longer.append(torch.cat([part, part.new_zeros(shape)], packing.axis))
            self._set_packed(name, tuple(longer))

    def _store_at(self, slot: int, keys: Tensor, values: Tensor, at: Tensor) -> None:
        encoded = self.codec.encode(keys, values, at, self._turn_of_step(keys))
        for (name, packing), x in zip(self.packing.items(), encoded, strict=True):
            for held, part in zip(self.packed_tensors(name), packing.pack(x), strict=True):
                held.narrow(packing.axis, slot, 1).copy_(part)

    def _keep_stored(self, count: int, held: int) -> None:
        for name, packing in self.packing.items():
            parts, axis = self.packed_tensors(name), packing.axis
            # a packing counts its axis in tokens or in blocks of them
            units = [p.shape[axis] * count // held if held else 0 for p in parts]
            kept = tuple(p.narrow(axis, 0, n).clone() for p, n in zip(parts, units, strict=True))
            self._set_packed(name, kept)

    def _note_steps(self, keys: Tensor, values: Tensor, may_be_sinks: bool) -> None:
        if self.form_depends_on_age:
            self.end_index = torch.full_like(self.end_index, self.seen)
        if may_be_sinks:
            # they are in the window still, where it does not matter whether a token is a sink
            real = torch.ones(len(keys), keys.shape[2], dtype=torch.bool, device=self.device)
            self._find_sinks(self._in_model_order(values), real)
            self._store_sinks(keys, values)
