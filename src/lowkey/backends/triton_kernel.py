"""The kernels of `triton_gpu`, imported on first use.

First one program for each piece of a row and block of queries, then one for each row and query. What a step
of decoding changes is read from memory on the device, so that launches are the same at every step.
"""

# ruff: noqa: N803, N806 - what is fixed at compilation is upper case, as everywhere in Triton
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpacked(codes, BITS: tl.constexpr):
    """Bytes (X, W) as the codes (X, W * 8 / BITS) that they hold, the first in the lowest bits, in fp32."""
    if BITS == 8:
        return codes.to(tl.float32)
    elif BITS == 4:
        return tl.interleave((codes & 15).to(tl.float32), (codes >> 4).to(tl.float32))
    else:
        even = tl.interleave((codes & 3).to(tl.float32), ((codes >> 4) & 3).to(tl.float32))
        odd = tl.interleave(((codes >> 2) & 3).to(tl.float32), (codes >> 6).to(tl.float32))
        return tl.interleave(even, odd)


@triton.jit
def repeated(x, TIMES: tl.constexpr):
    """Every number of a tile (N, G) so many times in succession, (N, G TIMES), in fp32."""
    wide = tl.broadcast_to(x.to(tl.float32)[:, :, None], x.shape[0], x.shape[1], TIMES)
    return tl.reshape(wide, x.shape[0], x.shape[1] * TIMES)


