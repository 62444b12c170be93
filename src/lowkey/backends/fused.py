"""Torch's fused attention over segments: no matrix of scores is formed, so a long prefill is as fast as a stock one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from lowkey.backends.segment import Segment, kv_heads

QUERIES = 16  # from so many on it is faster than products that form scores
ROWS = 512  # queries taken at once: what none of them sees is not read


def fits(segments: Sequence[Segment], softcap: float | None) -> bool:
    """Whether this module can answer: many queries in one basis, and scores that nothing is done to but scaling and masking."""
    first = segments[0]
    alike = len(segments) == 1 or all(s.query is first.query and s.up is None for s in segments)
    return alike and softcap is None and first.query.shape[3] >= QUERIES and all(s.bias is None for s in segments)


def attend(segments: Sequence[Segment], scaling: float) -> Tensor:
    """As `naive.attend`: (b, h, g, t, d)."""
    query, h = segments[0].query.flatten(1, 2), kv_heads(segments)
    t = query.shape[2]
    stops = [_stops(s, t) for s in segments]
    out = torch.cat([_rows(segments, query, i, [own[i // ROWS] for own in stops], scaling) for i in range(0, t, ROWS)], 2)
    out, up = out.unflatten(1, (h, -1)), segments[0].up
    return out if up is None else out @ up.unsqueeze(1)


def _stops(s: Segment, t: int) -> list[int]:
    """For every ROWS queries, where what they see of this segment ends."""
    n = s.keys.shape[2]
    if s.mask is None or not n:
        return [n] * -(-t // ROWS)
    seen = torch.stack([part.any(1).any(0) for part in s.mask.split(ROWS, 1)])  # (blocks, n)
    return (seen * torch.arange(1, n + 1, device=seen.device)).amax(1).tolist()


def _rows(segments: Sequence[Segment], query: Tensor, start: int, stops: list[int], scaling: float) -> Tensor:
    """(b, H, ROWS, width of the values)"""
    heads = {x.shape[1] for s in segments for x in (s.keys, s.values)}
    h = heads.pop() if len(heads) == 1 else kv_heads(segments)
    keys = torch.cat([_for_heads(s.keys[:, :, :n], h) for s, n in zip(segments, stops, strict=True)], 2)
    values = torch.cat([_for_heads(s.values[:, :, :n], h) for s, n in zip(segments, stops, strict=True)], 2)
    query, width = query[:, :, start : start + ROWS], values.shape[3]
    if not keys.shape[2]:
        return values.new_zeros(*query.shape[:3], width)
    mask = _mask(segments, query, start, stops)
    widest = max(width, keys.shape[3])  # the fused kernels want one
    query, keys, values = (pad(x, (0, widest - x.shape[3])) for x in (query, keys, values))
    out = scaled_dot_product_attention(query, keys, values, mask, scale=scaling, enable_gqa=True)[..., :width]
    return out if mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def _for_heads(x: Tensor, h: int) -> Tensor:
    return x if x.shape[1] == h else x.repeat_interleave(h // x.shape[1], 1)


def _mask(segments: Sequence[Segment], query: Tensor, start: int, stops: list[int]) -> Tensor | None:
    """(b|1, 1, ROWS, s), or None where everything is seen."""
    if all(s.mask is None for s in segments):
        return None
    t = query.shape[2]
    masks = [
        query.new_ones(1, t, n, dtype=torch.bool) if s.mask is None else s.mask[:, start : start + t, :n]
        for s, n in zip(segments, stops, strict=True)
    ]
    batch = max(len(m) for m in masks)
    return torch.cat([m.expand(batch, -1, -1) for m in masks], 2).unsqueeze(1)
