"""The kernels of `triton_gpu`, imported on first use.

First one program for each piece of a row and block of queries, then one for each row and query.
"""

# ruff: noqa: N803 - what is fixed at compilation is upper case, as everywhere in Triton
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend(
    query, keys, values, starts, first, row_of, parts, lses,
    scaling, cap, size, m, r, v, key_stride, value_stride,
    CAPPED: tl.constexpr, EXACT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """One piece, at most `size` tokens of one row, for M queries.

    Args:
        query: (rows, m, r), contiguous.
        keys, values: (n, r) and (n, v), with rows `key_stride` and `value_stride` numbers apart.
        starts: (rows + 1), where each row begins.
        first: (rows + 1), the number of each row's first piece.
        row_of: (programs), the row of each piece, -1 for none.
        parts, lses: results, (pieces, m, v) and (pieces, m).
        scaling, cap: of scores; the soft cap counts if CAPPED.
        EXACT: form products in fp32.
        M, N, R, V: tile sizes, of queries, tokens, key channels and value channels.
    """
    piece = tl.program_id(0).to(tl.int64)
    row = tl.load(row_of + piece)
    if row < 0:  # there are fewer pieces than programs
        return
    # the first token of this piece, and the end of the piece or of the row
    begin = tl.load(starts + row) + (piece - tl.load(first + row)) * size
    end = tl.minimum(begin + size, tl.load(starts + row + 1))
    # indices of queries, key channels, value channels and tokens of a tile
    i, x, y, j = tl.program_id(1) * M + tl.arange(0, M), tl.arange(0, R), tl.arange(0, V), tl.arange(0, N)
    q = tl.load(
        query + (row * m + i[:, None]) * r + x[None, :], mask=(i[:, None] < m) & (x[None, :] < r), other=0.0
    )
    # the largest score so far, and the sums of weights and of weighted values relative to it
    top, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    out = tl.zeros([M, V], tl.float32)
    for at in range(begin, end, N):
        token = at + j
        here = token < end
        k = tl.load(
            keys + token[None, :] * key_stride + x[:, None], mask=here[None, :] & (x[:, None] < r), other=0.0
        )
        scores = (
            tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision="ieee") if EXACT else tl.dot(q, k)
        ) * scaling
        if CAPPED:
            scores = cap * (2.0 * tl.sigmoid(2.0 * scores / cap) - 1.0)  # cap tanh(scores / cap)
        scores = tl.where(here[None, :], scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        # a larger score has come: what was summed so far shrinks
        weights, shrink = tl.exp(scores - new[:, None]), tl.exp(top - new)
        w = tl.load(
            values + token[:, None] * value_stride + y[None, :],
            mask=here[:, None] & (y[None, :] < v),
            other=0.0,
        )
        mixed = (
            tl.dot(weights, w.to(tl.float32), input_precision="ieee")
            if EXACT
            else tl.dot(weights.to(w.dtype), w)
        )
        out = out * shrink[:, None] + mixed
        top, total = new, total * shrink + tl.sum(weights, 1)
    place = piece * m + i
    tl.store(
        parts + place[:, None] * v + y[None, :],
        out / total[:, None],
        mask=(i[:, None] < m) & (y[None, :] < v),
    )
    tl.store(lses + place, top + tl.log(total), mask=i < m)


@triton.jit
def merge(parts, lses, first, out, lse, m, v, V: tl.constexpr):
    """Merge the pieces of a row for one query, into out (rows, m, v) and lse (rows, m).

    A row without pieces gives 0 and -inf.
    """
    row, i, y = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, V)
    begin, end = tl.load(first + row), tl.load(first + row + 1)
    top, total, whole = (
        tl.full([1], float("-inf"), tl.float32),
        tl.zeros([1], tl.float32),
        tl.zeros([V], tl.float32),
    )
    for piece in range(begin, end):
        piece_lse = tl.load(lses + piece * m + i + tl.zeros([1], tl.int32))
        new = tl.maximum(top, piece_lse)
        shrink, weight = tl.exp(top - new), tl.exp(piece_lse - new)
        whole = whole * shrink + weight * tl.load(parts + (piece * m + i) * v + y, mask=y < v, other=0.0)
        top, total = new, total * shrink + weight
    place = row * m + i
    tl.store(out + place * v + y, whole / tl.where(total > 0, total, 1.0), mask=y < v)
    tl.store(lse + place + tl.zeros([1], tl.int32), top + tl.log(total))