@triton.jit
def by_token(
    place, lane, first, token, here, begin, width,
    BITS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A tile (N, C) of numbers of one row: in their own dtype, or in fp32 if they are codes.

    Args:
        place: where they lie, see `triton_gpu._place`.
        lane, first: the lane of the row, and its first token.
        token, here: (N), which tokens of the row, and which of them there are.
        begin: the first channel.
        width: channels that there are; the others are 0 but where a token has codes for them.
        BITS: of a code, 0 for plain numbers.
        GROUP: channels that share a scale, if they are a power of two and divide C; else 0.
        C: channels of the tile.
    """
    numbers, scale, low = place[0], place[1], place[2]
    at = lane * place[3] + (first + token) * place[4]
    channel = begin + tl.arange(0, C)
    there = here[:, None] & (channel < width)[None, :]
    if BITS == 0:
        return tl.load(numbers + at[:, None] + channel[None, :], mask=there, other=0.0)
    else:
        PER: tl.constexpr = 8 // BITS
        byte = begin // PER + tl.arange(0, C // PER)
        held = here[:, None] & (byte * PER < width)[None, :]
        codes = unpacked(tl.load(numbers + at[:, None] + byte[None, :], mask=held, other=0), BITS)
        shift = lane * place[6] + (first + token) * place[7]
        if GROUP:  # a tile of scales (N, groups), each of which is then repeated
            GROUPS: tl.constexpr = C // GROUP
            group = begin // GROUP + tl.arange(0, GROUPS)
            real = here[:, None] & (group * GROUP < width)[None, :]
            where = shift[:, None] + (group * place[8])[None, :]
            step = repeated(tl.load(scale + where, mask=real, other=0.0), GROUP)
            least = repeated(tl.load(low + where, mask=real, other=0.0), GROUP)
        else:
            group = (channel // place[9] * place[8])[None, :]
            step = tl.load(scale + shift[:, None] + group, mask=there, other=0.0).to(tl.float32)
            least = tl.load(low + shift[:, None] + group, mask=there, other=0.0).to(tl.float32)
        return codes * step + least


@triton.jit
def by_channel(
    place, lane, first, at, end, begin, width,
    BITS: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A tile (C, N) of codes in blocks of UNIT tokens, in which a channel's codes lie side by side, in fp32.

    Args:
        place: where they lie, see `triton_gpu._place`.
        lane, first: the lane of the row, and its first block.
        at: the first token, which begins a block.
        end: the token behind the row's last.
        begin: the first channel.
        width: channels that there are.
        BITS: of a code.
        UNIT: tokens of a block.
        C, N: channels and tokens of the tile, whole blocks.
    """
    numbers, scale, low = place[0], place[1], place[2]
    PER: tl.constexpr = 8 // BITS
    token = tl.arange(0, N // PER) * PER  # of each byte the first
    unit = first + (at + token) // UNIT
    channel = begin + tl.arange(0, C)
    byte = lane * place[3] + unit * place[4] + (token % UNIT) // PER
    held = (channel < width)[:, None] & (at + token < end)[None, :]
    where = byte[None, :] + (channel * place[5])[:, None]
    codes = unpacked(tl.load(numbers + where, mask=held, other=0), BITS)
    if N == UNIT:  # one scale for each channel
        shift = (lane * place[6] + (first + at // UNIT) * place[7] + channel * place[8])[:, None]
        there = (channel < width)[:, None]
    else:
        whole = tl.arange(0, N)
        of_token = lane * place[6] + (first + (at + whole) // UNIT) * place[7]
        shift = of_token[None, :] + (channel * place[8])[:, None]
        there = (channel < width)[:, None] & (at + whole < end)[None, :]
    step = tl.load(scale + shift, mask=there, other=0.0).to(tl.float32)
    return codes * step + tl.load(low + shift, mask=there, other=0.0).to(tl.float32)


@triton.jit
def product(a, b, like, EXACT: tl.constexpr):
    """The matrix product of two tiles, in fp32 if EXACT, else in the dtype of `like`."""
    if EXACT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")
    else:
        return tl.dot(a.to(like.dtype), b.to(like.dtype))


@triton.jit
def rotated(
    place, lane, first, token, here, end, at, width, up, mean, columns,
    positions, coarse, fine, like,
    BITS: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr, EXACT: tl.constexpr,
    HAS_MEAN: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, STRIDE: tl.constexpr,
    C: tl.constexpr, H: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Keys that are rebuilt from their latents and rotated at their positions, N tokens at a time.

    The cosine and sine of a position are those of the multiple of STRIDE below it and of what remains, added
    as angles, rounded as the model rounds them.

    Args:
        place, lane, first, token, here, end, at, width: of latents, as for `by_token` and `by_channel`.
        up: the map of this head, (width, 2 PAIRS + REST).
        columns: the step from one row of the map to the next.
        mean: what is added to keys before they are rotated, if HAS_MEAN.
        positions: of the row's tokens.
        coarse: cosines and sines (n, 2, PAIRS) of the multiples of STRIDE.
        fine: cosines and sines (STRIDE, 2, PAIRS) of the positions below it.
        like: a tile of the dtype of products.
        PAIRS, REST: channels that are rotated as pairs, and those behind them that are not.
        C: latent channels that are read at a time.
        H, E: PAIRS and REST, padded; E = 0 for none.

    Returns:
        Tiles of the first and the second halves (N, H) of what is rotated, and of the rest (N, max(E, 16)).
    """
    pair, rest = tl.arange(0, H), tl.arange(0, E if E else 16)
    first_half, second_half = tl.zeros([N, H], tl.float32), tl.zeros([N, H], tl.float32)
    others = tl.zeros([N, E if E else 16], tl.float32)
    for begin in range(0, width, C):
        if UNIT == 1:
            latent = by_token(place, lane, first, token, here, begin, width, BITS, GROUP, C)
        else:
            latent = tl.trans(by_channel(place, lane, first, at, end, begin, width, BITS, UNIT, C, N))
        channel = begin + tl.arange(0, C)
        row, there = (up + channel * columns)[:, None], (channel < width)[:, None]
        of_pair = there & (pair < PAIRS)[None, :]
        first_half += product(latent, tl.load(row + pair[None, :], mask=of_pair, other=0.0), like, EXACT)
        second = tl.load(row + (PAIRS + pair)[None, :], mask=of_pair, other=0.0)
        second_half += product(latent, second, like, EXACT)
        if E:
            unrotated = tl.load(
                row + (2 * PAIRS + rest)[None, :], mask=there & (rest < REST)[None, :], other=0.0
            )
            others += product(latent, unrotated, like, EXACT)
    if HAS_MEAN:
        first_half += tl.load(mean + pair, mask=pair < PAIRS, other=0.0).to(tl.float32)[None, :]
        second_half += tl.load(mean + PAIRS + pair, mask=pair < PAIRS, other=0.0).to(tl.float32)[None, :]
        if E:
            others += tl.load(mean + 2 * PAIRS + rest, mask=rest < REST, other=0.0).to(tl.float32)[None, :]
    position = tl.load(positions + token, mask=here, other=0)
    seen = here[:, None] & (pair < PAIRS)[None, :]
    of_coarse = coarse + (position // STRIDE * (2 * PAIRS))[:, None] + pair[None, :]
    of_fine = fine + (position % STRIDE * (2 * PAIRS))[:, None] + pair[None, :]
    a, b = tl.load(of_coarse, mask=seen, other=0.0), tl.load(of_coarse + PAIRS, mask=seen, other=0.0)
    c, d = tl.load(of_fine, mask=seen, other=0.0), tl.load(of_fine + PAIRS, mask=seen, other=0.0)
    cos, sin = (a * c - b * d).to(like.dtype).to(tl.float32), (b * c + a * d).to(like.dtype).to(tl.float32)
    return first_half * cos - second_half * sin, second_half * cos + first_half * sin, others


# numbers that no address is made of, so that their values make no further kernels
@triton.jit(do_not_specialize=["first_of_segment", "rows", "m", "of_step", "share", "mask_queries"])
def attend(
    query, first_piece, row_of, places, clock, mask, parts, lses,
    keys, values, rotation,
    scaling, cap, first_of_segment, size, rows, m, r, v, width, of_step, asked_width,
    share, mask_queries, mask_stride,
    K_BITS: tl.constexpr, K_UNIT: tl.constexpr, K_GROUP: tl.constexpr,
    V_BITS: tl.constexpr, V_UNIT: tl.constexpr, V_GROUP: tl.constexpr,
    CAPPED: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
    ROTATED: tl.constexpr, HAS_MEAN: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    STRIDE: tl.constexpr, C: tl.constexpr, H: tl.constexpr, E: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """One piece, at most `size` tokens of one row of a segment, for M queries.

    Args:
        query: (rows, m, r), the columns that meet these keys, with a step of `asked_width` numbers between
            queries.
        first_piece: (rows + 1), the number of each row's first piece.
        row_of: (pieces of all segments), the row of each piece, -1 for none.
        places: (steps, segments, 6, rows), from this segment on: at each step the lane and the first unit of
            each row's keys and of its values, its tokens, and how many first ones are not seen.
        clock: (1), which step this is.
        mask: (rows / share, mask_queries, mask_stride) in bytes, read if MASKED.
        parts, lses: results, (pieces of all segments, m, v) and (pieces of all segments, m), with a step of
            `width` numbers between parts.
        keys, values: where they lie, see `triton_gpu._place`.
        rotation: of keys that are rebuilt here, if ROTATED; see `triton_gpu._rotation`.
        scaling, cap: of scores; the soft cap counts if CAPPED.
        first_of_segment: the number of this segment's first piece.
        r, v: channels of stored keys and of stored values; if ROTATED, r is that of latents.
        of_step: from one step to the next in `places`; 0 if all are alike.
        EXACT: form products in fp32.
        M, N, R, V: tile sizes, of queries, tokens, key channels and value channels.

    What is not named here is as for `rotated`.
    """
    piece = tl.program_id(0).to(tl.int64) + first_of_segment
    row = tl.load(row_of + piece)
    if row < 0:  # there are fewer pieces than programs
        return
    # the first token of this piece, and the end of the piece or of the row
    begin = (piece - tl.load(first_piece + row)) * size
    place = places + tl.load(clock) * of_step + row
    key_lane, key_first = tl.load(place), tl.load(place + rows)
    value_lane, value_first = tl.load(place + 2 * rows), tl.load(place + 3 * rows)
    end = tl.minimum(begin + size, tl.load(place + 4 * rows))
    hidden = tl.load(place + 5 * rows)
    # indices of queries, value channels and tokens of a tile
    i, y, j = tl.program_id(1) * M + tl.arange(0, M), tl.arange(0, V), tl.arange(0, N)
    if ROTATED:
        # columns of a query: those that are rotated as pairs, and those that are not
        pair, rest = tl.arange(0, H), tl.arange(0, E if E else 16)
        own = query + ((row * m + i) * asked_width)[:, None]
        asked = (i[:, None] < m) & (pair < PAIRS)[None, :]
        q = tl.load(own + pair[None, :], mask=asked, other=0.0)
        q_second = tl.load(own + (PAIRS + pair)[None, :], mask=asked, other=0.0)
        q_rest = tl.load(
            own + (2 * PAIRS + rest)[None, :], mask=(i[:, None] < m) & (rest < REST)[None, :], other=0.0
        )
        up, mean, positions, firsts, coarse, fine = rotation[:6]
        head = row % rotation[6]
        own_up, own_mean, columns = up + head * rotation[7], mean + head * rotation[9], rotation[8]
        own_positions = positions + tl.load(firsts + row)
    else:
        x = tl.arange(0, R)
        q = tl.load(
            query + ((row * m + i) * asked_width)[:, None] + x[None, :],
            mask=(i[:, None] < m) & (x < r)[None, :],
            other=0.0,
        )
    # the largest score so far, and the sums of weights and of weighted values relative to it
    top, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    out = tl.zeros([M, V], tl.float32)
    for at in range(begin, end, N):
        token = at + j
        here = token < end
        if ROTATED:
            k, k_second, k_rest = rotated(
                keys, key_lane, key_first, token, here, end, at, r, own_up, own_mean, columns,
                own_positions, coarse, fine, q,
                K_BITS, K_UNIT, K_GROUP, EXACT, HAS_MEAN, PAIRS, REST, STRIDE, C, H, E, N,
            )  # fmt: skip
            dots = product(q, tl.trans(k), q, EXACT) + product(q_second, tl.trans(k_second), q, EXACT)
            if E:
                dots += product(q_rest, tl.trans(k_rest), q, EXACT)
        elif K_UNIT == 1:
            k = by_token(keys, key_lane, key_first, token, here, 0, r, K_BITS, K_GROUP, R)
            dots = product(q, tl.trans(k), q, EXACT)
        else:
            k = by_channel(keys, key_lane, key_first, at, end, 0, r, K_BITS, K_UNIT, R, N)
            dots = product(q, k, q, EXACT)
        scores = dots * scaling
        if CAPPED:
            scores = cap * (2.0 * tl.sigmoid(2.0 * scores / cap) - 1.0)  # cap tanh(scores / cap)
        seen = here[None, :] & (token >= hidden)[None, :] & (i[:, None] < m)
        if MASKED:
            of_query = mask + ((row // share) * mask_queries + i % mask_queries) * mask_stride
            seen = seen & (tl.load(of_query[:, None] + token[None, :], mask=seen, other=0) != 0)
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        # a larger score has come: what was summed so far shrinks; 0 stands for -inf while nothing is seen
        relative = tl.where(new == float("-inf"), 0.0, new)
        weights, shrink = tl.exp(scores - relative[:, None]), tl.exp(top - relative)
        if V_UNIT == 1:
            w = by_token(values, value_lane, value_first, token, here, 0, v, V_BITS, V_GROUP, V)
        else:
            w = tl.trans(by_channel(values, value_lane, value_first, at, end, 0, v, V_BITS, V_UNIT, V, N))
        out = out * shrink[:, None] + product(weights, w, q, EXACT)
        top, total = new, total * shrink + tl.sum(weights, 1)
    of_part, some = piece * m + i, total > 0
    there = (i[:, None] < m) & (y < v)[None, :]
    whole = tl.where(some, total, 1.0)
    tl.store(parts + (of_part * width)[:, None] + y[None, :], out / whole[:, None], mask=there)
    tl.store(lses + of_part, tl.where(some, top + tl.log(whole), float("-inf")), mask=i < m)


@triton.jit(do_not_specialize=["segments", "rows", "m"])
def merge(
    parts, lses, first_piece, in_model_basis, bias, shifts, out_0, out_1, share, lse,
    scaling, segments, rows, m, width, width_0, width_1,
    BIASED: tl.constexpr, SHIFTED: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Merge the pieces of a row over all segments for one query.

    A row without pieces, and a query that sees nothing, give 0 and -inf.

    Args:
        parts, lses, first_piece: as `attend` has them; first_piece of all segments, (segments, rows + 1).
        in_model_basis: (segments), 0 where queries and outputs are in the basis of latents, else 1.
        bias: (rows, m), times `scaling` added to the scores of latents, if BIASED.
        shifts: (segments, rows), added to the scores of each row of a segment, if SHIFTED.
        out_0, out_1: results (rows, m, width_0) over latents and (rows, m, width_1) over all other tokens.
        share: the sums of the weights of latents, (rows, m).
        lse: the log-sum-exp of all scores, (rows, m).
        B, W: tile sizes, of pieces and channels.
    """
    row, i, y = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, W)
    place = row * m + i
    top, total = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    of_latents = tl.zeros([1], tl.float32)
    sum_0, sum_1 = tl.zeros([W], tl.float32), tl.zeros([W], tl.float32)
    for s in range(0, segments):
        first = first_piece + s * (rows + 1) + row
        begin, end = tl.load(first), tl.load(first + 1)
        is_latent = tl.load(in_model_basis + s) == 0
        shift = 0.0
        if BIASED:
            shift = tl.where(is_latent, tl.load(bias + place).to(tl.float32) * scaling, 0.0)
        if SHIFTED:
            shift += tl.load(shifts + s * rows + row)
        own = tl.where(is_latent, width_0, width_1)
        for at in range(begin, end, B):
            piece = at + tl.arange(0, B)
            there = piece < end
            found = tl.load(lses + piece * m + i, mask=there, other=float("-inf")) + shift
            new = tl.maximum(top, tl.max(found, 0))
            relative = tl.where(new == float("-inf"), 0.0, new)
            shrink, weights = tl.exp(top - relative), tl.exp(found - relative)
            held = there[:, None] & (y < own)[None, :]
            tile = tl.load(parts + ((piece * m + i) * width)[:, None] + y[None, :], mask=held, other=0.0)
            # parts of pieces that see nothing are 0
            mixed, weight = tl.sum(weights[:, None] * tile, 0), tl.sum(weights, 0)
            sum_0 = sum_0 * shrink + tl.where(is_latent, mixed, 0.0)
            sum_1 = sum_1 * shrink + tl.where(is_latent, 0.0, mixed)
            of_latents = of_latents * shrink + tl.where(is_latent, weight, 0.0)
            top, total = new, total * shrink + weight
    some, one = total > 0, tl.zeros([1], tl.int32)
    whole = tl.where(some, total, 1.0)
    tl.store(out_0 + place * width_0 + y, sum_0 / whole, mask=y < width_0)
    tl.store(out_1 + place * width_1 + y, sum_1 / whole, mask=y < width_1)
    tl.store(share + place + one, of_latents / whole)
    tl.store(lse + place + one, tl.where(some, top + tl.log(whole), float("-inf")))
