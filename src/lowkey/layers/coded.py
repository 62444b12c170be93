"""Every token in the form that a codec gives it, plain or low rank, in full precision or in packed integers; with optional exact tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lowkey.backends import grouped
from lowkey.backends.segment import Segment
from lowkey.layers.codec import Codec
from lowkey.layers.packing import Packing, Whole
from lowkey.layers.placed import PlacedLayer
from lowkey.seam import Call


@dataclass(frozen=True)
class Exact:
    """Tokens stored as they are: the first `sinks` of each row (padding not counted) and the last `recent`.

    prefill: what a chunk of several tokens sees of itself: `compressed` what will be stored (compression everywhere),
    `exact` its own exact keys, which are compressed afterwards (decode-only compression).
    """

    sinks: int = 0
    recent: int = 0
    prefill: Literal["compressed", "exact"] = "compressed"


class CodedLayer(PlacedLayer):
    """Stored forms of all tokens but the last `recent` (or up to a block more, where keys are packed in blocks of tokens); sinks are
    held once more, exactly.

    Held: what the packings of keys and values hold; recent_k, recent_v (b, h, recent, d);
    sink_k, sink_v (b, h, sinks, d); offset (b, 1), each row's token index less its position; first (b, 1), the index of each
    row's first real token.
    """

    def __init__(self, codec: Codec, exact: Exact | None = None, packing: tuple[Packing, Packing] | None = None) -> None:
        super().__init__(exact is not None and exact.prefill == "exact")
        self.codec, self.exact = codec, exact or Exact()
        self.packing = dict(zip(("keys", "values"), packing or (Whole(), Whole()), strict=True))
        self.block = max(p.block for p in self.packing.values())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        b, h, _, d = key_states.shape
        self.device, n = key_states.device, self.exact.sinks
        self.codec = self.codec.like(key_states)
        self.recent_k, self.recent_v = key_states.new_empty(b, h, 0, d), value_states.new_empty(b, h, 0, d)
        self.sink_k, self.sink_v = key_states.new_zeros(b, h, n, d), value_states.new_zeros(b, h, n, d)
        self.offset = torch.zeros(b, 1, dtype=torch.long, device=self.device)
        self.first = torch.zeros_like(self.offset)
        none = self.codec.encode(self._grouped(self.recent_k), self._grouped(self.recent_v), self.positions(0, 0))
        self.shapes = {name: (x.shape[1], x.shape[3]) for name, x in zip(self.packing, none, strict=True)}
        for name, x in zip(self.packing, none, strict=True):
            self._put(name, self.packing[name].pack(x))
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        stored = [attribute for name in self.packing for attribute in self._attributes(name)]
        names = (*stored, "recent_k", "recent_v", "sink_k", "sink_v", "offset", "first")
        return {name: getattr(self, name) for name in names} if self.is_initialized else {}

    def predicted_nbytes(self) -> int:
        if not self.is_initialized:
            return 0
        b, h, _, d = self.recent_k.shape
        size, stored = self.recent_k.element_size(), self._leaving(self.seen)
        near = (self.seen - stored + self.exact.sinks) * 2 * d * h * size
        kept = sum(heads * self.packing[name].nbytes(stored, width, size) for name, (heads, width) in self.shapes.items())
        return b * (kept + near + 2 * self.offset.element_size())

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        self._place(call, keys.shape[2])
        keys, values = self._grouped(keys), self._grouped(values)
        call = replace(call, query=self._grouped(call.query))
        buffer_k, buffer_v = torch.cat([self.recent_k, keys], 2), torch.cat([self.recent_v, values], 2)
        self._write(buffer_k, buffer_v)
        self._write_sinks(keys, values)
        return self._ungrouped(grouped.attend(self._segments(call, buffer_k, buffer_v), call.scaling, call.softcap))

    def _grouped(self, x: Tensor) -> Tensor:
        """Heads in the codec's order."""
        return x if self.codec.order is None else x[:, self.codec.order]

    def _ungrouped(self, x: Tensor) -> Tensor:
        return x if self.codec.order is None else x[:, self.codec.order.argsort()]

    # -- writing

    def _place(self, call: Call, t: int) -> None:
        visible = self.place(call, t)
        self.first = torch.where(visible.any(1, keepdim=True), visible.int().argmax(1, keepdim=True), self.seen)

    def _leaving(self, seen: int) -> int:
        """How many tokens have left the recent window when so many were seen: whole blocks."""
        return max(0, seen - self.exact.recent) // self.block * self.block

    def _write(self, buffer_k: Tensor, buffer_v: Tensor) -> None:
        """Compress what leaves the recent window; clones, so that no view keeps a larger buffer alive."""
        start = self.seen - buffer_k.shape[2]
        leaving = self._leaving(self.seen) - start
        if leaving:
            new = self.codec.encode(buffer_k[:, :, :leaving], buffer_v[:, :, :leaving], self.positions(start, start + leaving))
            for name, x in zip(self.packing, new, strict=True):
                packing = self.packing[name]
                self._put(name, packing.joined(self._parts(name), packing.pack(x)))
        self.recent_k, self.recent_v = buffer_k[:, :, leaving:].clone(), buffer_v[:, :, leaving:].clone()

    def _attributes(self, name: str) -> list[str]:
        return [f"{name}_{field}" if field else name for field in self.packing[name].fields]

    def _parts(self, name: str) -> tuple[Tensor, ...]:
        return tuple(getattr(self, attribute) for attribute in self._attributes(name))

    def _put(self, name: str, parts: tuple[Tensor, ...]) -> None:
        for attribute, part in zip(self._attributes(name), parts, strict=True):
            setattr(self, attribute, part)

    def _write_sinks(self, keys: Tensor, values: Tensor) -> None:
        """Slot p of a row is its p-th real token, whenever that arrives."""
        if not self.exact.sinks:
            return
        start = self.seen - keys.shape[2]
        index = self._sink_index() - start  # (b, n) into the new tokens
        arrives = ((index >= 0) & (index < keys.shape[2]))[:, None, :, None]
        at = index.clamp(0, keys.shape[2] - 1)[:, None, :, None].expand_as(self.sink_k)
        self.sink_k = torch.where(arrives, keys.gather(2, at), self.sink_k)
        self.sink_v = torch.where(arrives, values.gather(2, at), self.sink_v)

    def _sink_index(self) -> Tensor:
        """(b, sinks): each row's first real tokens."""
        return self.first + torch.arange(self.exact.sinks, device=self.offset.device)

    # -- reading

    def _segments(self, call: Call, buffer_k: Tensor, buffer_v: Tensor) -> list[Segment]:
        mask, stored = call.full_mask(self.seen), self._leaving(self.seen)
        segment = self._stored(call, stored)
        if not self.exact.sinks and not self.exact.recent and self.block == 1 and not self._exact_chunk(call):
            return [replace(segment, mask=mask)]
        mask = mask if mask is not None else self.offset.new_ones(1, 1, self.seen, dtype=torch.bool)
        near = self._near(call)
        covered = near | self._is_sink()
        segments = [replace(segment, mask=mask[..., :stored] & ~covered[..., :stored])]
        start = self.seen - buffer_k.shape[2]
        segments += [Segment(call.query, buffer_k, buffer_v, (mask & near)[..., start:])]
        return segments + self._sinks(call, mask & ~near)

    def _stored(self, call: Call, stored: int) -> Segment:
        keys, values = (self.packing[name].unpack(self._parts(name), self.shapes[name][1]) for name in self.packing)
        return self.codec.segment(call.query, keys, values, self.positions(0, stored))

    def _exact_chunk(self, call: Call) -> bool:
        return self.exact_prefill and call.query.shape[3] > 1

    def _near(self, call: Call) -> Tensor:
        """(1, t, s): which tokens each query sees exactly, being within its recent window (or its own chunk)."""
        t, device = call.query.shape[3], self.offset.device
        seen = torch.arange(self.seen - t + 1, self.seen + 1, device=device).unsqueeze(1)  # by each query, itself included
        tokens = torch.arange(self.seen, device=device)
        near = tokens >= (seen - self.exact.recent).clamp_min(0) // self.block * self.block
        return (near | (tokens >= self.seen - t) if self._exact_chunk(call) else near).unsqueeze(0)

    def _is_sink(self) -> Tensor:
        """(b, 1, s)"""
        after = torch.arange(self.seen, device=self.first.device) - self.first
        return ((after >= 0) & (after < self.exact.sinks)).unsqueeze(1)

    def _sinks(self, call: Call, mask: Tensor) -> list[Segment]:
        if not self.exact.sinks:
            return []
        index = self._sink_index()
        b, t = max(mask.shape[0], index.shape[0]), mask.shape[1]
        at = index.clamp(max=self.seen - 1).unsqueeze(1).expand(b, t, -1)
        allowed = mask.expand(b, t, -1).gather(2, at) & (index < self.seen).unsqueeze(1)
        return [Segment(call.query, self.sink_k, self.sink_v, allowed)]
