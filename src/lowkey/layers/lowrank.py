"""Keys in rank r_K and values in rank r_V, with optional exact sink tokens and an exact recent window.

`post_rope`: rotated keys are projected and the query is carried into their basis; nothing is ever expanded back.
`pre_rope`: keys are stored unrotated; they are expanded and rotated at their own positions when read (arXiv:2408.05646,
whose published decoding rotates the whole history at the current position; here each key keeps its own).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowkey.backends import grouped
from lowkey.backends.segment import Segment
from lowkey.families import Rope
from lowkey.layers.base import StoringLayer, batch_positions
from lowkey.ops.rope import rotate, unrotate
from lowkey.seam import Call
from lowkey.types import Factors, Layout, LowkeyError


@dataclass(frozen=True)
class Exact:
    """Tokens stored as they are: the first `sinks` of each row (padding not counted) and the last `recent`.

    prefill: what a chunk of several tokens sees of itself: `compressed` what will be stored (compression everywhere),
    `exact` its own exact keys, which are compressed afterwards (decode-only compression).
    """

    sinks: int = 0
    recent: int = 0
    prefill: Literal["compressed", "exact"] = "compressed"


class LowRankLayer(StoringLayer):
    """Latents of all tokens but the last `recent`; sinks are held once more, exactly.

    Held: keys (b, h, s, r_K), values (b, h, s, r_V); recent_k, recent_v (b, h, <= recent, d);
    sink_k, sink_v (b, h, sinks, d); offset (b, 1), each row's token index less its position; first (b, 1), the index of each
    row's first real token.
    """

    keys: Tensor  # type: ignore[assignment]
    values: Tensor  # type: ignore[assignment]

    def __init__(self, factors: Factors, layout: Layout, rope: Rope, exact: Exact | None = None) -> None:
        super().__init__(exact is not None and exact.prefill == "exact")
        self.factors, self.layout, self.rope, self.exact = factors, layout, rope, exact or Exact()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        b, h, _, d = key_states.shape
        self.device, n = key_states.device, self.exact.sinks
        self.factors = self.factors.to(key_states)
        rank_k, rank_v = self.factors.ranks
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
        numbers = (self.seen - recent) * sum(self.factors.ranks) + (recent + self.exact.sinks) * 2 * d
        return b * (h * numbers * self.keys.element_size() + 2 * self.offset.element_size())

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        self._place(call, keys.shape[2])
        buffer_k, buffer_v = torch.cat([self.recent_k, keys], 2), torch.cat([self.recent_v, values], 2)
        self._write(buffer_k, buffer_v)
        self._write_sinks(keys, values)
        return grouped.attend(self._segments(call, buffer_k, buffer_v), call.scaling, call.softcap)

    # -- writing

    def _place(self, call: Call, t: int) -> None:
        """Learn where each row begins, and hold the model to positions that count up by one from there."""
        start, batch = self.seen - t, self.offset.shape[0]
        positions = batch_positions(start, call, batch)
        visible = _visible(call, self.seen, batch)
        begun = visible[:, :start].any(1, keepdim=True)  # until a row's first real token, its positions mean nothing
        self.offset = torch.where(begun, self.offset, self.seen - 1 - positions[:, -1:])
        self.first = torch.where(visible.any(1, keepdim=True), visible.int().argmax(1, keepdim=True), self.seen)
        if not bool(((positions == self._positions(start, self.seen)) | ~visible[:, start:]).all()):
            raise LowkeyError("position_ids: this cache needs positions that count up by one from a row's first token; drop position_ids")

    def _positions(self, start: int, stop: int) -> Tensor:
        """Positions (b, stop - start) of the tokens with these indices; padding has none that matter."""
        return torch.arange(start, stop, device=self.offset.device) - self.offset

    def _write(self, buffer_k: Tensor, buffer_v: Tensor) -> None:
        """Compress what leaves the recent window; clones, so that no view keeps a larger buffer alive."""
        leaving = max(0, buffer_k.shape[2] - self.exact.recent)
        start = self.seen - buffer_k.shape[2]
        old_k, old_v = buffer_k[:, :, :leaving], buffer_v[:, :, :leaving]
        self.keys = torch.cat([self.keys, self._encode_keys(old_k, start)], 2)
        self.values = torch.cat([self.values, old_v @ self.factors.v_down], 2)
        self.recent_k, self.recent_v = buffer_k[:, :, leaving:].clone(), buffer_v[:, :, leaving:].clone()

    def _encode_keys(self, keys: Tensor, start: int) -> Tensor:
        if self.layout == "pre_rope":
            cos, sin = self.rope(self._positions(start, start + keys.shape[2]), keys)
            keys = unrotate(keys.float(), cos, sin).to(keys.dtype)
        return keys @ self.factors.k_down

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
        f = self.factors
        if self.layout == "post_rope":
            return Segment(call.query @ f.k_up.mT.unsqueeze(1), self.keys, self.values, None, f.v_up)
        cos, sin = self.rope(self._positions(0, self.keys.shape[2]), self.keys)
        keys = rotate((self.keys @ f.k_up).float(), cos, sin).to(self.keys.dtype)
        return Segment(call.query, keys, self.values, None, f.v_up)

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


def _visible(call: Call, seen: int, batch: int) -> Tensor:
    """(b, s): which tokens the newest query may see; the others are padding."""
    if call.mask is None:
        return torch.ones(batch, seen, dtype=torch.bool, device=call.query.device)
    return call.mask[:, -1].expand(batch, seen)
