"""The compiled half of `numba_cpu`, imported on first use.

Rows are cut into pieces, which threads take in turn, and the pieces of each row are merged. A piece is at
most LARGEST_PIECE tokens of one row. It forms all its scores, their softmax, and then reads its values, so
memory is read in long runs. What depends on layout keys or values are stored is one small C function for each
kind and group of queries; the rest is compiled once.

Softmax is taken with powers of 2: scores arrive in units of ln 2. M is the number of queries of a row, filled
up to a multiple of g; r' and v' are widths filled up to whole vectors. A *place* is what `numba_cpu` says of
stored keys or values: addresses of numbers, scales and offsets; bytes from lane to lane of numbers and of
scales, from unit to unit, and from channel to channel; groups, channels of a group, and tokens of a unit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import prange, types

from lowkey.backends.numba_cache import kept_cfunc, kept_njit
from lowkey.backends.numba_channels import CHANNEL_BLOCK, mix_channels, score_channels
from lowkey.backends.numba_ir import LANES, LOWEST
from lowkey.backends.numba_vectors import add, call, fill_memory, finish_scores, level, mix, score, weigh

# tokens of a piece, and the pieces that the tokens of a call are cut into, about and at least
SMALLEST_PIECE, LARGEST_PIECE, LEAST_PIECES = 64, 1024, 32
LN2_FP32, NOT_THERE = np.float32(0.6931471805599453), np.float32(LOWEST)
compiled = kept_njit(nogil=True)


@cache
def scorer(g: int, kind: str) -> Any:
    """A C function that writes the dot products of g queries with `left` tokens of one row.

    Args:
        g: queries that share one reading of the keys.
        kind: layout keys are stored; see `numba_vectors` and `numba_channels`.

    Returns:
        The function. It takes addresses and strides in bytes, of numbers and of scales.
    """
    per = LANES // g

    if kind.startswith("channel"):

        @kept_cfunc(types.void(*[types.int64] * 12))
        def by_block(
            query, numbers, scale, low, stride, scales, channel, scale_channel, groups, size, left, out
        ):
            for i in range((left + CHANNEL_BLOCK - 1) // CHANNEL_BLOCK):
                at, shift = numbers + i * stride, i * scales
                to = out + 4 * g * CHANNEL_BLOCK * i
                score_channels(
                    g, kind, query, at, scale + shift, low + shift, channel, scale_channel, size, to
                )

        return by_block

    @kept_cfunc(types.void(*[types.int64] * 12))
    def by_token(query, numbers, scale, low, stride, scales, channel, scale_channel, groups, size, left, out):
        for i in range((left + per - 1) // per):
            at, shift = numbers + i * per * stride, i * per * scales
            to = out + 4 * LANES * i
            score(
                g,
                kind,
                query,
                at,
                scale + shift,
                low + shift,
                stride,
                scales,
                groups,
                size,
                left - i * per,
                to,
            )

    return by_token


@cache
def softener(g: int) -> Any:
    """A C function that turns dot products into weights.

    Args:
        g: queries of a step.

    Returns:
        The function. `top` gets each query's largest score, and `total` the sum of its weights.
    """
    per = LANES // g

    @kept_cfunc(types.void(types.float32, *[types.int64] * 6))
    def soften(cap, masks, steps, left, scores, top, total):
        fill_memory(top, LOWEST)
        fill_memory(total, 0.0)
        for i in range(steps):
            finish_scores(g, cap, masks, i * per, left - i * per, scores + 4 * LANES * i, top)
        level(g, top)
        for i in range(steps):
            weigh(scores + 4 * LANES * i, top, total)

    return soften


@cache
def mixer(g: int, kind: str) -> Any:
    """A C function that adds the weighted values of `left` tokens of one row to `out`; see `scorer`."""
    per = LANES // g

    if kind.startswith("channel"):

        @kept_cfunc(types.void(*[types.int64] * 12))
        def by_block(
            weights, numbers, scale, low, stride, scales, channel, scale_channel, groups, size, left, out
        ):
            for i in range((left + CHANNEL_BLOCK - 1) // CHANNEL_BLOCK):
                at, shift = numbers + i * stride, i * scales
                own = weights + 4 * g * CHANNEL_BLOCK * i
                mix_channels(g, kind, own, at, scale + shift, low + shift, channel, scale_channel, size, out)

        return by_block

    @kept_cfunc(types.void(*[types.int64] * 12))
    def by_token(
        weights, numbers, scale, low, stride, scales, channel, scale_channel, groups, size, left, out
    ):
        for i in range((left + per - 1) // per):
            at, shift = numbers + i * per * stride, i * per * scales
            own = weights + 4 * LANES * i
            mix(
                g,
                kind,
                own,
                at,
                scale + shift,
                low + shift,
                stride,
                scales,
                groups,
                size,
                left - i * per,
                out,
            )

    return by_token


@compiled
def _at(numbers, index):
    """The address of the number at this index of a contiguous array."""
    return np.int64(numbers.ctypes.data) + numbers.itemsize * index


@compiled
def _row(place, lane, first, token):
    """What a C function is told of a row from this token on: addresses, strides and shape."""
    unit = first + token // place[11]
    at, shift = lane * place[3] + unit * place[5], lane * place[4] + unit * place[6]
    strides_and_shape = place[5], place[6], place[7], place[8], place[9], place[10]
    return place[0] + at, place[1] + shift, place[2] + shift, *strides_and_shape


@compiled
def _attend(functions, g, cap, query, keys, values, masks, left, steps, scores, part):
    """Attend to one piece of `left` tokens with all queries (M, r') of its row.

    The results go to `part`: (out (M, v'), top (M), total (M)).
    """
    out, tops, totals = part
    top, total, n = scores[0], scores[1], LANES // g
    for i in range(len(out)):
        for x in range(out.shape[1]):
            out[i, x] = 0.0
    at = _at(scores, 2 * LANES)
    for i in range(0, len(query), g):  # g queries share one reading of the keys
        call(functions[0], (_at(query, i * query.shape[1]), *keys, left, at))
        seen = _at(masks, i) if len(masks) else np.int64(0)
        call(functions[1], (cap, seen, steps, left, at, _at(top, 0), _at(total, 0)))
        call(functions[2], (at, *values, left, _at(out, i * out.shape[1])))
        for j in range(g):
            tops[i + j], totals[i + j] = top[j * n], 0.0
            for lane in range(j * n, (j + 1) * n):
                totals[i + j] += total[lane]


@compiled
def _merge(parts, tops, totals, slots, out, lse):
    """Merge the pieces of a row, parts (p, M, v'), tops and totals (p, M), into out (M, v) and lse (M).

    A query that sees nothing gives 0 and -inf. `slots` says which column each of the v' numbers is.
    """
    for i in range(len(out)):
        top, total = NOT_THERE, np.float32(0.0)
        for p in range(len(parts)):
            top = max(top, tops[p, i])
        if top <= NOT_THERE:
            out[i], lse[i] = 0.0, -np.inf
            continue
        for p in range(len(parts)):
            # each piece counts relative to the largest score of all
            weight = np.exp2(tops[p, i] - top)
            total += weight * totals[p, i]
            for x in range(parts.shape[2]):
                parts[0, i, x] = weight * parts[p, i, x] + (parts[0, i, x] if p else np.float32(0.0))
        lse[i] = (top + np.log2(total)) * LN2_FP32
        for x in range(len(slots)):
            if slots[x] >= 0:
                out[i, slots[x]] = parts[0, i, x] / total


@compiled
def _packed(query, scale, g, slots):
    """Queries (R, m, r), times scale, as vectors of LANES: (R, M, r'); 0 for queries past m.

    `slots` says which column each of the r' numbers is, -1 for none: no column may count twice.
    """
    packed = np.zeros((query.shape[0], -(-query.shape[1] // g) * g, len(slots)), np.float32)
    for row in range(query.shape[0]):
        for i in range(query.shape[1]):
            for x in range(len(slots)):
                if slots[x] >= 0:
                    packed[row, i, x] = scale * query[row, i, slots[x]]
    return packed


@compiled
def _cut_into_pieces(lengths, queries, width, out, lse):
    """Cut rows into pieces, make room for their results, and answer rows without tokens.

    Returns:
        (cuts, results). cuts: each row's first piece, each piece's row, tokens of a piece. results: parts
        (pieces, M, v'), tops and totals (pieces, M).
    """
    size = min(
        max(lengths.sum() // LEAST_PIECES // CHANNEL_BLOCK * CHANNEL_BLOCK, SMALLEST_PIECE), LARGEST_PIECE
    )
    first = np.zeros(len(lengths) + 1, np.int64)
    for row in range(len(out)):
        first[row + 1] = first[row] + (lengths[row] + size - 1) // size
        if first[row] == first[row + 1]:
            out[row], lse[row] = 0.0, -np.inf
    rows = np.empty(first[-1], np.int64)
    for row in range(len(out)):
        for i in range(first[row], first[row + 1]):
            rows[i] = row
    parts = np.empty((len(rows), queries, width), np.float32)
    tops, totals = np.empty((len(rows), queries), np.float32), np.empty((len(rows), queries), np.float32)
    return (first, rows, size), (parts, tops, totals)


@compiled
def _attend_share(thread, layout, cap, arrays, cuts, results, counters):
    """The work of thread `thread`: the pieces of its own share in order, then what is left of other shares.

    In order, so that memory is read in order. counters: pieces taken of each share, by whichever thread, and
    pieces done of each row.
    """
    (taken, done), count = counters, len(cuts[1])
    scores = np.empty((2 + cuts[2] * layout[1] // LANES, LANES), np.float32)
    masks = np.empty(arrays[0].shape[1] if arrays[4].shape[0] else 0, np.int64)
    for turn in range(len(taken)):
        share = (thread + turn) % len(taken)
        begin, end = share * count // len(taken), (share + 1) * count // len(taken)
        while True:
            i = begin + add(_at(taken, share), 1)
            if i >= end:
                break
            _attend_piece(i, layout, cap, arrays, cuts, results, done, scores, masks)


@compiled
def _attend_piece(i, layout, cap, arrays, cuts, results, done, scores, masks):
    """Attend to piece i. The thread that does the last piece of a row merges the row."""
    (query, out, lse, places, mask), (first, rows, size), (parts, tops, totals) = arrays, cuts, results
    functions, g, key, value, slots = layout
    row = rows[i]
    first_piece, end_piece = first[row], first[row + 1]
    begin = (i - first_piece) * size
    left = min(size, places[4, row] - begin)
    per = LANES // g
    steps = (left + per - 1) // per
    if key[11] > 1 or value[11] > 1:  # blocks have scores for tokens past the last, too
        steps = (left + CHANNEL_BLOCK - 1) // CHANNEL_BLOCK * CHANNEL_BLOCK // per
    for j in range(len(masks)):
        of_row = row // (len(query) // len(mask)) * mask.shape[1] + j % mask.shape[1]
        masks[j] = _at(mask, of_row * mask.shape[2] + begin)
    keys = _row(key, places[0, row], places[1, row], begin)
    values = _row(value, places[2, row], places[3, row], begin)
    part = parts[i], tops[i], totals[i]
    _attend(functions, g, cap, query[row], keys, values, masks, left, steps, scores, part)
    # the counter tells which thread came last; it then sees all results of the row
    if add(_at(done, row), 1) == end_piece - first_piece - 1:
        _merge(
            parts[first_piece:end_piece],
            tops[first_piece:end_piece],
            totals[first_piece:end_piece],
            slots,
            out[row],
            lse[row],
        )


@kept_njit(nogil=True, parallel=True)
def decode_rows(
    functions, g, scale, cap, query, key, value, key_slots, value_slots, places, mask, out, lse, threads
):
    """Attention of all rows, into out (R, m, v) and lse (R, m).

    Args:
        functions: the addresses of `scorer(g, ...)`, `softener(g)` and `mixer(g, ...)`.
        g: queries that share one reading of the keys.
        scale: what dot products are multiplied with.
        cap: the soft cap in units of ln 2; 0 for none.
        query: (R, m, r).
        key, value: where keys and values are.
        key_slots: (r'), the column of each number of a packed query, -1 for none.
        value_slots: (v'), the column of each number of a packed output, -1 for none.
        places: (5, R), the lane and first unit of each row's keys and of its values, and its tokens.
        mask: (R', t, s) in bytes, s a multiple of 32 that covers all tokens; R' = 0 for no mask.
        out, lse: the results.
        threads: layout many to use.
    """
    packed = _packed(query, scale, g, key_slots)
    layout, arrays = (functions, g, key, value, value_slots), (packed, out, lse, places, mask)
    cuts, results = _cut_into_pieces(places[4], packed.shape[1], len(value_slots), out, lse)
    counters = np.zeros(threads, np.int64), np.zeros(len(out), np.int64)
    if threads == 1:  # a parallel loop costs more than a short row
        _attend_share(0, layout, cap, arrays, cuts, results, counters)
        return
    for thread in prange(threads):
        _attend_share(thread, layout, cap, arrays, cuts, results, counters)
