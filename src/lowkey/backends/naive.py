"""The definition of attention over segments and over ragged rows, in loops over batch, heads and queries.

Slow on purpose: every faster backend is tested against it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lowkey.backends.segment import Part, Segment, kv_heads, softcapped


def attend(segments: Sequence[Segment], scaling: float, softcap: float | None = None) -> Tensor:
    """Attention over segments under one softmax.

    Args:
        segments: the stored tokens, and the queries in the basis of each segment.
        scaling: what scores are multiplied with.
        softcap: the soft cap of scaled scores, or None.

    Returns:
        (b, h, g, t, d); a query that may see nothing gets 0.
    """
    b, t = segments[0].query.shape[0], segments[0].query.shape[3]
    h, heads = kv_heads(segments), segments[0].query.shape[1] * segments[0].query.shape[2]
    rows = [
        _one_query(segments, scaling, softcap, i, j, m, h)
        for i in range(b)
        for j in range(heads)
        for m in range(t)
    ]
    return torch.stack(rows).view(b, h, heads // h, t, -1)


def _one_query(
    segments: Sequence[Segment], scaling: float, softcap: float | None, i: int, j: int, m: int, h: int
) -> Tensor:
    """The output (d) of the m-th query of sequence i in query head j of all H.

    Its KV head is j // (H / h).
    """
    heads = segments[0].query.shape[1] * segments[0].query.shape[2]
    scores = torch.cat(
        [softcapped(_scores(s, i, j, m) * scaling, softcap) + _bias(s, i, j) for s in segments]
    )
    allowed = torch.cat([_allowed(s, i, m) for s in segments])
    if not allowed.any():
        return torch.zeros_like(_mapped_up(segments[0], segments[0].values[i, 0, :0].sum(0), 0))
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).split([s.keys.shape[2] for s in segments])
    parts = [
        _mapped_up(s, w.to(s.values.dtype) @ s.values[i, j * s.values.shape[1] // heads], j * h // heads)
        for s, w in zip(segments, weights, strict=True)
    ]
    return torch.stack(parts).sum(0)


def _scores(s: Segment, i: int, j: int, m: int) -> Tensor:
    shared = s.query.shape[2]  # query heads that meet one stored head
    return (s.keys[i, j // shared] @ s.query[i, j // shared, j % shared, m]).float()


def _bias(s: Segment, i: int, j: int) -> Tensor:
    if s.bias is None:
        return s.keys.new_zeros(s.keys.shape[2], dtype=torch.float32)
    return s.bias[i, j // s.query.shape[2]].float()


def _allowed(s: Segment, i: int, m: int) -> Tensor:
    if s.mask is None:
        return torch.ones(s.keys.shape[2], dtype=torch.bool, device=s.keys.device)
    return s.mask[i % s.mask.shape[0], m]


def _mapped_up(s: Segment, out: Tensor, j: int) -> Tensor:
    """The output of one segment in d channels, for KV head j."""
    return out if s.up is None else out @ s.up[j % s.up.shape[0]]


def ragged(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, scaling: float, softcap: float | None = None
) -> Part:
    """Attention over rows of different length.

    Row i of `query` sees the tokens from starts[i] to starts[i + 1].

    Args:
        query: (R, m, r), m queries for each of R rows.
        keys: (n, r), of all rows, one behind another.
        values: (n, v), the same.
        starts: (R + 1), int64.
        scaling: what scores are multiplied with.
        softcap: the soft cap of scaled scores, or None.

    Returns:
        (output (R, m, v), log-sum-exp of the scores (R, m)), both fp32; an empty row gives 0 and -inf.
    """
    out = query.new_zeros(*query.shape[:2], values.shape[-1], dtype=torch.float32)
    lse = query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
    for i, (start, stop) in enumerate(itertools.pairwise(starts.tolist())):
        if start < stop:
            scores = softcapped((query[i].float() @ keys[start:stop].float().mT) * scaling, softcap)
            out[i], lse[i] = scores.softmax(-1) @ values[start:stop].float(), scores.logsumexp(-1)
    return out, lse
