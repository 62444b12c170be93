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
from lowkey.backends.numba_rebuilding_kernel import RECORD
from lowkey.backends.numba_vectors import add, call, fill_memory, finish_scores, level, mix, score, weigh

# tokens of a piece, and the pieces that the tokens of a call are cut into, about and at least
SMALLEST_PIECE, LARGEST_PIECE, LEAST_PIECES = 64, 1024, 32
LN2_FP32, NOT_THERE = np.float32(0.6931471805599453), np.float32(LOWEST)
# Where a description of keys that are rebuilt has what: pairs of vectors of a key, words of a token, KV heads
# of a sequence, numbers of a latent; the addresses of positions, of the coarse and the fine table, and of
# first columns and counts of each vector; those of a decoder and of packers of maps and means; the address of
# maps, and bytes from head to head, row to row and column to column; the same of means without rows.
PAIRS_AT, WORDS_AT, HEADS_AT, ROWS_AT, POSITIONS_AT, COARSE_AT, FINE_AT, COLUMNS_AT = range(8)
DECODER_AT, MAP_PACKER_AT, MEAN_PACKER_AT = 8, 9, 10
MAPS_AT, MEANS_AT, DESCRIBED = 11, 15, 18
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
def _attend(functions, g, cap, query, width, count, keys, values, masks, left, steps, scores, part, record):
    """Attend to one piece of `left` tokens with the M queries of its row.

    Args:
        functions: of the piece's segment.
        g: queries that share one reading of the keys.
        cap: see `attend_segments`.
        query: the address of the row's packed queries.
        width: r', numbers of each.
        count: v', numbers of an output.
        keys, values: as `_row` returns them.
        masks: addresses of what each query sees, or none.
        left: tokens.
        steps: vectors of scores.
        scores: room for them.
        part: (out (M v'), top (M), total (M)), the results.
        record: what a `rebuilder` is told besides; empty if keys are met as they are.
    """
    out, tops, totals = part
    top, total, n = scores[0], scores[1], LANES // g
    for x in range(len(tops) * count):
        out[x] = 0.0
    at = _at(scores, 2 * LANES)
    for i in range(0, len(tops), g):  # g queries share one reading of the keys
        asked = query + 4 * i * width
        if len(record):
            record[0] = asked
            asked = _at(record, 0)
        call(functions[0], (asked, *keys, left, at))
        seen = _at(masks, i) if len(masks) else np.int64(0)
        call(functions[1], (cap, seen, steps, left, at, _at(top, 0), _at(total, 0)))
        call(functions[2], (at, *values, left, _at(out, i * count)))
        for j in range(g):
            tops[i + j], totals[i + j] = top[j * n], 0.0
            for lane in range(j * n, (j + 1) * n):
                totals[i + j] += total[lane]


@compiled
def _merge(row, pieces, results, segments, bias, shifts, outputs):
    """Merge the pieces of a row into the outputs.

    A query that sees nothing gives 0 and -inf.

    Args:
        row: its number.
        pieces: (the first, the one behind the last, the segment of each piece).
        results: of all pieces; see `_cut_into_pieces`.
        segments: (basis of each segment, column of each number of its output (S, v'), numbers of an output).
        bias: (R, m), added to the scores of basis 0 in units of ln 2; R = 0 for none.
        shifts: (S, R), added to the scores of each row of a segment in units of ln 2.
        outputs: (out (R, m, v) in basis 0 and in basis 1, share (R, m), lse (R, m)).
    """
    (first, end, of_piece), (parts, tops, totals) = pieces, results
    (basis, slots, counts), (out_0, out_1, share, lse) = segments, outputs
    for i in range(lse.shape[1]):
        top, total, in_basis_0 = NOT_THERE, np.float32(0.0), np.float32(0.0)
        out_0[row, i], out_1[row, i], share[row, i] = 0.0, 0.0, 0.0
        shift = bias[row, i] if len(bias) else np.float32(0.0)
        for p in range(first, end):
            if tops[p, i] > NOT_THERE:
                of_basis = shift if basis[of_piece[p]] == 0 else np.float32(0.0)
                top = max(top, tops[p, i] + (of_basis + shifts[of_piece[p], row]))
        if top <= NOT_THERE:
            lse[row, i] = -np.inf
            continue
        for p in range(first, end):
            s = of_piece[p]
            if tops[p, i] <= NOT_THERE:
                continue
            # each piece counts relative to the largest score of all
            of_basis = shift if basis[s] == 0 else np.float32(0.0)
            weight = np.exp2(tops[p, i] + (of_basis + shifts[s, row]) - top)
            total += weight * totals[p, i]
            if basis[s] == 0:
                in_basis_0 += weight * totals[p, i]
            out = out_0 if basis[s] == 0 else out_1
            for x in range(counts[s]):
                if slots[s, x] >= 0:
                    out[row, i, slots[s, x]] += weight * parts[p, i * counts[s] + x]
        lse[row, i] = (top + np.log2(total)) * LN2_FP32
        share[row, i] = in_basis_0 / total
        for x in range(out_0.shape[2]):
            out_0[row, i, x] /= total
        for x in range(out_1.shape[2]):
            out_1[row, i, x] /= total


