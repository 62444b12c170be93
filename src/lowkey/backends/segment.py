"""What a backend attends to: a few segments whose softmax is shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Keys and values stored one way, with the query carried into their basis.

    query (b, G, H/G, t, r), keys (b, G, s, r), values (b, G', s, r_V): H query heads in order, each G-th part
    of which meets one stored head; mask (b|1, t, s), True = attend, or None for all; up (h|1, r_V, d) maps
    this segment's output back, one map for each KV head, or None when it is already d wide (then G' = h);
    bias (b, G, s) is added to the scaled scores.
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
    """h: stored heads may stand for several."""
    return max(max(s.values.shape[1], 1 if s.up is None else s.up.shape[0]) for s in segments)


def joint_mask(segments: Sequence[Segment]) -> Tensor | None:
    """The masks side by side, (b|1, t, tokens of all segments), or None where everything is seen."""
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
"""What attention over some of the tokens gives: out (..., d) and lse (...), the log-sum-exp of its scores,
-inf where there are none.
"""


def merge_parts(parts: Sequence[Part]) -> Part:
    """One softmax over the tokens of all parts."""
    lse = torch.stack([p[1] for p in parts])
    total = lse.logsumexp(0)
    weights = (lse - total).exp().nan_to_num(0.0).unsqueeze(-1)  # all -inf: nothing to see anywhere
    # where there is nothing to see, out may be NaN
    out = [torch.where(w > 0, w * p[0], 0.0) for w, p in zip(weights, parts, strict=True)]
    return torch.stack(out).sum(0), total
