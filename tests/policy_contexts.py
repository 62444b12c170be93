"""Contexts in which eviction policies score tokens."""

from __future__ import annotations

from dataclasses import replace

import torch

from lowkey.ops.rope import rotate
from lowkey.policies.base import EvictionContext

HEADS, GROUPS, DIM = 2, 3, 8
SMALL = {"budget": "50%", "sinks": 2, "recent": 2}


def rope_of(width=DIM, scale=1.0):
    """A rotary module of its own: the first `width` channels turn; scaled as YaRN scales."""
    speeds = 10.0 ** (-torch.arange(width // 2) / 3)

    def rope(positions, like):
        angles = (positions.unsqueeze(-1) * speeds).repeat(1, 1, 2).unsqueeze(1)
        return (scale * angles.cos()).to(like.dtype).float(), (scale * angles.sin()).to(like.dtype).float()

    return rope


def build(
    tokens=(14, 9), pad=0, groups=GROUPS, softcap=None, rope=None, dtype=torch.float32, start=0, seed=0
):
    """Left-padded rows of so many tokens, `pad` wider than the longest; a row's contents do not depend on its
    padding or its place (`start`: the position of its first token)."""
    rope, width = rope or rope_of(), max(tokens) + pad
    parts = [_row(n, width, groups, seed + i) for i, n in enumerate(tokens)]
    keys, values, queries = (torch.stack(part) for part in zip(*parts, strict=True))
    at = torch.arange(width) - width + torch.tensor(tokens).unsqueeze(1) + start
    cos, sin = rope(at, keys)
    real = at >= start
    return EvictionContext(
        keys=rotate(keys, cos, sin).to(dtype),
        values=values.to(dtype),
        positions=at.unsqueeze(1).expand(-1, HEADS, -1),
        valid=real.unsqueeze(1).expand(-1, HEADS, -1),
        queries=rotate(queries, cos.unsqueeze(1), sin.unsqueeze(1)).to(dtype),
        query_positions=at.masked_fill(~real, -1),
        scaling=0.6,
        softcap=softcap,
        rope=rope,
        previous_scores=torch.zeros(len(tokens), HEADS, width),
        gates=_gates(groups, cos.shape[-1]),
    )


def _gates(groups, rotated):
    """Centres of queries and the mean norms of their pairs, which are larger than the centres'."""
    generator = torch.Generator().manual_seed(9)
    centre = torch.randn(HEADS, groups, DIM, generator=generator)
    seen = HEADS * (groups + 2) * DIM
    sizes = {
        "query": (HEADS, groups, 16, seen),
        "query_bias": (HEADS, groups, 16),
        "key": (HEADS, 16, seen),
        "key_bias": (HEADS, 16),
        "query_norm": (16,),
        "key_norm": (16,),
        "sinks": (HEADS, 16, 16),
        "bias": (HEADS, groups),
    }
    sink_gate = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    norms = 3 + torch.rand(HEADS, groups, DIM - rotated // 2, generator=generator)
    return {"centre": centre, "norms": norms, **sink_gate}


def _row(tokens, width, groups, seed):
    """Keys, values (h, width, d) and queries (h, g, width, d); what lies in the padding is large and must not
    matter.
    """
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(*shape, generator=generator)
        for shape in ((HEADS, tokens, DIM), (HEADS, tokens, DIM), (HEADS, groups, tokens, DIM))
    ]
    return [torch.cat([torch.full((*x.shape[:-2], width - tokens, DIM), 30.0), x], -2) for x in made]


def piece(context, start, stop):
    """The chunk of a context's tokens from `start` to `stop`, as a context without a past."""
    cut = slice(start, stop)
    tokens = {
        name: getattr(context, name)[:, :, cut]
        for name in ("keys", "values", "positions", "valid", "previous_scores")
    }
    return replace(
        context,
        **tokens,
        queries=context.queries[:, :, :, cut],
        query_positions=context.query_positions[:, cut],
    )


def after(context, start, kept, carried):
    """What the second chunk of a context sees when `kept` (b, h, start) was kept of the first: shorter heads
    have gaps, then the chunk.
    """
    longest, new = int(kept.sum(-1).max()), piece(context, start, context.keys.shape[2])
    old = piece(context, 0, start)
    packed = [_pack(getattr(old, name), kept, longest) for name in ("keys", "values", "positions")]
    there = _pack(kept, kept, longest)
    tokens = dict(
        zip(("keys", "values", "positions"), packed, strict=True),
        valid=there,
        previous_scores=_pack(carried, kept, longest),
    )
    return replace(new, **{name: torch.cat([x, getattr(new, name)], 2) for name, x in tokens.items()})


def _pack(x, kept, longest):
    out = x.new_zeros(*kept.shape[:2], longest, *x.shape[3:])
    for i in range(kept.shape[0]):
        for j in range(kept.shape[1]):
            chosen = x[i, j][kept[i, j]]
            out[i, j, : len(chosen)] = chosen
    return out


def evicted():
    """A second chunk after an eviction that left heads with different tokens, in different numbers, with
    scores.
    """
    context = build(tokens=(18, 12), pad=1, seed=5)
    generator = torch.Generator().manual_seed(1)
    kept = (torch.rand(2, HEADS, 10, generator=generator) < 0.5) & context.valid[:, :, :10]
    kept[:, :, -1] = True
    return after(context, 10, kept, torch.rand(2, HEADS, 10, generator=generator))
