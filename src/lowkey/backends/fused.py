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

from lowkey.backends import onednn
from lowkey.backends.segment import Part, Segment, joint_mask, kv_heads, merge_seen

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
    return out if up is None else out.to(up.dtype) @ up.unsqueeze(1), lse


def ragged(query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, scaling: float) -> Part:
    """As `naive.ragged`, one row after another."""
    edges = list(itertools.pairwise(starts.tolist()))
    parts = [
        _with_lse(q[None, None], keys[None, None, a:b], values[None, None, a:b], scaling)
        for q, (a, b) in zip(query, edges, strict=True)
    ]
    return torch.cat([out[0].float() for out, _ in parts]), torch.cat([lse[0] for _, lse in parts])


def causal(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Part:
    """Causal attention over as many tokens as there are queries, as `grouped.partial` returns it.

    Args:
        query: (b, h, g, t, d).
        keys: (b, h|G, t, d), of which the i-th query sees the first i + 1.
        values: (b, h|G, t, width).
        scaling: what scores are multiplied with.
    """
    h, g = query.shape[1:3]
    if keys.shape[1] != values.shape[1]:
        keys, values = _repeat_for_heads(keys, h * g), _repeat_for_heads(values, h * g)
    out, lse = _with_lse(query.flatten(1, 2), keys, values, scaling, True)
    return out.unflatten(1, (h, g)), lse.unflatten(1, (h, g))


def causal_newest(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Part:
    """Causal attention of the newest t tokens over all s; arguments are those of `causal`."""
    older = keys.shape[2] - query.shape[3]
    part = causal(query, keys[:, :, older:], values[:, :, older:], scaling)
    if not older:
        return part
    return merge_seen(part, rectangle(query, keys[:, :, :older], values[:, :, :older], scaling))


def rectangle(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Part:
    """Attention of queries that all see all tokens; arguments are those of `causal`, with s tokens."""
    h, g, t = query.shape[1:4]
    if keys.shape[1] != values.shape[1]:
        keys, values = _repeat_for_heads(keys, h * g), _repeat_for_heads(values, h * g)
    # the queries that meet one stored head lie side by side, so that no key is repeated
    folded = query.flatten(1, 3).unflatten(1, (keys.shape[1], -1))
    out, lse = _with_lse(folded, keys, values, scaling)
    return out.reshape(len(out), h, g, t, -1), lse.reshape(len(lse), h, g, t)


def banded(
    query: Tensor, keys: Tensor, values: Tensor, width: int, size: int, missing: int, scaling: float
) -> Part:
    """Attention of each query over the newest tokens up to its own.

    Args:
        query: (b, h, g, blocks * size, d).
        keys: (b, h, blocks, size + width - 1, d), the tokens that the queries of each block see. Those of
            the next block begin `size` tokens later.
        values: (b, h, blocks, size + width - 1, d).
        width: how many tokens each query sees.
        size: queries of a block.
        missing: so many tokens, from the first of the first block on, do not exist.
        scaling: what scores are multiplied with.

    Returns:
        As `grouped.partial`; anything for queries that see no token.
    """
    b, _, g = query.shape[:3]
    blocks, device = keys.shape[2], query.device
    if 0 < (short := -(-missing // size)) < blocks:
        # only the first blocks reach back to tokens that do not exist, and need masks of their own
        parts = [
            banded(query[..., at, :], keys[:, :, of], values[:, :, of], width, size, absent, scaling)
            for at, of, absent in (
                (slice(short * size), slice(short), missing),
                (slice(short * size, None), slice(short, None), 0),
            )
        ]
        out, lse = (torch.cat(x, 3) for x in zip(*parts, strict=True))
        return out, lse
    first, token = torch.arange(size, device=device).unsqueeze(1), torch.arange(keys.shape[3], device=device)
    visible = (token >= first) & (token < first + width)
    if missing:
        begins = torch.arange(0, blocks * size, size, device=device)[:, None, None]
        visible = (visible & (token + begins >= missing)).repeat(b, 1, 1)
    else:
        visible = visible.unsqueeze(0)
    # the queries that meet one stored head lie side by side, and the blocks are a batch
    folded = query.unflatten(3, (blocks, size)).permute(0, 3, 1, 2, 4, 5).flatten(0, 1).flatten(2, 3)
    keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (keys, values))
    mask = keys.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf).repeat(1, g, 1).unsqueeze(1)
    out, lse = _with_lse(folded, keys, values, scaling, mask=mask)
    out = out.unflatten(0, (b, blocks)).unflatten(3, (g, size)).permute(0, 2, 3, 1, 4, 5).flatten(3, 4)
    lse = lse.unflatten(0, (b, blocks)).unflatten(3, (g, size)).permute(0, 2, 3, 1, 4).flatten(3, 4)
    return out, lse


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
        keys: (b, G, s, d), of H / G query heads each.
        values: (b, G, s, width).
        scaling: what scores are multiplied with.
        is_causal: whether each query sees the tokens up to its own only.
        mask: (b|1, 1, t, s), added to the scaled scores; None for nothing.

    Returns:
        (output (b, H, t, width), in fp32 or finer or in the dtype of the keys, log-sum-exp (b, H, t)).
    """
    if not keys.shape[2]:
        return query.new_zeros(*query.shape[:3], values.shape[3]), query.new_full(
            query.shape[:3], -torch.inf, dtype=torch.float32
        )
    if mask is None and onednn.attends_faster(query, keys, values):
        return onednn.attend(query, keys, values, scaling, is_causal)
    width = values.shape[3]
    widest = max(width, keys.shape[3])  # zeros in more channels change no score and no output
    query, keys, values = (pad(x, (0, widest - x.shape[3])) for x in (query.to(keys.dtype), keys, values))
    # the kernel takes the numbers of a token to lie side by side, without looking
    query, keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (query, keys, values))
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attention(query, keys, values, 0.0, is_causal, attn_mask=mask, scale=scaling)
    return out[..., :width], lse


def _repeat_for_heads(x: Tensor, h: int) -> Tensor:
    """Each head (b, heads, ...) so often that there are h."""
    return x if x.shape[1] == h else x.repeat_interleave(h // x.shape[1], 1)
