"""What a backend attends to: a few segments of stored tokens that share one softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Keys and values that are stored in one form, with the query in the basis of that form.

    There are H query heads, h KV heads and G stored heads. G may differ between keys and values, and is
    smaller than h where several KV heads share a latent. Query heads are in order: each G-th part of them
    meets one stored head.

    Args:
        query: (b, G, H/G, t, r).
        keys: (b, G, s, r).
        values: (b, G', s, r_V).
        mask: (b|1, t, s), True where a query may attend; None if it may everywhere.
        up: (h|1, r_V, d), the map of each KV head that brings this segment's output back to d channels; None
            if it has d channels already (then G' = h).
        bias: (b, G, s), added to the scaled scores; None for none.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None


def softcapped(scores: Tensor, softcap: float | None) -> Tensor:
    """Cap scaled scores as Gemma 2 does, softcap * tanh(scores / softcap); None leaves them unchanged."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def kv_heads(segments: Sequence[Segment]) -> int:
    """The number h of KV heads that some segments stand for."""
    return max(max(s.values.shape[1], 1 if s.up is None else s.up.shape[0]) for s in segments)


def joint_mask(segments: Sequence[Segment]) -> Tensor | None:
    """The masks of segments side by side, (b|1, t, tokens of all); None if everything is seen."""
    if all(s.mask is None for s in segments):
        return None
    t = segments[0].query.shape[3]
    masks = [
        s.mask if s.mask is not None else s.keys.new_ones(1, t, s.keys.shape[2], dtype=torch.bool)
        for s in segments
    ]
    batch = max(m.shape[0] for m in masks)
    return torch.cat([m.expand(batch, -1, -1) for m in masks], dim=-1)


Part = tuple[Tensor, Tensor]
"""Attention over some of the tokens: the output (..., d), and the log-sum-exp (...) of its scores, which is
-inf where no token is seen."""


def merge_seen(first: Part, second: Part) -> Part:
    """As `merge_parts`, with fewer copies, of two parts that both see a token at every query."""
    weight = (second[1] - first[1]).sigmoid().unsqueeze(-1)
    out = torch.lerp(first[0].to(weight.dtype), second[0].to(weight.dtype), weight)
    return out, torch.logaddexp(first[1], second[1])


def merge_parts(parts: Sequence[Part]) -> Part:
    """Attention over the tokens of all parts, under one softmax."""
    lse = torch.stack([p[1] for p in parts])
    total = lse.logsumexp(0)
    # where no part sees a token, -inf - -inf gives NaN
    weights = (lse - total).exp().nan_to_num(0.0).unsqueeze(-1)
    # where a part sees no token, its output may be NaN
    out = [torch.where(w > 0, w * p[0], 0.0) for w, p in zip(weights, parts, strict=True)]
    return torch.stack(out).sum(0), total
