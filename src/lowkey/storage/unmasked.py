"""Attention of a long chunk of new tokens that is neither padded nor masked, in parts that need no mask.

A query sees the newest tokens up to its own exactly, and older ones as they are stored. So the queries of a
chunk meet three parts: stored tokens that all of them see, stored tokens that leave their window one after
another, and a band of exact tokens. Each part is one call of a fused kernel, and the parts are merged by
their log-sum-exp. Masks of queries by tokens took up to a third of a prompt's time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowkey.backends import fused
from lowkey.backends.segment import Part, Segment, merge_seen

BAND = 64  # queries whose windows are read together; more of them read more tokens that they do not see


def attend_by_age(
    far: Segment,
    query: Tensor,
    exact: tuple[Tensor, Tensor],
    tokens: int,
    recent: int,
    block: int,
    scaling: float,
) -> Part:
    """Attention of the newest tokens over dense ones, each in the form that its age gives it.

    Args:
        far: the tokens that are stored, from the first on, with the queries that meet them.
        query: (b, h, g, t, d), of the newest tokens.
        exact: keys and values (b, h, n, d) of the newest n tokens: of those that came with the queries, and
            of those that were exact before.
        tokens: how many there are.
        recent: each query sees so many of the newest tokens up to its own exactly.
        block: and older ones until a block of so many is full.
        scaling: what scores are multiplied with.

    Returns:
        The output (b, h, g, t, d) and its log-sum-exp (b, h, g, t).
    """
    h, t = query.shape[1], query.shape[3]
    width = recent + block - 1  # what is older is stored in any case
    parts = [_band(far, query, exact, tokens, recent, block, scaling)] if width else []
    # tokens that the first query sees as they are stored; if negative, so many queries see none
    before = tokens - t - width
    if t + before > 0:
        queries = far.query[..., max(0, -before) :, :]
        keys, values = (x[:, :, : t + before] for x in (far.keys, far.values))
        stored = fused.causal_newest(queries, keys, values, scaling)
        out, lse = (x.flatten(1, 2).unflatten(1, (h, -1)) for x in stored)
        parts.append((out if far.up is None else out @ far.up.unsqueeze(1).to(out.dtype), lse))
    return parts[0] if len(parts) == 1 else _merged_for_newest(*parts)


def _band(
    far: Segment,
    query: Tensor,
    exact: tuple[Tensor, Tensor],
    tokens: int,
    recent: int,
    block: int,
    scaling: float,
) -> Part:
    """Attention over the newest `recent + block - 1` tokens of each query; arguments are `attend_by_age`'s.

    Where tokens are stored in blocks, the queries that are read together are those between two moments at
    which a block is stored. So the first `block - 1` of the tokens that they see are stored, and the others
    are exact.
    """
    t, width = query.shape[3], recent + block - 1
    size = block if block > 1 else min(BAND, t)
    skipped = (tokens - t + 1 - recent) % block  # places of the first block of queries before the first query
    blocks = -(-(skipped + t) // size)
    start = tokens - t - skipped - width + 1  # of the tokens that the first block of queries sees
    stop = start + blocks * size + width - 1

    def windows(x: Tensor, first: int) -> Tensor:
        """(b, h, blocks, size + width - 1, d), of tokens x (b, h, n, d) that begin at `first`."""
        padded = pad(x, (0, 0, first - start, stop - first - x.shape[2]))
        return padded.unfold(2, size + width - 1, size).mT

    seen = [windows(x, tokens - x.shape[2]) for x in exact]
    if block > 1:
        stored = (windows(x, 0)[..., : block - 1, :] for x in (far.keys, far.values))
        seen = [torch.cat([old, new[..., block - 1 :, :]], 3) for old, new in zip(stored, seen, strict=True)]
    padded = pad(query, (0, 0, skipped, blocks * size - skipped - t))
    out, lse = fused.banded(padded, seen[0], seen[1], width, size, max(0, -start), scaling)
    return out[..., skipped : skipped + t, :], lse[..., skipped : skipped + t]


def attend_to_repetition(
    query: Tensor, keys: Tensor, values: Tensor, span: tuple[int, int], scaling: float
) -> tuple[Part, Tensor]:
    """Attention of tokens that repeat a span of those before them.

    Args:
        query: (b, h, g, t, d).
        keys: (b, h, s, d), of all tokens; the newest t are those of the queries.
        values: (b, h, s, d).
        span: the first token that is repeated, and the one behind the last.
        scaling: what scores are multiplied with.

    Returns:
        Attention over all tokens, and the log-sum-exp (b, h, g, t) over the span and the repetition alone.
    """
    start = keys.shape[2] - query.shape[3]
    spans = [(a, min(b, start)) for a, b in (span, (0, span[0]), (span[1], start))]
    inside, *outside = [(keys[:, :, a:b], values[:, :, a:b]) for a, b in spans if b > a]
    part = merge_seen(
        fused.causal(query, keys[:, :, start:], values[:, :, start:], scaling),
        fused.rectangle(query, *inside, scaling),
    )
    lse = part[1]
    for some in outside:
        part = merge_seen(part, fused.rectangle(query, *some, scaling))
    return part, lse


def _merged_for_newest(part: Part, newest: Part) -> Part:
    """A part (b, h, g, t, ...) merged with one that is of the newest queries alone."""
    older = part[1].shape[3] - newest[1].shape[3]
    out, lse = merge_seen((part[0][..., older:, :], part[1][..., older:]), newest)
    if not older:
        return out, lse
    return torch.cat([part[0][..., :older, :].to(out.dtype), out], 3), torch.cat(
        [part[1][..., :older], lse], 3
    )