@compiled
def _packed(queries, basis, rebuilt, scale, g, slots, widths):
    """The queries of each segment, times scale, as vectors of LANES; 0 for queries past m.

    Args:
        queries: (R, m, r) in basis 0 and in basis 1, in which rebuilt keys are met.
        basis, rebuilt: see `attend_segments`.
        scale: what dot products are multiplied with.
        g: queries that share one reading of the keys.
        slots: (S, r'), the column of each number of a packed query, -1 for none: none may count twice.
        widths: the r' of each segment.

    Returns:
        (the numbers (R, M, r') of one segment after the other, where each segment begins).
    """
    rows, m = queries[0].shape[0], queries[0].shape[1]
    filled, starts = -(-m // g) * g, np.zeros(len(basis) + 1, np.int64)
    for s in range(len(basis)):
        starts[s + 1] = starts[s] + rows * filled * widths[s]
    packed = np.zeros(starts[-1], np.float32)
    for s in range(len(basis)):
        query = queries[0] if basis[s] == 0 and not rebuilt[s, PAIRS_AT] else queries[1]
        for row in range(rows):
            for i in range(m):
                at = starts[s] + (row * filled + i) * widths[s]
                for x in range(widths[s]):
                    if slots[s, x] >= 0:
                        packed[at + x] = scale * query[row, i, slots[s, x]]
    return packed, starts


@compiled
def _packed_maps(rebuilt):
    """The maps and means of all segments, as a `rebuilder` reads them.

    Returns:
        (the numbers of one segment after another, where the maps of each begin, where its means begin).
    """
    maps, means, total = np.zeros(len(rebuilt), np.int64), np.zeros(len(rebuilt), np.int64), 0
    for s in range(len(rebuilt)):
        of_heads = rebuilt[s, HEADS_AT] * rebuilt[s, PAIRS_AT] * 2 * LANES
        maps[s], means[s] = total, total + of_heads * rebuilt[s, WORDS_AT]
        total = means[s] + of_heads
    packed = np.zeros(total, np.float32)
    for s in range(len(rebuilt)):
        if not rebuilt[s, PAIRS_AT]:
            continue
        x = rebuilt[s]
        columns = x[HEADS_AT], x[ROWS_AT], 2 * x[PAIRS_AT], x[COLUMNS_AT], x[COLUMNS_AT] + 16 * x[PAIRS_AT]
        out = _at(packed, maps[s])
        call(
            x[MAP_PACKER_AT],
            (x[MAPS_AT], x[MAPS_AT + 1], x[MAPS_AT + 2], x[MAPS_AT + 3], *columns, x[WORDS_AT], out),
        )
        if x[MEANS_AT]:
            strides, one = (x[MEANS_AT + 1], np.int64(0), x[MEANS_AT + 2]), np.int64(1)
            columns = x[HEADS_AT], one, 2 * x[PAIRS_AT], x[COLUMNS_AT], x[COLUMNS_AT] + 16 * x[PAIRS_AT]
            call(x[MEAN_PACKER_AT], (x[MEANS_AT], *strides, *columns, one, _at(packed, means[s])))
    return packed, maps, means


@compiled
def _cut_into_pieces(places, queries, width):
    """Cut the rows of all segments into pieces, and make room for their results.

    Returns:
        (cuts, results). cuts: each row's first piece, each piece's row, segment and first token, tokens of a
        piece. results: parts (pieces, M v'), tops and totals (pieces, M).
    """
    lengths = places[:, 4]
    size = min(
        max(lengths.sum() // LEAST_PIECES // CHANNEL_BLOCK * CHANNEL_BLOCK, SMALLEST_PIECE), LARGEST_PIECE
    )
    first = np.zeros(lengths.shape[1] + 1, np.int64)
    for row in range(lengths.shape[1]):
        first[row + 1] = first[row]
        for s in range(len(lengths)):
            first[row + 1] += (lengths[s, row] + size - 1) // size
    count = first[-1]
    rows, segment, begin = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.int64)
    i = 0
    for row in range(lengths.shape[1]):
        for s in range(len(lengths)):
            for token in range(0, lengths[s, row], size):
                rows[i], segment[i], begin[i] = row, s, token
                i += 1
    parts = np.empty((count, queries * width), np.float32)
    tops, totals = np.empty((count, queries), np.float32), np.empty((count, queries), np.float32)
    return (first, rows, segment, begin, size), (parts, tops, totals)


@compiled
def _attend_share(thread, layout, arrays, merging, outputs, cuts, results, counters):
    """The work of thread `thread`: the pieces of its own share in order, then what is left of other shares.

    In order, so that memory is read in order. counters: pieces taken of each share, by whichever thread, and
    pieces done of each row.
    """
    (taken, done), count = counters, len(cuts[1])
    scores = np.empty((2 + cuts[4] * layout[1] // LANES, LANES), np.float32)
    masks, record = np.empty(results[1].shape[1], np.int64), np.empty(RECORD, np.int64)
    room = np.empty(
        CHANNEL_BLOCK * (layout[7][:, WORDS_AT] + 2 * LANES * layout[7][:, PAIRS_AT]).max(), np.float32
    )
    record[RECORD - 1] = _at(room, 0)
    for turn in range(len(taken)):
        share = (thread + turn) % len(taken)
        begin, end = share * count // len(taken), (share + 1) * count // len(taken)
        while True:
            i = begin + add(_at(taken, share), 1)
            if i >= end:
                break
            _attend_piece(i, layout, arrays, merging, outputs, cuts, results, done, scores, masks, record)


@compiled
def _attend_piece(i, layout, arrays, merging, outputs, cuts, results, done, scores, masks, record):
    """Attend to piece i. The thread that does the last piece of a row merges the row."""
    packed, starts, places, mask, veil, bias, shifts, maps, map_starts, mean_starts, token_firsts = arrays
    first, rows, segment, begins, size = cuts
    parts, tops, totals = results
    functions, g, cap, keys, values, widths, hidden, rebuilt = layout
    row, s, begin = rows[i], segment[i], begins[i]
    left, queries = min(size, places[s, 4, row] - begin), tops.shape[1]
    per = LANES // g
    steps = (left + per - 1) // per
    if keys[s, 11] > 1 or values[s, 11] > 1:  # blocks have scores for tokens past the last, too
        steps = (left + CHANNEL_BLOCK - 1) // CHANNEL_BLOCK * CHANNEL_BLOCK // per
    seen = masks[:0]
    if len(mask):
        seen = masks
        for j in range(queries):
            of_row = row // (places.shape[2] // len(mask)) * mask.shape[1] + j % mask.shape[1]
            masks[j] = _at(mask, of_row * mask.shape[2] + begin)
    elif hidden[s, row] and not begin:
        seen = masks
        masks[:] = _at(veil, SMALLEST_PIECE - hidden[s, row])
    told = record[:0]
    if rebuilt[s, PAIRS_AT]:
        told, x = record, rebuilt[s]
        head = row % x[HEADS_AT] * x[PAIRS_AT] * 2 * LANES
        told[1] = _at(maps, map_starts[s] + head * x[WORDS_AT])
        told[2] = _at(maps, mean_starts[s] + head)
        told[3] = x[POSITIONS_AT] + 4 * (token_firsts[s, row] + begin)
        told[4:9] = x[COARSE_AT], x[FINE_AT], x[PAIRS_AT], x[WORDS_AT], x[DECODER_AT]
    _attend(
        functions[s],
        g,
        cap,
        _at(packed, starts[s] + row * queries * widths[s]),
        widths[s],
        merging[2][s],
        _row(keys[s], places[s, 0, row], places[s, 1, row], begin),
        _row(values[s], places[s, 2, row], places[s, 3, row], begin),
        seen,
        left,
        steps,
        scores,
        (parts[i], tops[i], totals[i]),
        told,
    )
    # the counter tells which thread came last; it then sees all results of the row
    if add(_at(done, row), 1) == first[row + 1] - first[row] - 1:
        _merge(row, (first[row], first[row + 1], segment), results, merging, bias, shifts, outputs)


@kept_njit(nogil=True, parallel=True)
def attend_segments(
    functions,
    g,
    scale,
    cap,
    query_0,
    query_1,
    basis,
    keys,
    values,
    key_slots,
    key_counts,
    value_slots,
    value_counts,
    places,
    hidden,
    mask,
    bias,
    shifts,
    rebuilt,
    token_firsts,
    out_0,
    out_1,
    share,
    lse,
    threads,
):
    """Attention of R rows of queries over the tokens of S segments, under one softmax.

    Queries and outputs are in one of two bases: that of latents (0) and that of the model (1).

    Args:
        functions: (S, 3), the addresses of `scorer(g, ...)` or `rebuilder(g, ...)`, of `softener(g)` and of
            `mixer(g, ...)`.
        g: queries that share one reading of the keys.
        scale: what dot products are multiplied with.
        cap: the soft cap in units of ln 2; 0 for none.
        query_0, query_1: (R, m, r) in basis 0 and in basis 1.
        basis: (S).
        keys, values: (S, 12), where keys and values are.
        key_slots: (S, r'), the column of each number of a packed query, -1 for none.
        key_counts: (S), the r' of each segment.
        value_slots, value_counts: the same of outputs.
        places: (S, 5, R), the lane and first unit of each row's keys and of its values, and its tokens.
        hidden: (S, R), the first tokens of each row that no query sees, at most SMALLEST_PIECE.
        mask: (R', t, s) in bytes, s a multiple of 32 that covers all tokens, for all segments; R' = 0 for
            none.
        bias, shifts: (R, m) and (S, R), see `_merge`.
        rebuilt: (S, DESCRIBED), how keys are rebuilt; all 0 where they are met as they are.
        token_firsts: (S, R), where the positions of each row begin, for keys that are rebuilt.
        out_0, out_1, share, lse: the results; see `_merge`.
        threads: how many to use.
    """
    packed, starts = _packed((query_0, query_1), basis, rebuilt, scale, g, key_slots, key_counts)
    m, outputs = query_0.shape[1], (out_0, out_1, share, lse)
    cuts, results = _cut_into_pieces(places, -(-m // g) * g, value_counts.max())
    veil = np.ones(SMALLEST_PIECE + LARGEST_PIECE, np.uint8)
    veil[:SMALLEST_PIECE] = 0
    layout = functions, g, cap, keys, values, key_counts, hidden, rebuilt
    maps, map_starts, mean_starts = _packed_maps(rebuilt)
    arrays = packed, starts, places, mask, veil, bias, shifts, maps, map_starts, mean_starts, token_firsts
    merging = basis, value_slots, value_counts
    counters = np.zeros(threads, np.int64), np.zeros(places.shape[2], np.int64)
    for row in range(places.shape[2]):
        if cuts[0][row] == cuts[0][row + 1]:  # a row without tokens has no piece
            _merge(row, (0, 0, cuts[2]), results, merging, bias, shifts, outputs)
    if threads == 1:  # a parallel loop costs more than a short row
        _attend_share(0, layout, arrays, merging, outputs, cuts, results, counters)
        return
    for thread in prange(threads):
        _attend_share(thread, layout, arrays, merging, outputs, cuts, results, counters)
