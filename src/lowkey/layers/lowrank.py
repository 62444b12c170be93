"""Keys in rank r_K and values in rank r_V, with optional exact sink tokens and an exact recent window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowkey.backends import grouped
from lowkey.backends.segment import Segment
from lowkey.families import Rope
from lowkey.layers.codec import LowRank
from lowkey.layers.placed import PlacedLayer
from lowkey.seam import Call
from lowkey.types import Factors, Layout


@dataclass(frozen=True)
class Exact:
    """Tokens stored as they are: the first `sinks` of each row (padding not counted) and the last `recent`.

    prefill: what a chunk of several tokens sees of itself: `compressed` what will be stored (compression everywhere),
    `exact` its own exact keys, which are compressed afterwards (decode-only compression).
    """

    sinks: int = 0
    recent: int = 0
    prefill: Literal["compressed", "exact"] = "compressed"


class LowRankLayer(PlacedLayer):
    """Latents of all tokens but the last `recent`; sinks are held once more, exactly.

    Held: keys (b, h, s, r_K), values (b, h, s, r_V); recent_k, recent_v (b, h, <= recent, d);
    sink_k, sink_v (b, h, sinks, d); offset (b, 1), each row's token index less its position; first (b, 1), the index of each
    row's first real token.
    """

    keys: Tensor  # type: ignore[assignment]
    values: Tensor  # type: ignore[assignment]

    def __init__(self, factors: Factors, layout: Layout, rope: Rope, exact: Exact | None = None) -> None:
        super().__init__(exact is not None and exact.prefill == "exact")
        self.codec, self.exact = LowRank(factors, layout, rope), exact or Exact()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        b, h, _, d = key_states.shape
        self.device, n = key_states.device, self.exact.sinks
        self.codec = self.codec.like(key_states)
        rank_k, rank_v = self.codec.factors.ranks
        self.keys, self.values = key_states.new_empty(b, h, 0, rank_k), value_states.new_empty(b, h, 0, rank_v)
        self.recent_k, self.recent_v = key_states.new_empty(b, h, 0, d), value_states.new_empty(b, h, 0, d)
        self.sink_k, self.sink_v = key_states.new_zeros(b, h, n, d), value_states.new_zeros(b, h, n, d)
        self.offset = torch.zeros(b, 1, dtype=torch.long, device=self.device)
        self.first = torch.zeros_like(self.offset)
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        names = ("keys", "values", "recent_k", "recent_v", "sink_k", "sink_v", "offset", "first")
        return {name: getattr(self, name) for name in names} if self.is_initialized else {}

    def predicted_nbytes(self) -> int:
        if not self.is_initialized:
            return 0
        b, h, _, d = self.recent_k.shape
        recent = min(self.exact.recent, self.seen)
        numbers = (self.seen - recent) * sum(self.codec.factors.ranks) + (recent + self.exact.sinks) * 2 * d
        return b * (h * numbers * self.keys.element_size() + 2 * self.offset.element_size())

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        self._place(call, keys.shape[2])
        buffer_k, buffer_v = torch.cat([self.recent_k, keys], 2), torch.cat([self.recent_v, values], 2)
        self._write(buffer_k, buffer_v)
        self._write_sinks(keys, values)
        return grouped.attend(self._segments(call, buffer_k, buffer_v), call.scaling, call.softcap)

    # -- writing

    def _place(self, call: Call, t: int) -> None:
        visible = self.place(call, t)
        self.first = torch.where(visible.any(1, keepdim=True), visible.int().argmax(1, keepdim=True), self.seen)

    def _write(self, buffer_k: Tensor, buffer_v: Tensor) -> None:
        """Compress what leaves the recent window; clones, so that no view keeps a larger buffer alive."""
        leaving = max(0, buffer_k.shape[2] - self.exact.recent)
        start = self.seen - buffer_k.shape[2]
        old_k, old_v = buffer_k[:, :, :leaving], buffer_v[:, :, :leaving]
        new_k, new_v = self.codec.encode(old_k, old_v, self.positions(start, start + leaving))
        self.keys, self.values = torch.cat([self.keys, new_k], 2), torch.cat([self.values, new_v], 2)
        self.recent_k, self.recent_v = buffer_k[:, :, leaving:].clone(), buffer_v[:, :, leaving:].clone()

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
        mask = call.full_mask(self.seen)
        segments = [self._latents(call)]
        if not self.exact.sinks and not self.exact.recent and not self._exact_chunk(call):
            return [_masked(segments[0], mask)]
        mask = mask if mask is not None else self.offset.new_ones(1, 1, self.seen, dtype=torch.bool)
        near, stored = self._near(call), self.keys.shape[2]
        covered = near | self._is_sink()
        segments = [_masked(segments[0], mask[..., :stored] & ~covered[..., :stored])]
        start = self.seen - buffer_k.shape[2]
        segments += [Segment(call.query, buffer_k, buffer_v, (mask & near)[..., start:])]
        return segments + self._sinks(call, mask & ~near)

    def _latents(self, call: Call) -> Segment:
        keys = self.codec.readable(self.keys, self.positions(0, self.keys.shape[2]).unsqueeze(1))
        return Segment(self.codec.query(call.query), keys, self.values, None, self.codec.factors.v_up)

    def _exact_chunk(self, call: Call) -> bool:
        return self.exact_prefill and call.query.shape[3] > 1

    def _near(self, call: Call) -> Tensor:
        """(1, t, s): which tokens each query sees exactly, being within its recent window (or its own chunk)."""
        t, device = call.query.shape[3], self.offset.device
        queries = torch.arange(self.seen - t, self.seen, device=device).unsqueeze(1)
        tokens = torch.arange(self.seen, device=device)
        near = tokens > queries - self.exact.recent
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


def _masked(segment: Segment, mask: Tensor | None) -> Segment:
    return Segment(segment.query, segment.keys, segment.values, mask, segment.up)
