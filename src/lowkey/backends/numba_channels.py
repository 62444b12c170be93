"""The steps of `numba_vectors` for integers whose scales belong to one channel of a block of 32 tokens.

Such a block holds the 32 codes of its first channel, then those of the next. A kind is named by bits and by
the dtype of the scales, `channel2 bfloat16`. Steps are those of `numba_vectors`, 32 tokens at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from lowkey.backends.numba_ir import (
    FLOAT_VECTOR,
    I32,
    LANES,
    Builder,
    Value,
    int64,
    literal,
    load_codes,
    load_scalar,
    load_vector,
    pointer,
    same,
    smaller,
    spread,
    store_vector,
    summed,
    totals,
    vector_call,
)

CHANNEL_BLOCK = 32  # of a block
VECTORS = CHANNEL_BLOCK // LANES  # that hold one number for each token


def _parsed(kind: str) -> tuple[int, str]:
    """(bits of a code, the dtype of scales)."""
    bits, number = kind.split()
    return int(bits.removeprefix("channel")), number


class Channel:
    """The codes, the scale and the offset of one channel of a block."""

    def __init__(self, b: Builder, kind: str, place: Sequence[Value], channel: Value) -> None:
        numbers, scale, low, stride, scale_stride = place
        bits, number = _parsed(kind)
        row, at = b.add(numbers, b.mul(stride, channel)), b.mul(scale_stride, channel)
        self.codes = [load_codes(b, row, int64(v * LANES * bits // 8), bits) for v in range(VECTORS)]
        self.scale, self.low = (load_scalar(b, b.add(x, at), number) for x in (scale, low))


def _chunk(b: Builder, g: int, steps: Value, query: int, vector: int, k: int) -> Value:
    """The address of LANES / g numbers of a query in steps: the k-th part of a vector of tokens."""
    offset = 4 * ((vector * g + k) * LANES + query * (LANES // g))
    return pointer(b, steps, int64(offset), ir.VectorType(ir.FloatType(), LANES // g))


@literal
def score_channels(
    _: Any,
    g: Any,
    kind: Any,
    query: Any,
    numbers: Any,
    scale: Any,
    low: Any,
    stride: Any,
    scale_stride: Any,
    width: Any,
    out: Any,
) -> Any:
    """Write the dot products of a block to `out`.

    The query takes the scales: q . (code scale + low) = (q scale) . code + q . low.
    """

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        query, *place, width, out = args[2:]
        n, per = g.literal_value, LANES // g.literal_value
        row = b.mul(b.sdiv(b.add(width, int64(LANES - 1)), int64(LANES)), int64(4 * LANES))
        sums = [[cgutils.alloca_once_value(b, same(0.0)) for _ in range(VECTORS)] for _ in range(n)]
        shifts = [cgutils.alloca_once_value(b, ir.Constant(ir.FloatType(), 0.0)) for _ in range(n)]
        with cgutils.for_range(b, width) as loop:
            channel = Channel(b, kind.literal_value, place, loop.index)
            for i in range(n):
                at = b.add(b.mul(row, int64(i)), b.mul(loop.index, int64(4)))
                x = load_scalar(b, b.add(query, at))
                scaled = spread(b, b.fmul(x, channel.scale))
                b.store(b.fadd(b.load(shifts[i]), b.fmul(x, channel.low)), shifts[i])
                for total, codes in zip(sums[i], channel.codes, strict=True):
                    b.store(vector_call(b, "fmuladd", codes, scaled, b.load(total)), total)
        for i in range(n):
            shift = spread(b, b.load(shifts[i]))
            for v in range(VECTORS):
                found = b.fadd(b.load(sums[i][v]), shift)
                for k in range(n):
                    part = ir.Constant(ir.VectorType(I32, per), list(range(k * per, (k + 1) * per)))
                    b.store(b.shuffle_vector(found, found, part), _chunk(b, n, out, i, v, k), align=4)
        return context.get_dummy_value()

    place = (numbers, scale, low, stride, scale_stride)
    return types.void(g, kind, query, *place, width, out), emit


@literal
def mix_channels(
    _: Any,
    g: Any,
    kind: Any,
    weights: Any,
    numbers: Any,
    scale: Any,
    low: Any,
    stride: Any,
    scale_stride: Any,
    width: Any,
    out: Any,
) -> Any:
    """Add the weighted values of a block to `out` (g, vectors, LANES), LANES channels at a time."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        weights, *place, width, out = args[2:]
        n = g.literal_value
        own = [[_weights(b, n, weights, i, v) for v in range(VECTORS)] for i in range(n)]
        whole_weight = []
        for vectors in own:
            total = vectors[0]
            for x in vectors[1:]:
                total = b.fadd(total, x)
            whole_weight.append(summed(b, total))
        count = b.sdiv(b.add(width, int64(LANES - 1)), int64(LANES))
        with cgutils.for_range(b, count) as loop:
            first = smaller(b, b.mul(loop.index, int64(LANES)), b.sub(width, int64(LANES)))
            first = b.select(b.icmp_signed("<", first, int64(0)), int64(0), first)
            # past the last of few channels, it is read again
            index = [smaller(b, b.add(first, int64(j)), b.sub(width, int64(1))) for j in range(LANES)]
            channels = [Channel(b, kind.literal_value, place, i) for i in index]
            scale = _vector(b, [c.scale for c in channels])
            low = _vector(b, [c.low for c in channels])
            for i in range(n):
                sums = []
                for channel in channels:
                    total = same(0.0)
                    for codes, w in zip(channel.codes, own[i], strict=True):
                        total = vector_call(b, "fmuladd", codes, w, total)
                    sums.append(total)
                at = b.mul(b.add(b.mul(count, int64(i)), loop.index), int64(4 * LANES))
                found = vector_call(b, "fmuladd", low, whole_weight[i], load_vector(b, out, at))
                store_vector(b, vector_call(b, "fmuladd", scale, totals(b, sums), found), out, at)
        return context.get_dummy_value()

    place = (numbers, scale, low, stride, scale_stride)
    return types.void(g, kind, weights, *place, width, out), emit


def _weights(b: Builder, g: int, steps: Value, query: int, vector: int) -> Value:
    """The weights of a query for one vector of tokens, gathered from its steps."""
    parts = [b.load(_chunk(b, g, steps, query, vector, k), align=4) for k in range(g)]
    while len(parts) > 1:
        width = parts[0].type.count
        both = ir.Constant(ir.VectorType(I32, 2 * width), list(range(2 * width)))
        parts = [b.shuffle_vector(x, y, both) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _vector(b: Builder, scalars: Sequence[Value]) -> Value:
    """LANES scalars side by side."""
    out = ir.Constant(FLOAT_VECTOR, ir.Undefined)
    for i, x in enumerate(scalars):
        out = b.insert_element(out, x, ir.Constant(I32, i))
    return out
