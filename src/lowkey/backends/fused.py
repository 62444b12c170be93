"""Torch's fused attention over segments.

It forms no matrix of scores, so a long prefill over a compressed cache is as fast as a stock one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from lowkey.backends.segment import Part, Segment, joint_mask, kv_heads

QUERIES = 16  # from so many on, it is faster than products that form scores
# Queries are taken so many at a time on a CPU, and four times as many elsewhere. Tokens that none of them
# sees are not read.
QUERIES_PER_PASS = 128


def fits(segments: Sequence[Segment], softcap: float | None) -> bool:
    """Whether this module can answer.

    It needs many queries in one basis, and scores that are only scaled and masked.
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
    h, up = kv_heads(segments), segments[0].up
    out = torch.cat([_attend_block(block, scaling) for block in _blocks(segments)], 2).unflatten(1, (h, -1))
    return out if up is None else out @ up.unsqueeze(1)


def _blocks(segments: Sequence[Segment]) -> list[list[Segment]]:
    """The segments for some queries at a time, without the tokens that none of these sees."""
    t = segments[0].query.shape[3]
    rows = QUERIES_PER_PASS if segments[0].query.device.type == "cpu" else 4 * QUERIES_PER_PASS
    spans = zip(*(_visible_spans(s, t, rows) for s in segments), strict=True)
    return [
        [_cut(s, slice(i * rows, (i + 1) * rows), span) for s, span in zip(segments, own, strict=True)]
        for i, own in enumerate(spans)
    ]


def _visible_spans(s: Segment, t: int, rows: int) -> list[slice]:
    """For every `rows` of the t queries, the smallest span of tokens that holds all that they see."""
    n = s.keys.shape[2]
    if s.mask is None or not n:
        return [slice(0, n)] * -(-t // rows)
    # (blocks, n); amax over bytes is ten times as fast as `any` over booleans
    seen = torch.stack([part.view(torch.uint8).amax((0, 1)) for part in s.mask.split(rows, 1)])
    return [slice(i, n - j) for i, j in torch.stack([seen.argmax(1), seen.flip(1).argmax(1)], 1).tolist()]


def _cut(s: Segment, rows: slice, span: slice) -> Segment:
    """Some queries of a segment over some of its tokens."""
    mask = None if s.mask is None else s.mask[:, rows, span]
    return replace(
        s, query=s.query[:, :, :, rows], keys=s.keys[:, :, span], values=s.values[:, :, span], mask=mask
    )


def _attend_block(segments: Sequence[Segment], scaling: float) -> Tensor:
    """Attention over segments joined along their tokens: (b, H, t, width of the values)."""
    heads = {x.shape[1] for s in segments for x in (s.keys, s.values)}
    h = heads.pop() if len(heads) == 1 else kv_heads(segments)
    keys = torch.cat([_repeat_for_heads(s.keys, h) for s in segments], 2)
    values = torch.cat([_repeat_for_heads(s.values, h) for s in segments], 2)
    query, width, mask = segments[0].query.flatten(1, 2), values.shape[3], joint_mask(segments)
    widest = max(width, keys.shape[3])  # the fused kernels want keys and values of one width
    query, keys, values = (pad(x, (0, widest - x.shape[3])) for x in (query, keys, values))
    mask = mask if mask is None else mask.unsqueeze(1)
    out = scaled_dot_product_attention(query, keys, values, mask, scale=scaling, enable_gqa=True)[..., :width]
    # torch leaves NaN, or anything, for a query that sees nothing
    return out if mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0.0)


# -- with the log-sum-exp, for parts that are merged


def gives_lse(query: Tensor, keys: Tensor, softcap: float | None) -> bool:
    """Whether `ragged` and `causal` can answer so many queries.

    They call torch's kernel for CPUs, whose log-sum-exp has no gradient, so none may be asked for.
    """
    traced = torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad)
    return query.device.type == "cpu" and softcap is None and query.shape[-2] >= QUERIES and not traced


def attend_with_lse(segments: Sequence[Segment], scaling: float) -> Part:
    """As `grouped.partial`, where `fits` and `gives_lse` say that this module can answer."""
    h, up, parts = kv_heads(segments), segments[0].up, []
    for block in _blocks(segments):
        query, mask = block[0].query.flatten(1, 2), joint_mask(block)
        keys, values = (
            torch.cat([_repeat_for_heads(x, query.shape[1]) for x in some], 2)
            for some in ([s.keys for s in block], [s.values for s in block])
        )
        added = None
        if mask is not None:
            added = query.new_zeros(len(mask), 1, *mask.shape[1:]).masked_fill_(
                ~mask.unsqueeze(1), -torch.inf
            )
        out, lse = _with_lse(query, keys, values, scaling, mask=added)
        if mask is not None:
            blind = ~mask.any(-1).unsqueeze(1)  # torch leaves anything for a query that sees nothing
            out, lse = out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -torch.inf)
        parts.append((out, lse))
    out, lse = (torch.cat(x, 2).unflatten(1, (h, -1)) for x in zip(*parts, strict=True))
    return out if up is None else out @ up.unsqueeze(1), lse


def ragged(query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, scaling: float) -> Part:
    """As `naive.ragged`, one row after another."""
    edges = list(itertools.pairwise(starts.tolist()))
    parts = [
        _with_lse(q[None, None], keys[None, None, a:b], values[None, None, a:b], scaling)
        for q, (a, b) in zip(query, edges, strict=True)
    ]
    return torch.cat([out[0].float() for out, _ in parts]), torch.cat([lse[0] for _, lse in parts])


def causal(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Part:
    """Causal attention of a chunk over itself, as `grouped.partial` returns it.

    Args:
        query: (b, h, g, t, d).
        keys: (b, h, t, d), of the same tokens.
        values: (b, h, t, d).
        scaling: what scores are multiplied with.
    """
    g = query.shape[2]
    out, lse = _with_lse(
        query.flatten(1, 2),
        _repeat_for_heads(keys, g * keys.shape[1]),
        _repeat_for_heads(values, g * keys.shape[1]),
        scaling,
        True,
    )
    return out.unflatten(1, (-1, g)), lse.unflatten(1, (-1, g))


def _with_lse(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    is_causal: bool = False,
    mask: Tensor | None = None,
) -> Part:
    """Attention and its log-sum-exp.

    Args:
        query: (b, H, t, d).
        keys: (b, H, s, d).
        values: (b, H, s, width).
        scaling: what scores are multiplied with.
        is_causal: whether each query sees the tokens up to its own only.
        mask: (b|1, 1, t, s), added to the scaled scores; None for nothing.

    Returns:
        (output (b, H, t, width), log-sum-exp (b, H, t)).
    """
    if not keys.shape[2]:
        return query.new_zeros(*query.shape[:3], values.shape[3]), query.new_full(
            query.shape[:3], -torch.inf, dtype=torch.float32
        )
    width = values.shape[3]
    widest = max(width, keys.shape[3])  # zeros in more channels change no score and no output
    query, keys, values = (pad(x, (0, widest - x.shape[3])) for x in (query.to(keys.dtype), keys, values))
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attention(query, keys, values, 0.0, is_causal, attn_mask=mask, scale=scaling)
    return out[..., :width], lse


def _repeat_for_heads(x: Tensor, h: int) -> Tensor:
    """Each head (b, heads, ...) so often that there are h."""
    return x if x.shape[1] == h else x.repeat_interleave(h // x.shape[1], 1)
