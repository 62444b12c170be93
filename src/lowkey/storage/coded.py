"""Every token in the form that a codec gives it, plain or low rank, in full precision or in packed integers;
with optional exact tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lowkey.backends import fused, grouped
from lowkey.backends.segment import Segment
from lowkey.core.types import LowkeyError
from lowkey.models.attention_interface import Call
from lowkey.storage.codec import Codec, Plain
from lowkey.storage.exact import Exact, SinkPoints
from lowkey.storage.packing import Packing, Unpacked, joined_parts
from lowkey.storage.positioned import PositionedLayer

Parts = dict[str, tuple[Tensor, ...]]
EMPTY = 2**31 - 1  # the index of a sink slot that no token has taken


class CodedLayer(PositionedLayer):
    """Stored forms of all tokens but the last `recent` (and up to a block more, where keys are packed in
    blocks of tokens); sinks are held once more, exactly.

    Blocks begin at each row's first real token, so that padding changes no scale and nothing that a query
    sees. Only what all rows have ready is stored: when rows differ in length, some hold up to one block more
    as it was, and show it as it will be.

    Held: what the packings of keys and values hold; recent_k, recent_v (b, h, recent, d); sink_k, sink_v (b,
    h, sinks, d); sink_index (b, sinks), the index of the token in each slot; offset and first, as in any
    `PositionedLayer`; with `counts`, also ended (b, 1), the index behind each row's last real token, 0 while
    there is none. points: they say what a sink is; without them a row's first real tokens are its sinks.
    counts: whether the numbers that a query sees depend on how many tokens came since.
    """

    def __init__(
        self,
        codec: Codec,
        exact: Exact | None = None,
        packing: tuple[Packing, Packing] | None = None,
        points: SinkPoints | None = None,
    ) -> None:
        super().__init__(exact is not None and exact.prefill == "exact")
        self.codec, self.exact, self.sink_points = codec, exact or Exact(), points
        self.packing = dict(zip(("keys", "values"), packing or (Unpacked(), Unpacked()), strict=True))
        self.block = max(p.block for p in self.packing.values())
        # recent or stored, it is the token as it came
        same = (self.codec, *self.packing.values()) == (Plain(), Unpacked(), Unpacked())
        self.form_depends_on_age = self.block > 1 or (self.exact.recent > 0 and not same)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        b, h, _, d = key_states.shape
        self.device, n = key_states.device, self.exact.sinks
        self.codec, self.sink_points = (
            self.codec.to_match(key_states),
            self.sink_points and self.sink_points.to(self.device),
        )
        self.recent_k, self.recent_v = key_states.new_empty(b, h, 0, d), value_states.new_empty(b, h, 0, d)
        self.sink_k, self.sink_v = key_states.new_zeros(b, h, n, d), value_states.new_zeros(b, h, n, d)
        self.sink_index = torch.full((b, n), EMPTY, dtype=torch.int32, device=self.device)
        self.reset_rows(b)
        if self.form_depends_on_age:
            self.end_index = torch.zeros_like(self.first_index)
        none = self.codec.encode(
            self._grouped(self.recent_k), self._grouped(self.recent_v), self.positions_of(0, 0)
        )
        self.shapes = {name: (x.shape[1], x.shape[3]) for name, x in zip(self.packing, none, strict=True)}
        for name, x in zip(self.packing, none, strict=True):
            self._put(name, self.packing[name].pack(x))
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        stored = [attribute for name in self.packing for attribute in self._attributes(name)]
        names = (
            *stored,
            "recent_k",
            "recent_v",
            "sink_k",
            "sink_v",
            "sink_index",
            "offset",
            "first_index",
            *(("end_index",) if self.form_depends_on_age else ()),
        )
        return {name: getattr(self, name) for name in names} if self.is_initialized else {}

    def growing_dims(self) -> dict[str, int]:
        packed = self.packing.items() if self.is_initialized else ()
        return {attribute: packing.axis for name, packing in packed for attribute in self._attributes(name)}

    def predicted_nbytes(self) -> int:
        if not self.is_initialized:
            return 0
        b, h, _, d = self.recent_k.shape
        size, (stored, _) = self.recent_k.element_size(), self._ready()
        near = (self.seen - stored + self.exact.sinks) * 2 * d * h * size
        kept = sum(
            heads * self.packing[name].nbytes(stored, width, size)
            for name, (heads, width) in self.shapes.items()
        )
        indices = (
            3 if self.form_depends_on_age else 2
        ) * self.offset.element_size() + self.exact.sinks * self.sink_index.element_size()
        return b * (kept + near + indices)

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        real = self.locate_tokens(call, keys.shape[2])
        if self.form_depends_on_age:
            self.end_index = _ended(real, self.seen, self.end_index)
        self._find_sinks(values, real)
        keys, values = self._grouped(keys), self._grouped(values)
        call = replace(call, query=self._grouped(call.query))
        buffer_k, buffer_v = torch.cat([self.recent_k, keys], 2), torch.cat([self.recent_v, values], 2)
        self._write(buffer_k, buffer_v)
        self._write_sinks(keys, values)
        segments = self._segments(call, buffer_k, buffer_v, self.exact_rows(real))
        return self._ungrouped(grouped.attend(segments, call.scaling, call.softcap))

    def select_sequences(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().select_sequences(choose)
        if self.is_initialized:  # the row that the others waited for may be gone
            self._write(self.recent_k, self.recent_v)

    def _grouped(self, x: Tensor) -> Tensor:
        """Heads in the codec's order."""
        return x if self.codec.order is None else x[:, self.codec.order]

    def _ungrouped(self, x: Tensor) -> Tensor:
        return x if self.codec.order is None else x[:, self.codec.order.argsort()]

    # -- which tokens are stored

    def check_mask(self, call: Call, start: int, real: Tensor, first: Tensor) -> None:
        """The recent window and the blocks count a row's tokens from its first real one on, so that a row may
        end in padding but not go on behind it; some of what comes before it is in no block."""
        if not self.form_depends_on_age:
            return
        tokens = torch.arange(self.seen, device=first.device)
        # nothing lies between a row's tokens and the new ones
        follows = (self.end_index == start) | (first >= start)
        within = (tokens[start:] >= first) & (tokens[start:] < _ended(real, self.seen, self.end_index))
        if bool((real.any(1, keepdim=True) & ~follows).any()) or bool((real != within).any()):
            raise LowkeyError(
                "attention_mask: a row goes on behind padding, which a recent window or blocks of tokens "
                "(kivi) would count; pad on the "
                "left, or give rows of uneven turns a cache each"
            )
        hidden = tokens[:start] < first
        if (
            self.block > 1
            and start
            and bool((hidden if call.mask is None else hidden & call.mask[:, :, :start].any(1)).any())
        ):
            raise LowkeyError(
                "attention_mask: shows tokens that were padding when they came; repeat the earlier mask"
            )

    def _shift(self) -> Tensor:
        """(b|1, 1): at which index each row begins to be cut into blocks; before its first real token, the
        last that it may be.
        """
        if self.block == 1:
            return self.first_index.new_zeros(1, 1)
        return torch.where(self.first_index < self.seen, self.first_index % self.block, self.block - 1)

    def _left(self, seen: Tensor) -> Tensor:
        """(b|1, n): how many tokens of each row, from its shift on, have left the recent window when `seen`
        (n) were seen: whole blocks.
        """
        return (seen - self._shift() - self.exact.recent).clamp_min(0) // self.block * self.block

    def _ready(self) -> tuple[int, int]:
        """What all rows have ready to be stored, and what the first of them has: at most a block more."""
        if self.block == 1:
            return (max(0, self.seen - self.exact.recent),) * 2
        left = self._left(self.first_index.new_tensor([self.seen]))
        return int(left.min()), int(left.max())

    def _slots(self, start: int, stop: int) -> Tensor:
        """(b|1, n): the indices of the tokens start to stop of each row, counted from its shift, as they are
        stored.
        """
        return torch.arange(start, stop, device=self.first_index.device) + self._shift()

    # -- writing

    def _write(self, buffer_k: Tensor, buffer_v: Tensor) -> None:
        """Compress what leaves the recent window; clones, so that no view keeps a larger buffer alive."""
        start, (stop, _) = self.seen - buffer_k.shape[2], self._ready()
        if stop > start:
            for name, parts in self._joined(self._packed(buffer_k, buffer_v, start, stop)).items():
                self._put(name, parts)
        self.recent_k, self.recent_v = (
            buffer_k[:, :, stop - start :].clone(),
            buffer_v[:, :, stop - start :].clone(),
        )

    def _packed(self, buffer_k: Tensor, buffer_v: Tensor, start: int, stop: int) -> Parts:
        slots = self._slots(start, stop)
        at = slots - (self.seen - buffer_k.shape[2])
        encoded = self.codec.encode(_taken(buffer_k, at), _taken(buffer_v, at), slots - self.offset)
        return {
            name: packing.pack(x) for (name, packing), x in zip(self.packing.items(), encoded, strict=True)
        }

    def _joined(self, new: Parts) -> Parts:
        return {
            name: joined_parts(self._parts(name), new[name], packing.axis)
            for name, packing in self.packing.items()
        }

    def _attributes(self, name: str) -> list[str]:
        return [f"{name}_{field}" if field else name for field in self.packing[name].fields]

    def _parts(self, name: str) -> tuple[Tensor, ...]:
        return tuple(getattr(self, attribute) for attribute in self._attributes(name))

    def _put(self, name: str, parts: tuple[Tensor, ...]) -> None:
        for attribute, part in zip(self._attributes(name), parts, strict=True):
            setattr(self, attribute, part)

    def _find_sinks(self, values: Tensor, real: Tensor) -> None:
        """Tokens take the free slots in their order: those that lie near the points, where there are some; of
        the others, all.

        real (b, t): which of the new tokens are no padding."""
        if not self.exact.sinks:
            return
        start = self.seen - values.shape[2]
        found = real if self.sink_points is None else real & self.sink_points.match(values)
        slot = (self.sink_index < EMPTY).sum(1, keepdim=True) + found.cumsum(1) - 1
        takes = found.unsqueeze(1) & (
            slot.unsqueeze(1) == torch.arange(self.exact.sinks, device=slot.device).unsqueeze(1)
        )
        self.sink_index = torch.where(takes.any(2), start + takes.int().argmax(2), self.sink_index).int()

    def _write_sinks(self, keys: Tensor, values: Tensor) -> None:
        """Each slot is filled when its token arrives."""
        if not self.exact.sinks:
            return
        start = self.seen - keys.shape[2]
        index = self.sink_index.long() - start  # (b, n) into the new tokens
        arrives = ((index >= 0) & (index < keys.shape[2]))[:, None, :, None]
        self.sink_k = torch.where(arrives, _taken(keys, index), self.sink_k)
        self.sink_v = torch.where(arrives, _taken(values, index), self.sink_v)

    # -- reading

    def _segments(self, call: Call, buffer_k: Tensor, buffer_v: Tensor, exact: Tensor) -> list[Segment]:
        """exact (b): which rows see this chunk exactly."""
        mask, alone = call.full_mask(self.seen), self._alone(exact)
        stored = self._stored(
            call, buffer_k, buffer_v, expand=not alone and call.query.shape[3] >= fused.QUERIES
        )
        if alone:
            return [replace(stored, mask=mask)]
        mask = mask if mask is not None else self.offset.new_ones(1, 1, self.seen, dtype=torch.bool)
        near, index = self._near(call, exact), self.sink_index.long()
        far = mask & ~near
        is_sink = (index.unsqueeze(2) == torch.arange(self.seen, device=index.device)).any(1, keepdim=True)
        start = self.seen - buffer_k.shape[2]
        return [
            replace(stored, mask=self._in_slots(far & ~is_sink, stored.keys.shape[2])),
            Segment(call.query, buffer_k, buffer_v, (mask & near)[..., start:]),
            *(
                [Segment(call.query, self.sink_k, self.sink_v, self._at(far, index))]
                if self.exact.sinks
                else []
            ),
        ]

    def _alone(self, exact: Tensor) -> bool:
        return (
            not self.exact.sinks
            and not self.exact.recent
            and self.block == 1
            and not (self.exact_prefill and bool(exact.any()))
        )

    def _stored(self, call: Call, buffer_k: Tensor, buffer_v: Tensor, expand: bool) -> Segment:
        stored, ahead = self._ready()
        parts = {name: self._parts(name) for name in self.packing}
        if ahead > stored:
            parts = self._joined(self._packed(buffer_k, buffer_v, stored, ahead))
        keys, values = (
            packing.unpack(parts[name], self.shapes[name][1]) for name, packing in self.packing.items()
        )
        at = self.positions_of(self.seen - call.query.shape[3], self.seen)
        return self.codec.segment(call.query, keys, values, self._slots(0, ahead) - self.offset, at, expand)

    def _near(self, call: Call, exact: Tensor) -> Tensor:
        """(b|1, t, s): which tokens each query sees exactly, being within its recent window (or its own
        chunk).
        """
        t, device = call.query.shape[3], self.offset.device
        # each query has seen itself, too
        left = self._left(torch.arange(self.seen - t + 1, self.seen + 1, device=device))
        tokens = torch.arange(self.seen, device=device)
        near = (tokens - self._shift()).unsqueeze(1) >= left.unsqueeze(2)
        return near | ((tokens >= self.seen - t) & exact[:, None, None]) if self.exact_prefill else near

    def _in_slots(self, mask: Tensor, stop: int) -> Tensor:
        return mask[..., :stop] if self.block == 1 else self._at(mask, self._slots(0, stop))

    def _at(self, mask: Tensor, index: Tensor) -> Tensor:
        """The mask (b|1, t, s) at indices (b|1, n); tokens that did not come yet are not seen."""
        b, t = max(len(mask), len(index)), mask.shape[1]
        at = index.clamp(max=self.seen - 1).unsqueeze(1).expand(b, t, -1)
        return mask.expand(b, -1, -1).gather(2, at) & (index < self.seen).unsqueeze(1)


def _ended(real: Tensor, seen: int, before: Tensor) -> Tensor:
    """(b, 1): the index behind each row's last real token, given which of the newest are real (b, t) and what
    it was before them.
    """
    last = seen - real.flip(1).int().argmax(1, keepdim=True)
    return torch.where(real.any(1, keepdim=True), last, before)


def _taken(x: Tensor, at: Tensor) -> Tensor:
    """Tokens (b, h, n, d) of x (b, h, s, d) at indices (b|1, n); any of them where the index is none of x's."""
    b, h, s, d = x.shape
    return x.gather(2, at.clamp(0, s - 1)[:, None, :, None].expand(b, h, -1, d))
