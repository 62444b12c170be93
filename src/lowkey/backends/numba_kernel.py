"""The compiled half of `numba_cpu`, imported on first use.

Rows are cut into pieces, which threads take in turn, and the pieces of each row are merged. A piece is at
most LARGEST_PIECE tokens of one row. It forms all its scores, their softmax, and then reads its values, so
memory is read in long runs. What depends on the dtype is one small C function for each dtype and group of
queries; the rest is compiled once.

Softmax is taken with powers of 2: scores arrive in units of ln 2. M is the number of queries of a row, filled
up to a multiple of g; r' and v' are widths filled up to whole vectors.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cfunc, njit, prange, types

from lowkey.backends.numba_vectors import LANES, LOWEST, add, call, fill_memory, level, mix, score, weigh

# tokens of a piece, and the pieces that the tokens of a call are cut into, about and at least
SMALLEST_PIECE, LARGEST_PIECE, LEAST_PIECES = 64, 1024, 32
LN2_FP32 = np.float32(0.6931471805599453)
compiled = njit(cache=True, nogil=True)


@cache
def piece(g: int, kind: str) -> Any:
    """A C function that attends with g queries to `left` tokens of one row.

    Args:
        g: queries that share one reading of the keys.
        kind: dtype of keys and values.

    Returns:
        The function. Pointers and strides are in bytes; `top` gets each query's largest score, `total` the
        sum of its weights and `out` the sum of its weighted values.
    """
    per = LANES // g

    @cfunc(types.void(types.float32, *[types.int64] * 12), cache=True)
    def attend(cap, query, keys, key_stride, r, values, value_stride, v, left, scores, top, total, out):
        steps = (left + per - 1) // per
        fill_memory(top, LOWEST)
        fill_memory(total, 0.0)
        for i in range(steps):
            at = keys + i * per * key_stride
            score(g, kind, cap, query, at, key_stride, left - i * per, r, scores + 4 * LANES * i, top)
        level(g, top)
        for i in range(steps):
            weigh(scores + 4 * LANES * i, top, total)
        for i in range(steps):
            mix(
                g,
                kind,
                scores + 4 * LANES * i,
                values + i * per * value_stride,
                value_stride,
                left - i * per,
                v,
                out,
            )

    return attend


@compiled
def _at(numbers, index):
    """The address of the number at this index of a contiguous array."""
    return np.int64(numbers.ctypes.data) + numbers.itemsize * index


@compiled
def _attend(function, g, cap, query, keys, values, left, scores, part):
    """Attend to one piece of `left` tokens with all queries (M, r') of its row.

    The results go to `part`: (out (M, v'), top (M), total (M)).
    """
    out, tops, totals = part
    top, total, n = scores[0], scores[1], LANES // g
    for i in range(len(out)):
        for x in range(out.shape[1]):
            out[i, x] = 0.0
    for i in range(0, len(query), g):  # g queries share one reading of the keys
        query_at, out_at = _at(query, i * query.shape[1]), _at(out, i * out.shape[1])
        call(
            function,
            (cap, query_at, *keys, *values, left, _at(scores, 2 * LANES), _at(top, 0), _at(total, 0), out_at),
        )
        for j in range(g):
            tops[i + j], totals[i + j] = top[j * n], 0.0
            for lane in range(j * n, (j + 1) * n):
                totals[i + j] += total[lane]


@compiled
def _merge(parts, tops, totals, out, lse):
    """Merge the pieces of a row, parts (p, M, v'), tops and totals (p, M), into out (M, v) and lse (M)."""
    for i in range(len(out)):
        top, total = np.float32(LOWEST), np.float32(0.0)
        for p in range(len(parts)):
            top = max(top, tops[p, i])
        for p in range(len(parts)):
            # each piece counts relative to the largest score of all
            weight = np.exp2(tops[p, i] - top)
            total += weight * totals[p, i]
            for x in range(parts.shape[2]):
                parts[0, i, x] = weight * parts[p, i, x] + (parts[0, i, x] if p else np.float32(0.0))
        lse[i] = (top + np.log2(total)) * LN2_FP32
        _unpack(parts[0, i], total, out[i])


@compiled
def _unpack(packed, total, out):
    """Write packed vectors as one row (v), divided by `total`; see `_packed` for the last vector."""
    for x in range(0, len(packed), LANES):
        to = min(x, len(out) - LANES)
        for i in range(LANES):
            out[to + i] = packed[x + i] / total


@compiled
def _packed(query, scale, g, width):
    """Queries (R, m, r), times scale, as vectors of LANES: (R, M, r').

    The last vector ends at the last of `width` columns, as it does where keys are read, and so overlaps the
    one before. It is 0 where it overlaps, so that no column counts twice; and so are queries past m.
    """
    short = -width % LANES
    packed = np.zeros((query.shape[0], -(-query.shape[1] // g) * g, width + short), np.float32)
    for row in range(query.shape[0]):
        for i in range(query.shape[1]):
            for x in range(query.shape[2]):
                packed[row, i, x if x < width + short - LANES else x + short] = scale * query[row, i, x]
    return packed


@compiled
def _cut_into_pieces(starts, queries, width, out, lse):
    """Cut rows into pieces, make room for their results, and answer rows without tokens.

    Returns:
        (cuts, results). cuts: where rows begin, each row's first piece, each piece's row, tokens of a piece.
        results: parts (pieces, M, v'), tops and totals (pieces, M).
    """
    size = min(max(starts[-1] // LEAST_PIECES // LANES * LANES, SMALLEST_PIECE), LARGEST_PIECE)
    first = np.zeros(len(starts), np.int64)
    for row in range(len(out)):
        first[row + 1] = first[row] + (starts[row + 1] - starts[row] + size - 1) // size
        if first[row] == first[row + 1]:
            out[row], lse[row] = 0.0, -np.inf
    rows = np.empty(first[-1], np.int64)
    for row in range(len(out)):
        for i in range(first[row], first[row + 1]):
            rows[i] = row
    parts = np.empty((len(rows), queries, (width + LANES - 1) // LANES * LANES), np.float32)
    tops, totals = np.empty((len(rows), queries), np.float32), np.empty((len(rows), queries), np.float32)
    return (starts, first, rows, size), (parts, tops, totals)


@compiled
def _attend_share(thread, layout, cap, arrays, cuts, results, counters):
    """The work of thread `thread`: the pieces of its own share in order, then what is left of other shares.

    In order, so that memory is read in order. counters: pieces taken of each share, by whichever thread, and
    pieces done of each row.
    """
    (taken, done), count = counters, len(cuts[2])
    scores = np.empty((2 + cuts[3] * layout[1] // LANES, LANES), np.float32)
    for turn in range(len(taken)):
        share = (thread + turn) % len(taken)
        begin, end = share * count // len(taken), (share + 1) * count // len(taken)
        while True:
            i = begin + add(_at(taken, share), 1)
            if i >= end:
                break
            _attend_piece(i, layout, cap, arrays, cuts, results, done, scores)


@compiled
def _attend_piece(i, layout, cap, arrays, cuts, results, done, scores):
    """Attend to piece i. The thread that does the last piece of a row merges the row."""
    (query, out, lse), (starts, first, rows, size), (parts, tops, totals) = arrays, cuts, results
    function, g, key, key_stride, r, value, value_stride, v = layout
    row = rows[i]
    first_piece, end_piece = first[row], first[row + 1]
    begin = starts[row] + (i - first_piece) * size
    places = (key + begin * key_stride, key_stride, r), (value + begin * value_stride, value_stride, v)
    left = min(size, starts[row + 1] - begin)
    _attend(function, g, cap, query[row], *places, left, scores, (parts[i], tops[i], totals[i]))
    # the counter tells which thread came last; it then sees all results of the row
    if add(_at(done, row), 1) == end_piece - first_piece - 1:
        _merge(
            parts[first_piece:end_piece],
            tops[first_piece:end_piece],
            totals[first_piece:end_piece],
            out[row],
            lse[row],
        )


@njit(cache=True, nogil=True, parallel=True)
def decode_rows(function, g, scale, cap, query, keys, values, starts, out, lse, threads):
    """Attention of all rows, into out (R, m, v) and lse (R, m).

    Args:
        function: the address of a `piece(g, ...)`.
        g: queries that share one reading of the keys.
        scale: what dot products are multiplied with.
        cap: the soft cap in units of ln 2; 0 for none.
        query: (R, m, r).
        keys, values: (address, bytes from token to token, width).
        starts: (R + 1), where each row begins.
        out, lse: the results.
        threads: how many to use.
    """
    layout, arrays = (function, g, *keys, *values), (_packed(query, scale, g, keys[2]), out, lse)
    cuts, results = _cut_into_pieces(starts, arrays[0].shape[1], values[2], out, lse)
    counters = np.zeros(threads, np.int64), np.zeros(len(out), np.int64)
    if threads == 1:  # a parallel loop costs more than a short row
        _attend_share(0, layout, cap, arrays, cuts, results, counters)
        return
    for thread in prange(threads):
        _attend_share(thread, layout, cap, arrays, cuts, results, counters)
