"""Torch's fused attention over segments: no matrix of scores is formed, so a long prefill is as fast as a
stock one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from lowkey.backends.segment import Part, Segment, joint_mask, kv_heads

QUERIES = 16  # from so many on it is faster than products that form scores
QUERIES_PER_PASS = (
    128  # queries taken at once on a CPU, four times as many elsewhere: what none of them sees is not read
)


def fits(segments: Sequence[Segment], softcap: float | None) -> bool:
    """Whether this module can answer: many queries in one basis, and scores that nothing is done to but
    scaling and masking.
    """
    first = segments[0]
    alike = len(segments) == 1 or all(s.query is first.query and s.up is None for s in segments)
    return (
        alike
        and softcap is None
        and first.query.shape[3] >= QUERIES
        and all(s.bias is None for s in segments)
    )


def attend(segments: Sequence[Segment], scaling: float) -> Tensor:
    """As `naive.attend`: (b, h, g, t, d)."""
    h, t, up = kv_heads(segments), segments[0].query.shape[3], segments[0].up
    rows = QUERIES_PER_PASS if segments[0].query.device.type == "cpu" else 4 * QUERIES_PER_PASS
    spans = zip(*(_spans(s, t, rows) for s in segments), strict=True)
    blocks = [
        [_cut(s, slice(i * rows, (i + 1) * rows), span) for s, span in zip(segments, own, strict=True)]
        for i, own in enumerate(spans)
    ]
    out = torch.cat([_rows(block, scaling) for block in blocks], 2).unflatten(1, (h, -1))
    return out if up is None else out @ up.unsqueeze(1)


def _spans(s: Segment, t: int, rows: int) -> list[slice]:
    """For so many queries at a time, between which tokens of this segment lies what they see."""
    n = s.keys.shape[2]
    if s.mask is None or not n:
        return [slice(0, n)] * -(-t // rows)
    # (blocks, n); ten times as fast as `any`
    seen = torch.stack([part.view(torch.uint8).amax((0, 1)) for part in s.mask.split(rows, 1)])
    return [slice(i, n - j) for i, j in torch.stack([seen.argmax(1), seen.flip(1).argmax(1)], 1).tolist()]


def _cut(s: Segment, rows: slice, span: slice) -> Segment:
    mask = None if s.mask is None else s.mask[:, rows, span]
    return replace(
        s, query=s.query[:, :, :, rows], keys=s.keys[:, :, span], values=s.values[:, :, span], mask=mask
    )


def _rows(segments: Sequence[Segment], scaling: float) -> Tensor:
    """(b, H, t, width of the values)"""
    heads = {x.shape[1] for s in segments for x in (s.keys, s.values)}
    h = heads.pop() if len(heads) == 1 else kv_heads(segments)
    keys = torch.cat([_for_heads(s.keys, h) for s in segments], 2)
    values = torch.cat([_for_heads(s.values, h) for s in segments], 2)
    query, width, mask = segments[0].query.flatten(1, 2), values.shape[3], joint_mask(segments)
    widest = max(width, keys.shape[3])  # the fused kernels want one
    query, keys, values = (pad(x, (0, widest - x.shape[3])) for x in (query, keys, values))
    mask = mask if mask is None else mask.unsqueeze(1)
    out = scaled_dot_product_attention(query, keys, values, mask, scale=scaling, enable_gqa=True)[..., :width]
    return out if mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0.0)


# -- with the log-sum-exp, for parts that are merged


def gives_lse(query: Tensor, keys: Tensor, softcap: float | None) -> bool:
    """Whether torch's kernel for CPUs can answer so many queries. Its log-sum-exp has no gradient, so none
    may be asked for.
    """
    traced = torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad)
    return query.device.type == "cpu" and softcap is None and query.shape[-2] >= QUERIES and not traced


def ragged(query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, scaling: float) -> Part:
    """As `naive.ragged`, row after row."""
    edges = list(itertools.pairwise(starts.tolist()))
    parts = [
        _with_lse(q[None, None], keys[None, None, a:b], values[None, None, a:b], scaling)
        for q, (a, b) in zip(query, edges, strict=True)
    ]
    return torch.cat([out[0].float() for out, _ in parts]), torch.cat([lse[0] for _, lse in parts])


def causal(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Part:
    """query (b, h, g, t, d) over keys and values (b, h, t, d) that came with it, each over those up to its
    own: as `grouped.partial`.
    """
    g = query.shape[2]
    out, lse = _with_lse(
        query.flatten(1, 2),
        _for_heads(keys, g * keys.shape[1]),
        _for_heads(values, g * keys.shape[1]),
        scaling,
        True,
    )
    return out.unflatten(1, (-1, g)), lse.unflatten(1, (-1, g))


def _with_lse(query: Tensor, keys: Tensor, values: Tensor, scaling: float, is_causal: bool = False) -> Part:
    """query (b, H, t, d), keys and values (b, H, s, d) -> (b, H, t, width of the values), (b, H, t)"""
    if not keys.shape[2]:
        return query.new_zeros(*query.shape[:3], values.shape[3]), query.new_full(
            query.shape[:3], -torch.inf, dtype=torch.float32
        )
    width = values.shape[3]
    widest = max(width, keys.shape[3])
    query, keys, values = (pad(x, (0, widest - x.shape[3])) for x in (query.to(keys.dtype), keys, values))
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attention(query, keys, values, 0.0, is_causal, scale=scaling)
    return out[..., :width], lse


def _for_heads(x: Tensor, h: int) -> Tensor:
    return x if x.shape[1] == h else x.repeat_interleave(h // x.shape[1], 1)
