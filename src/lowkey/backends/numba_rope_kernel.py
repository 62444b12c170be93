"""Dot products of queries with keys that are rotated as they are read, compiled by numba.

The cosine and sine of a position p are those of p - p % STRIDE and of p % STRIDE, added as angles. So two
small tables serve any number of tokens.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from lowkey.backends.numba_cache import kept_njit
from lowkey.backends.numba_cpu import STRIDE

PIECE_TOKENS = 64  # of a row that a thread takes at a time
fast = kept_njit(nogil=True, fastmath=True)


@fast
def _rounded(x, bits):
    """x without the last bits of its mantissa, to the nearest, ties to even."""
    if not bits:
        return x
    raw = np.float32(x).view(np.uint32)
    half = np.uint32((1 << (bits - 1)) - 1) + ((raw >> np.uint32(bits)) & np.uint32(1))
    return np.uint32((raw + half) & ~np.uint32((1 << bits) - 1)).view(np.float32)


@fast
def _dots_of(row, start, stop, keys, query, positions, first, coarse, fine, bits, scale, begin, out):
    """The dot products of a row's queries with its tokens from `start` to `stop`."""
    half, d = coarse.shape[2], query.shape[2]
    side = len(query) // len(keys)  # heads side by side
    lane, at = row // side, row % side * d
    rotated = np.empty(d, np.float32)
    for t in range(start, stop):
        position = positions[first + t]
        high, low = position // STRIDE, position % STRIDE
        for x in range(half):
            cos = coarse[high, 0, x] * fine[low, 0, x] - coarse[high, 1, x] * fine[low, 1, x]
            sin = coarse[high, 1, x] * fine[low, 0, x] + coarse[high, 0, x] * fine[low, 1, x]
            cos, sin = _rounded(cos, bits), _rounded(sin, bits)
            a, b = keys[lane, t, at + x], keys[lane, t, at + x + half]
            rotated[x] = a * cos - b * sin
            rotated[x + half] = b * cos + a * sin
        for x in range(2 * half, d):
            rotated[x] = keys[lane, t, at + x]
        for i in range(query.shape[1]):
            total = np.float32(0.0)
            for x in range(d):
                total += rotated[x] * query[row, i, x]
            out[row, i, begin + t] = scale * total


@kept_njit(nogil=True, fastmath=True, parallel=True)
def write_rotated_dots(
    keys, query, positions, firsts, lengths, coarse, fine, bits, scale, begin, out, threads
):
    """Write the scaled dot products of queries with rotated keys.

    Args:
        keys: (L, T, n d) in fp32, not rotated: some tokens of R = L n rows, n of them side by side.
        query: (R, m, d) in fp32, rotated.
        positions: of tokens, int32.
        firsts: (R), where in `positions` the tokens of each row begin.
        lengths: (R), how many of the T tokens each row has.
        coarse: (n, 2, p / 2), cosines and sines of the multiples of STRIDE.
        fine: (STRIDE, 2, p / 2), of the numbers below STRIDE, without the factor of a scaled embedding.
        bits: of the mantissa that the model's dtype leaves out, in which the model rotates.
        scale: what dot products are multiplied with.
        begin: the number of the first token in `out`.
        out: (R, m, n).
        threads: how many to use.
    """
    rows, pieces = len(query), -(-keys.shape[1] // PIECE_TOKENS)
    if threads == 1:
        for row in range(rows):
            stop = min(keys.shape[1], lengths[row])
            _dots_of(row, 0, stop, keys, query, positions, firsts[row], coarse, fine, bits, scale, begin, out)
        return
    for i in prange(rows * pieces):
        row, start = i // pieces, i % pieces * PIECE_TOKENS
        stop = min(keys.shape[1], start + PIECE_TOKENS, lengths[row])
        _dots_of(row, start, stop, keys, query, positions, firsts[row], coarse, fine, bits, scale, begin, out)
