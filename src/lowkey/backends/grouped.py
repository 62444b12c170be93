"""Dense attention on any device; the g query heads of a KV head share one matrix product, so keys are never repeated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lowkey.backends.segment import Segment

BLOCK = 2**25  # scores held at once (numbers): 128 MiB in fp32 bounds the memory of a long prefill


def attend(segments: Sequence[Segment], scaling: float, softcap: float | None = None) -> Tensor:
    """As `naive.attend`: one softmax over all segments. Returns (b, h, g, t, d); a query that may see nothing gets 0."""
    segments = [s for s in segments if s.keys.shape[2]] or list(segments)[:1]
    b, h, g, t, _ = segments[0].query.shape
    step = max(1, BLOCK // (b * h * g * sum(s.keys.shape[2] for s in segments) or 1))
    if step >= t:
        return _block(segments, scaling, softcap)
    return torch.cat([_block([_rows(s, i, i + step) for s in segments], scaling, softcap) for i in range(0, t, step)], dim=3)


def _rows(s: Segment, start: int, stop: int) -> Segment:
    return replace(s, query=s.query[:, :, :, start:stop], mask=None if s.mask is None else s.mask[:, start:stop])


def _block(segments: Sequence[Segment], scaling: float, softcap: float | None) -> Tensor:
    scores = torch.cat([_scores(s) for s in segments], dim=-1).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores, dead = _masked(scores, segments)
    weights = scores.softmax(-1)
    if dead is not None:
        weights = weights.masked_fill(dead, 0.0)
    parts = weights.to(segments[0].values.dtype).split([s.keys.shape[2] for s in segments], dim=-1)
    return torch.stack([_values(s, w) for s, w in zip(segments, parts, strict=True)]).sum(0)


def _scores(s: Segment) -> Tensor:
    g, t = s.query.shape[2:4]
    return (s.query.flatten(2, 3) @ s.keys.mT).unflatten(2, (g, t))


def _values(s: Segment, weights: Tensor) -> Tensor:
    g, t = weights.shape[2:4]
    out = weights.flatten(2, 3) @ s.values
    return (out if s.up is None else out @ s.up).unflatten(2, (g, t))


def _masked(scores: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, Tensor | None]:
    """Scores with -inf where attention is not allowed, and which rows are wholly masked (padding), if any can be."""
    if all(s.mask is None for s in segments):
        return scores, None
    t = scores.shape[3]
    masks = [s.mask if s.mask is not None else scores.new_ones(1, t, s.keys.shape[2], dtype=torch.bool) for s in segments]
    batch = max(m.shape[0] for m in masks)
    allowed = torch.cat([m.expand(batch, -1, -1) for m in masks], dim=-1)[:, None, None]
    dead = ~allowed.any(-1, keepdim=True)
    return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min), dead
