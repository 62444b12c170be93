"""Dense attention on any device.

The query heads of a KV head share one matrix product, so keys are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from lowkey.backends import fused
from lowkey.backends.segment import Part, Segment, joint_mask, kv_heads, softcapped

SCORES_AT_ONCE = 2**25  # numbers; 128 MiB in fp32 bound the memory of a long prefill
WASTE = 1.25  # rows of one dense product may differ in length by this factor


def attend(segments: Sequence[Segment], scaling: float, softcap: float | None = None) -> Tensor:
    """As `naive.attend`: attention over segments under one softmax, (b, h, g, t, d)."""
    segments, step = _steps(segments)
    if fused.fits(segments, softcap):
        return fused.attend(segments, scaling)
    return torch.cat([_block(s, scaling, softcap)[0] for s in _blocks(segments, step)], dim=3)


def partial(segments: Sequence[Segment], scaling: float, softcap: float | None = None) -> Part:
    """As `attend`, with the log-sum-exp (b, h, g, t) in fp32 to merge it with attention over other tokens."""
    segments, step = _steps(segments)
    first = segments[0]
    if fused.fits(segments, softcap) and fused.gives_lse(first.query, first.keys, softcap):
        return fused.attend_with_lse(segments, scaling)
    blocks = []
    for block in _blocks(segments, step):
        out, scores, sees_nothing = _block(block, scaling, softcap)
        lse = scores.logsumexp(-1)
        lse = lse if sees_nothing is None else lse.masked_fill(sees_nothing.squeeze(-1), -torch.inf)
        blocks.append((out, lse.view(out.shape[:4])))
    return torch.cat([out for out, _ in blocks], dim=3), torch.cat([lse for _, lse in blocks], dim=3)


def _steps(segments: Sequence[Segment]) -> tuple[Sequence[Segment], int]:
    """(the segments that hold tokens, at least one, how many queries to take at a time)."""
    # a segment without tokens adds nothing, and would only cost an empty product
    segments = [s for s in segments if s.keys.shape[2]] or list(segments)[:1]
    b, h, g, _, _ = segments[0].query.shape
    return segments, max(1, SCORES_AT_ONCE // (b * h * g * sum(s.keys.shape[2] for s in segments) or 1))


def _blocks(segments: Sequence[Segment], step: int) -> Iterator[Sequence[Segment]]:
    """The segments with `step` of their queries at a time."""
    t = segments[0].query.shape[3]
    if step >= t:
        yield segments
        return
    for i in range(0, t, step):
        yield [_with_queries(s, i, i + step) for s in segments]


def _with_queries(s: Segment, start: int, stop: int) -> Segment:
    mask = None if s.mask is None else s.mask[:, start:stop]
    return replace(s, query=s.query[:, :, :, start:stop], mask=mask)


def _block(
    segments: Sequence[Segment], scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention of some queries.

    Returns:
        (output (b, h, g, t, d), masked scores (b, H, t, s), which queries see nothing (b, 1, t, 1) or None).
    """
    each = [_scores(s, scaling, softcap) for s in segments]
    scores, sees_nothing = _masked(each[0] if len(each) == 1 else torch.cat(each, dim=-1), segments)
    weights = scores.softmax(-1)
    if sees_nothing is not None:
        weights = weights.masked_fill(sees_nothing, 0.0)
    parts = weights.to(segments[0].values.dtype).split([s.keys.shape[2] for s in segments], dim=-1)
    h = kv_heads(segments)
    outputs = [_weighted_values(s, w, h) for s, w in zip(segments, parts, strict=True)]
    return reduce(torch.add, outputs), scores, sees_nothing


def _scores(s: Segment, scaling: float, softcap: float | None) -> Tensor:
    """Scaled and capped scores (b, H, t, s) in fp32."""
    g, t = s.query.shape[2:4]
    scores = softcapped((s.query.flatten(2, 3) @ s.keys.mT).unflatten(2, (g, t)).float() * scaling, softcap)
    return (scores if s.bias is None else scores + s.bias[:, :, None, None]).flatten(1, 2)


def _weighted_values(s: Segment, weights: Tensor, h: int) -> Tensor:
    """Weights (b, H, t, s) -> outputs (b, h, g, t, d).

    One product for each stored head, then one for each KV head.
    """
    heads, t = weights.shape[1:3]
    out = (weights.unflatten(1, (s.values.shape[1], -1)).flatten(2, 3) @ s.values).flatten(1, 2)
    out = out.unflatten(1, (h, heads // h * t))
    return (out if s.up is None else out @ s.up).unflatten(2, (heads // h, t))


def _masked(scores: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, Tensor | None]:
    """Overwrite the scores that a mask forbids.

    Returns:
        (scores, which queries may see nothing, as those of padding, or None if there can be none).
    """
    mask = joint_mask(segments)
    if mask is None:
        return scores, None
    allowed = mask[:, None]
    sees_nothing = ~allowed.any(-1, keepdim=True)
    # the lowest finite number, not -inf, which would make rows without any allowed score NaN
    return scores.masked_fill_(~allowed, torch.finfo(scores.dtype).min), sees_nothing


def ragged(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, scaling: float, softcap: float | None = None
) -> Part:
    """As `naive.ragged`, in a few dense products over rows of similar length.

    At most a quarter of what is read is padding.
    """
    rows, m, _ = query.shape
    out = query.new_zeros(rows, m, values.shape[-1], dtype=torch.float32)
    lse = query.new_full((rows, m), -torch.inf, dtype=torch.float32)
    for chosen, index, absent in _length_classes(starts):
        step = max(1, SCORES_AT_ONCE // index.numel())
        for i in range(0, m, step):
            block = slice(i, i + step)
            scores = softcapped((query[chosen, block] @ keys[index].mT).float() * scaling, softcap)
            scores = scores.masked_fill(absent.unsqueeze(1), -torch.inf)
            out[chosen, block] = (scores.softmax(-1).to(values.dtype) @ values[index]).float()
            lse[chosen, block] = scores.logsumexp(-1)
    return out, lse


def _length_classes(starts: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Classes of rows of similar length, longest first; empty rows are left out.

    Yields:
        (the rows' numbers (c), the indices of their tokens (c, longest), which of these are padding).
    """
    lengths = starts.diff()
    # in order of length, a class ends where a row is so short that too much of its space would be padding
    order = lengths.argsort(descending=True)
    ranked = lengths[order].tolist()
    first = 0
    while first < len(ranked) and ranked[first]:
        last = first
        while last < len(ranked) and ranked[last] * WASTE >= ranked[first]:
            last += 1
        chosen = order[first:last]
        offset = torch.arange(ranked[first], device=starts.device)
        absent = offset >= lengths[chosen].unsqueeze(1)
        yield chosen, (starts[chosen].unsqueeze(1) + offset).masked_fill(absent, 0), absent
        first = last
