"""The definition: loops over batch, head, query. Slow on purpose; everything faster is tested against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowkey.backends.segment import Segment


def attend(segments: Sequence[Segment], scaling: float, softcap: float | None = None) -> Tensor:
    """softmax over all segments' scores together, then the weighted values mapped up. Returns (b, h, g, t, d)."""
    b, h, g, t, _ = segments[0].query.shape
    rows = [_one(segments, scaling, softcap, i, j, k, m) for i in range(b) for j in range(h) for k in range(g) for m in range(t)]
    return torch.stack(rows).view(b, h, g, t, -1)


def _one(segments: Sequence[Segment], scaling: float, softcap: float | None, i: int, j: int, k: int, m: int) -> Tensor:
    scores = torch.cat([_scores(s, i, j, k, m) for s in segments]) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = torch.cat([_allowed(s, i, m) for s in segments])
    if not allowed.any():
        return torch.zeros_like(_mapped(segments[0], segments[0].values[i, j, :0].sum(0), j))
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).split([s.keys.shape[2] for s in segments])
    parts = [_mapped(s, w.to(s.values.dtype) @ s.values[i, j], j) for s, w in zip(segments, weights, strict=True)]
    return torch.stack(parts).sum(0)


def _scores(s: Segment, i: int, j: int, k: int, m: int) -> Tensor:
    return (s.keys[i, j] @ s.query[i, j, k, m]).float()


def _allowed(s: Segment, i: int, m: int) -> Tensor:
    if s.mask is None:
        return torch.ones(s.keys.shape[2], dtype=torch.bool, device=s.keys.device)
    return s.mask[i % s.mask.shape[0], m]


def _mapped(s: Segment, out: Tensor, j: int) -> Tensor:
    return out if s.up is None else out @ s.up[j % s.up.shape[0]]
