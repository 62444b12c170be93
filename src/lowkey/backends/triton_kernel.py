"""The kernels of `triton_gpu`, imported on first use.

First one program for each piece of a row and block of queries, then one for each row and query.
"""

# ruff: noqa: N803 - what is fixed at compilation is upper case, as everywhere in Triton
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decoded(
    numbers, scale, low, lane, first, token, channel, here,
    lane_stride, stride, channel_stride, scale_lane, scale_stride, scale_channel, size,
    BITS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A tile of stored numbers of one row: in their own dtype, or in fp32 if they are codes.

    Args:
        numbers, scale, low: where they lie; see `stored.Stored`.
        lane, first: the lane of the row, and its first unit.
        token, channel: which tokens of the row and which channels, tiles that can be broadcast.
        here: which entries of the tile there are.
        lane_stride, stride, channel_stride: of `numbers`, from lane to lane, unit to unit, and channel to
            channel.
        scale_lane, scale_stride, scale_channel: of `scale` and `low`, likewise.
        size: channels of a group, where scales belong to a token.
        BITS: of a code, 0 for plain numbers.
        UNIT: tokens of a unit; more than 1 if scales belong to a channel.
    """
    unit = first + token // UNIT
    at = numbers + lane * lane_stride + unit * stride
    if BITS == 0:
        return tl.load(at + channel, mask=here, other=0.0)
    if UNIT == 1:
        place, group = channel * BITS, channel // size
    else:
        at, place, group = at + channel * channel_stride, (token % UNIT) * BITS, channel
    code = (tl.load(at + place // 8, mask=here, other=0).to(tl.int32) >> (place % 8)) & ((1 << BITS) - 1)
    shift = lane * scale_lane + unit * scale_stride + group * scale_channel
    step = tl.load(scale + shift, mask=here, other=0.0).to(tl.float32)
    return code.to(tl.float32) * step + tl.load(low + shift, mask=here, other=0.0).to(tl.float32)


@triton.jit
def product(a, b, like, EXACT: tl.constexpr):
    """The matrix product of two tiles, in fp32 if EXACT, else in the dtype of `like`."""
    if EXACT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a.to(like.dtype), b.to(like.dtype))


@triton.jit
def attend(
    query, lengths, first_piece, row_of, places, mask, parts, lses,
    k_numbers, k_scale, k_low, k_lane, k_stride, k_channel, k_scale_lane, k_scale_stride, k_scale_channel,
    k_size,
    v_numbers, v_scale, v_low, v_lane, v_stride, v_channel, v_scale_lane, v_scale_stride, v_scale_channel,
    v_size,
    scaling, cap, size, rows, m, r, v, share, mask_queries, mask_stride,
    K_BITS: tl.constexpr, K_UNIT: tl.constexpr, V_BITS: tl.constexpr, V_UNIT: tl.constexpr,
    CAPPED: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """One piece, at most `size` tokens of one row, for M queries.

    Args:
        query: (rows, m, r), contiguous.
        lengths: (rows), the tokens of each row.
        first_piece: (rows + 1), the number of each row's first piece.
        row_of: (programs), the row of each piece, -1 for none.
        places: (4, rows), the lane and the first unit of each row's keys, and of its values.
        mask: (rows / share, mask_queries, mask_stride) in bytes, read if MASKED.
        parts, lses: results, (pieces, m, v) and (pieces, m).
        k_..., v_...: keys and values, as `decoded` takes them.
        scaling, cap: of scores; the soft cap counts if CAPPED.
        EXACT: form products in fp32.
        M, N, R, V: tile sizes, of queries, tokens, key channels and value channels.
    """
    piece = tl.program_id(0).to(tl.int64)
    row = tl.load(row_of + piece)
    if row < 0:  # there are fewer pieces than programs
        return
    # the first token of this piece, and the end of the piece or of the row
    begin = (piece - tl.load(first_piece + row)) * size
    end = tl.minimum(begin + size, tl.load(lengths + row))
    key_lane, key_first = tl.load(places + row), tl.load(places + rows + row)
    value_lane, value_first = tl.load(places + 2 * rows + row), tl.load(places + 3 * rows + row)
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
        k = decoded(
            k_numbers, k_scale, k_low, key_lane, key_first, token[None, :], x[:, None],
            here[None, :] & (x[:, None] < r),
            k_lane, k_stride, k_channel, k_scale_lane, k_scale_stride, k_scale_channel, k_size,
            K_BITS, K_UNIT,
        )  # fmt: skip
        scores = product(q, k, q, EXACT) * scaling
        if CAPPED:
            scores = cap * (2.0 * tl.sigmoid(2.0 * scores / cap) - 1.0)  # cap tanh(scores / cap)
        seen = here[None, :] & (i[:, None] < m)
        if MASKED:
            of_query = mask + ((row // share) * mask_queries + i[:, None] % mask_queries) * mask_stride
            seen = seen & (tl.load(of_query + token[None, :], mask=seen, other=0) != 0)
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        # a larger score has come: what was summed so far shrinks; 0 stands for -inf while nothing is seen
        relative = tl.where(new == float("-inf"), 0.0, new)
        weights, shrink = tl.exp(scores - relative[:, None]), tl.exp(top - relative)
        w = decoded(
            v_numbers, v_scale, v_low, value_lane, value_first, token[:, None], y[None, :],
            here[:, None] & (y[None, :] < v),
            v_lane, v_stride, v_channel, v_scale_lane, v_scale_stride, v_scale_channel, v_size,
            V_BITS, V_UNIT,
        )  # fmt: skip
        out = out * shrink[:, None] + product(weights, w, q, EXACT)
        top, total = new, total * shrink + tl.sum(weights, 1)
    place = piece * m + i
    mean, there = out / tl.where(total > 0, total, 1.0)[:, None], (i[:, None] < m) & (y[None, :] < v)
    tl.store(parts + place[:, None] * v + y[None, :], mean, mask=there)
    tl.store(lses + place, top + tl.log(total), mask=i < m)


@triton.jit
def merge(parts, lses, first_piece, out, lse, m, v, V: tl.constexpr):
    """Merge the pieces of a row for one query, into out (rows, m, v) and lse (rows, m).

    A row without pieces, and a query that sees nothing, give 0 and -inf.
    """
    row, i, y = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, V)
    begin, end = tl.load(first_piece + row), tl.load(first_piece + row + 1)
    top, total, whole = (
        tl.full([1], float("-inf"), tl.float32),
        tl.zeros([1], tl.float32),
        tl.zeros([V], tl.float32),
    )
    for piece in range(begin, end):
        piece_lse = tl.load(lses + piece * m + i + tl.zeros([1], tl.int32))
        new = tl.maximum(top, piece_lse)
        relative = tl.where(new == float("-inf"), 0.0, new)
        shrink, weight = tl.exp(top - relative), tl.exp(piece_lse - relative)
        whole = whole * shrink + weight * tl.load(parts + (piece * m + i) * v + y, mask=y < v, other=0.0)
        top, total = new, total * shrink + weight
    place = row * m + i
    tl.store(out + place * v + y, whole / tl.where(total > 0, total, 1.0), mask=y < v)
    tl.store(lse + place + tl.zeros([1], tl.int32), top + tl.log(total))
