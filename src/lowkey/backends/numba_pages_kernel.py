"""The compiled half of `numba_pages`, imported on first use.

A piece of work is one page of one row, or PIECE_TOKENS of a large one. All query heads of the row take the
piece in turn, so that packed tokens are decoded once for all of them. What a step on a vector is, is said in
`numba_vectors`; how keys are rebuilt, in `numba_rebuilding_kernel`.

M is the number of a row's queries, those of each KV head filled up to a multiple of g; r' and v' are widths
filled up to whole vectors. A *side* is what `numba_pages` says of keys or values: addresses of numbers,
scales and offsets; bytes from page to page, and from stored head to stored head; stored heads; bytes from
unit to unit, and from channel to channel, each of numbers and of scales; groups, channels of a group, and
tokens of a unit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import prange, types

from lowkey.backends.numba_cache import kept_cfunc, kept_njit
from lowkey.backends.numba_channels import CHANNEL_BLOCK
from lowkey.backends.numba_ir import LANES, LOWEST
from lowkey.backends.numba_rebuilding_kernel import TILE, VECTOR, rebuild_in_order
from lowkey.backends.numba_vectors import add, call, score

PIECE_TOKENS = 256  # tokens, a multiple of CHANNEL_BLOCK
SIDE_NUMBERS = 13  # numbers of a side
# where it has what
(
    ADDRESS,
    PAGE_STEP,
    HEAD_STEP,
    HEAD_COUNT,
    UNIT_STEP,
    SCALE_STEP,
    CHANNEL_STEP,
    SCALE_CHANNEL_STEP,
    GROUP_COUNT,
    GROUP_WIDTH,
    UNIT_TOKENS,
) = 0, *range(3, SIDE_NUMBERS)
# Where functions have what: what scores keys, softens scores and mixes values, as in `numba_kernel`; what
# decodes keys and values first, 0 where they are read as they are.
SCORES_KEYS, SOFTENS, MIXES, DECODES_KEYS, DECODES_VALUES, FUNCTION_COUNT = range(6)
# Where a description of rebuilt keys has what: addresses of maps, means and the rotation of position 0; pairs
# of vectors of a key, 0 for keys that are not rebuilt; words of a token.
MAPS_PLACE, MEANS_PLACE, TURNS_PLACE, PAIRS_PLACE, WORDS_PLACE, NUMBERS_OF_KEYS = range(6)
_NOT_THERE, _LN2 = np.float32(LOWEST), np.float32(0.6931471805599453)
_compiled = kept_njit(nogil=True)


@cache
def page_rebuilder(g: int, pairs: bool) -> Any:
    """A C function that writes the dot products of queries with `left` keys that it rebuilds.

    Args:
        g: queries of a step.
        pairs: whether words are pairs of bf16.

    Returns:
        The function. It takes the addresses of queries, bytes from g queries to the next g, and how often
        there are g; the address of decoded tokens, bytes of one, and its words; addresses of a map, a mean
        and of rotations in order; pairs of vectors; tokens; room for CHANNEL_BLOCK keys; and the address of
        scores, and bytes from those of g queries to those of the next g.
    """
    per = LANES // g

    @kept_cfunc(types.void(*[types.int64] * 14))
    def by_page(
        query, of_queries, passes, tokens, token, words, maps, mean, turns, count, left, keys, out, apart
    ):
        key = 2 * count * VECTOR
        for begin in range(0, left, CHANNEL_BLOCK):
            some = min(CHANNEL_BLOCK, left - begin)
            for pair in range(count):
                at = pair * 2 * VECTOR
                for start in range(0, some, TILE):
                    own = begin + start
                    rebuild_in_order(
                        pairs,
                        tokens + own * token,
                        token,
                        words,
                        maps + at * words,
                        mean + at,
                        turns + own * key + at,
                        keys + start * key + at,
                        key,
                    )
            for i in range(passes):
                asked, to = query + i * of_queries, out + i * apart + begin // per * VECTOR
                for start in range(0, some, per):
                    at, own = keys + start * key, to + start // per * VECTOR
                    score(g, "float32", asked, at, at, at, key, 0, 1, key // 4, some - start, own)

    return by_page


@_compiled
def _at(numbers, index):
    """The address of the number at this index of a contiguous array."""
    return np.int64(numbers.ctypes.data) + numbers.itemsize * index


@_compiled
def _packed(query, heads, filled, scale, slots):
    """Queries (R, m, r), times scale, as vectors of LANES (R, M, r'); 0 for those that fill up a head."""
    rows, m = query.shape[:2]
    packed = np.zeros((rows, heads * filled, len(slots)), np.float32)
    for row in range(rows):
        for i in range(m):
            at = i // (m // heads) * filled + i % (m // heads)
            for x in range(len(slots)):
                if slots[x] >= 0:
                    packed[row, at, x] = scale * query[row, i, slots[x]]
    return packed


@_compiled
def _cut_into_pieces(lengths, rows, block, size):
    """Cut the pages of all rows into pieces.

    Returns:
        (the first piece of each row and the number of all (R + 1), and of each piece its row, its page and
        its first token there).
    """
    first = np.zeros(len(lengths) * rows + 1, np.int64)
    of_a_page = (block + size - 1) // size
    for row in range(len(first) - 1):
        whole, rest = divmod(lengths[row // rows], block)
        first[row + 1] = first[row] + whole * of_a_page + (rest + size - 1) // size
    of_row, page, begin = (
        np.empty(first[-1], np.int64),
        np.empty(first[-1], np.int64),
        np.empty(first[-1], np.int64),
    )
    for row in range(len(first) - 1):
        for i in range(first[row + 1] - first[row]):
            at = first[row] + i
            of_row[at], page[at], begin[at] = row, i // of_a_page, i % of_a_page * size
    return first, of_row, page, begin


@_compiled
def _placed(side, block, row, rows, begin):
    """What a C function is told of a row's tokens in a block, from token `begin` on."""
    at, unit = (
        block * side[PAGE_STEP] + row * side[HEAD_COUNT] // rows * side[HEAD_STEP],
        begin // side[UNIT_TOKENS],
    )
    shift = at + unit * side[SCALE_STEP]
    strides = side[UNIT_STEP], side[SCALE_STEP], side[CHANNEL_STEP], side[SCALE_CHANNEL_STEP]
    numbers, scale, low = side[0] + at + unit * side[UNIT_STEP], side[1] + shift, side[2] + shift
    return numbers, scale, low, *strides, side[GROUP_COUNT], side[GROUP_WIDTH]


@_compiled
def _decode(function, place, left, to, token):
    """Decode tokens, and return what a C function is told of the result."""
    for begin in range(0, left, CHANNEL_BLOCK):
        call(function, (*place, begin, min(CHANNEL_BLOCK, left - begin), to + begin * token, token))
    nothing = np.int64(0)
    return to, to, to, token, nothing, nothing, nothing, np.int64(1), token // 4


@_compiled
def _attend_piece(i, layout, asked, cuts, tokens, results, room):
    """Attend to piece i with all queries of its row. See `attend_pages` for what is in layout and asked."""
    functions, g, heads, filled, cap, keys, values, rebuilt, value_width = layout
    packed, rows = asked
    (_, of_row, pages, begins), (table, lengths, block, size, hidden) = cuts, tokens
    parts, tops, totals = results
    scores, decoded_keys, decoded_values, rebuilt_keys, veil, masks = room
    row, begin, per = of_row[i], begins[i], LANES // g
    sequence, own, page = row // rows, row % rows, pages[i]
    left = min(size, min(block, lengths[sequence] - page * block) - begin)
    steps, passes, count = (left + per - 1) // per, filled // g, rebuilt[PAIRS_PLACE]
    if keys[UNIT_TOKENS] > 1 and not count:  # blocks have scores for tokens past the last, too
        steps = (left + CHANNEL_BLOCK - 1) // CHANNEL_BLOCK * CHANNEL_BLOCK // per
    key = _placed(keys, table[sequence, page], own, rows, begin)
    value = _placed(values, table[sequence, page], own, rows, begin)
    if functions[DECODES_VALUES]:
        token = 4 * values[GROUP_COUNT] * values[GROUP_WIDTH]
        value = _decode(functions[DECODES_VALUES], value, left, _at(decoded_values, 0), token)
    if functions[DECODES_KEYS]:
        key = _decode(functions[DECODES_KEYS], key, left, _at(decoded_keys, 0), 4 * rebuilt[WORDS_PLACE])
    at, apart, of_queries = _at(scores, 2 * LANES), 4 * size * g, 4 * g * packed.shape[2]
    top, total, n = scores[:LANES], scores[LANES:], LANES // g
    seen, covered = np.int64(0), hidden - page * block - begin
    if covered > 0:  # the first tokens of a sequence
        veil[: min(covered, size)], veil[min(covered, size) :], masks[:] = 0, 1, _at(veil, 0)
        seen = _at(masks, 0)
    for x in range(parts.shape[1]):
        parts[i, x] = 0.0
    for head in range(heads):
        query = _at(packed, (row * heads + head) * filled * packed.shape[2])
        if count:
            of_head = (own * heads + head) * count * 2 * VECTOR
            maps, mean = rebuilt[MAPS_PLACE] + of_head * rebuilt[WORDS_PLACE], rebuilt[MEANS_PLACE] + of_head
            turns = rebuilt[TURNS_PLACE] + (page * block + begin) * count * 2 * VECTOR
            how = key[0], key[3], rebuilt[WORDS_PLACE], maps, mean, turns, count, left, _at(rebuilt_keys, 0)
            call(functions[SCORES_KEYS], (query, of_queries, passes, *how, at, apart))
        for p in range(passes):
            to, first = at + p * apart, head * filled + p * g
            if not count:
                call(functions[SCORES_KEYS], (query + p * of_queries, *key, left, to))
            call(functions[SOFTENS], (cap, seen, steps, left, to, _at(top, 0), _at(total, 0)))
            out = _at(parts, i * parts.shape[1] + first * value_width)
            call(functions[MIXES], (to, *value, left, out))
            for j in range(g):
                tops[i, first + j], totals[i, first + j] = top[j * n], 0.0
                for lane in range(j * n, (j + 1) * n):
                    totals[i, first + j] += total[lane]


@_compiled
def _merge(row, first, results, heads, filled, slots, out, lse, mixed):
    """Merge the pieces of a row into its outputs (m, v) and (m); 0 and -inf where it sees nothing."""
    parts, tops, totals = results
    begin, end, m, width = first[row], first[row + 1], out.shape[1], len(slots)
    for i in range(m):
        at = i // (m // heads) * filled + i % (m // heads)
        top, total = _NOT_THERE, np.float32(0.0)
        for p in range(begin, end):
            top = max(top, tops[p, at])
        for x in range(width):
            mixed[x] = 0.0
        for p in range(begin, end):
            if tops[p, at] <= _NOT_THERE:
                continue
            weight = np.exp2(tops[p, at] - top)
            total += weight * totals[p, at]
            own = parts[p, at * width : (at + 1) * width]
            for x in range(width):
                mixed[x] += weight * own[x]
        share = np.float32(1.0) / total if total > 0 else np.float32(0.0)
        lse[row, i] = (top + np.log2(total)) * _LN2 if total > 0 else -np.inf
        for x in range(width):
            if slots[x] >= 0:
                out[row, i, slots[x]] = share * mixed[x]


@_compiled
def _attend_share(thread, layout, asked, cuts, tokens, results, merging, counters):
    """The work of a thread: pieces of its own share in order, then what is left of other shares.

    counters: pieces taken of each share, by whichever thread, and pieces done of each row. The thread that
    does the last piece of a row merges it.
    """
    (taken, done), count, (slots, out, lse) = counters, len(cuts[1]), merging
    heads, filled, values, rebuilt = layout[2], layout[3], layout[6], layout[7]
    size = tokens[3]
    room = (
        np.empty(2 * LANES + size * filled, np.float32),
        np.zeros((size + TILE) * rebuilt[WORDS_PLACE] if layout[0][DECODES_KEYS] else 1, np.float32),
        np.zeros(
            size * values[GROUP_COUNT] * values[GROUP_WIDTH] if layout[0][DECODES_VALUES] else 1, np.float32
        ),
        np.empty(CHANNEL_BLOCK * 2 * LANES * rebuilt[PAIRS_PLACE], np.float32),
        np.empty(size + LANES, np.uint8),
        np.empty(layout[1], np.int64),
    )
    mixed = np.empty(len(slots), np.float32)
    for turn in range(len(taken)):
        share = (thread + turn) % len(taken)
        begin, end = share * count // len(taken), (share + 1) * count // len(taken)
        while True:
            i = begin + add(_at(taken, share), 1)
            if i >= end:
                break
            _attend_piece(i, layout, asked, cuts, tokens, results, room)
            row = cuts[1][i]
            if add(_at(done, row), 1) == cuts[0][row + 1] - cuts[0][row] - 1:
                _merge(row, cuts[0], results, heads, filled, slots, out, lse, mixed)


@kept_njit(nogil=True, parallel=True)
def attend_pages(
    functions,
    g,
    heads,
    scale,
    cap,
    query,
    key_slots,
    value_slots,
    keys,
    values,
    rebuilt,
    table,
    lengths,
    block,
    hidden,
    out,
    lse,
    threads,
):
    """Attention of one token of each of some sequences over the sequence's pages.

    Args:
        functions: (FUNCTION_COUNT), addresses.
        g: queries that share one reading of the keys.
        heads: KV heads of a row whose keys are rebuilt one by one; 1 where all queries meet the same keys.
        scale: what dot products are multiplied with.
        cap: the soft cap in units of ln 2; 0 for none.
        query: (R, m, r), for each sequence as many rows.
        key_slots: (r'), the column of each number of a packed query, -1 for none.
        value_slots: (v'), the same of outputs.
        keys, values: (SIDE_NUMBERS).
        rebuilt: (NUMBERS_OF_KEYS).
        table: (b, n), the blocks of each sequence.
        lengths: (b), tokens of each.
        block: tokens of a page.
        hidden: first tokens of each sequence that are not seen.
        out, lse: (R, m, v) and (R, m), the results.
        threads: how many to use.
    """
    rows, size = len(query) // len(lengths), min(-(-block // CHANNEL_BLOCK) * CHANNEL_BLOCK, PIECE_TOKENS)
    filled = -(-(query.shape[1] // heads) // g) * g
    packed = _packed(query, heads, filled, scale, key_slots)
    cuts = _cut_into_pieces(lengths, rows, block, size)
    count = len(cuts[1])
    results = (
        np.empty((count, heads * filled * len(value_slots)), np.float32),
        np.empty((count, heads * filled), np.float32),
        np.empty((count, heads * filled), np.float32),
    )
    layout = functions, g, heads, filled, cap, keys, values, rebuilt, len(value_slots)
    asked, merging = (packed, rows), (value_slots, out, lse)
    tokens = table, lengths, block, size, hidden
    counters = np.zeros(threads, np.int64), np.zeros(len(query), np.int64)
    for row in range(len(query)):
        if cuts[0][row] == cuts[0][row + 1]:  # a row without tokens has no piece
            out[row], lse[row] = 0.0, -np.inf
    if threads == 1:  # a parallel loop costs more than a short row
        _attend_share(0, layout, asked, cuts, tokens, results, merging, counters)
        return
    for thread in prange(threads):
        _attend_share(thread, layout, asked, cuts, tokens, results, merging, counters)
