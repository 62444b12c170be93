"""The inner steps of attention as vector code for `numba_kernel`, written in LLVM IR.

The compiler's own vectorisation of plain loops leaves half of the memory's bandwidth unused: it widens bf16
once for each query, sums each score across lanes by itself, and uses half of a wide register.

A *step* is LANES scores: g queries times LANES / g tokens, query by query. Addresses and strides are in
bytes. A *kind* says how numbers are stored: `bfloat16` for plain numbers, `int4 bfloat16` for integers of 4
bits with scales per token. `numba_channels` has the steps for scales per channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lowkey.backends.numba_ir import (
    BYTES_PER_NUMBER,
    FAINTEST,
    I32,
    I64,
    LANES,
    LOWEST,
    Builder,
    Value,
    capped,
    exp2,
    fetch,
    int64,
    larger,
    literal,
    load_codes,
    load_scalar,
    load_vector,
    pointer,
    same,
    smaller,
    spread,
    store_vector,
    swapped,
    totals,
    vector_call,
)

NARROW = "narrow "  # begins the kind of numbers in groups of fewer channels than a vector has


def _present(b: Builder, scores: Value, left: Value, keys: int) -> Value:
    """The scores, with LOWEST for keys past the last."""
    place = ir.Constant(ir.VectorType(I64, LANES), [i % keys for i in range(LANES)])
    return b.select(b.icmp_signed("<", place, spread(b, left)), scores, same(LOWEST))


class Columns:
    """The vectors that cover the next LANES / g tokens, decoded to fp32.

    Channels come in groups, those of a token that share a scale, or all of them in plain numbers. The last
    channels of a group are read by one more vector that ends at the group's last channel. Where it overlaps
    the vector before, the query is 0, and outputs are written twice. A *narrow* group has fewer channels than
    a vector, of which zeros fill the rest.

    Args:
        b: where instructions go.
        kind: how numbers are stored.
        g: queries of a step.
        place: addresses of numbers, scales and offsets of the first token, bytes from token to token of
            numbers and of scales, groups, and channels of a group.
        left: how many tokens there are; past the last, it is read again.
    """

    def __init__(self, b: Builder, kind: str, g: int, place: Sequence[Value], left: Value) -> None:
        numbers, scale, low, stride, scale_stride, self.groups, self.size = place
        self.count_of_narrow = self.size if kind.startswith(NARROW) else None
        kind = kind.removeprefix(NARROW)
        self.b, self.number = b, kind.split()[-1]
        self.bits = int(kind.split()[0].removeprefix("int")) if " " in kind else 0
        past = b.sub(left, int64(1))
        tokens = [smaller(b, int64(i), past) for i in range(LANES // g)]
        self.rows = [b.add(numbers, b.mul(stride, i)) for i in tokens]
        if self.bits:
            steps = [b.mul(scale_stride, i) for i in tokens]
            self.scales = [(b.add(scale, step), b.add(low, step)) for step in steps]
        self.last = int64(0) if self.count_of_narrow is not None else b.sub(self.size, int64(LANES))
        self.of_group = b.sdiv(b.add(self.size, int64(LANES - 1)), int64(LANES))
        self.count = b.mul(self.of_group, self.groups)

    @contextmanager
    def each(self) -> Iterator[tuple[Value, list[Value]]]:
        """Loop over vectors: (its number, the vector of each token). `start` becomes its first channel."""
        b = self.b
        if not self.bits:
            with cgutils.for_range(b, self.count) as loop:
                start = self.start = smaller(b, b.mul(loop.index, int64(LANES)), self.last)
                offset = b.mul(start, int64(BYTES_PER_NUMBER[self.number]))
                for row in self.rows:  # before the loads, so that memory works ahead
                    fetch(b, row, offset)
                few = self.count_of_narrow
                yield loop.index, [load_vector(b, row, offset, self.number, few) for row in self.rows]
            return
        for row in self.rows:
            fetch(b, row, int64(0))
        with cgutils.for_range(b, self.groups) as outer:
            at = b.mul(outer.index, int64(BYTES_PER_NUMBER[self.number]))
            scales = [
                [spread(b, load_scalar(b, b.add(x, at), self.number)) for x in both] for both in self.scales
            ]
            with cgutils.for_range(b, self.of_group) as inner:
                start = smaller(b, b.mul(inner.index, int64(LANES)), self.last)
                start = self.start = b.add(b.mul(outer.index, self.size), start)
                offset = b.lshr(b.mul(start, int64(self.bits)), int64(3))
                index = b.add(b.mul(outer.index, self.of_group), inner.index)
                yield (
                    index,
                    [
                        vector_call(
                            b,
                            "fmuladd",
                            load_codes(b, row, offset, self.bits, self.count_of_narrow),
                            scale,
                            low,
                        )
                        for row, (scale, low) in zip(self.rows, scales, strict=True)
                    ],
                )

    def slot(self, query: int, index: Value) -> Value:
        """The offset of vector `index` of a query's numbers, which are stored without overlap."""
        return self.b.mul(self.b.add(self.b.mul(self.count, int64(query)), index), int64(4 * LANES))


@literal
def score(
    _: Any,
    g: Any,
    kind: Any,
    query: Any,
    numbers: Any,
    scale: Any,
    low: Any,
    stride: Any,
    scale_stride: Any,
    groups: Any,
    size: Any,
    left: Any,
    out: Any,
) -> Any:
    """Write the dot products of one step to `out`."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        query, *place, left, out = args[2:]
        n = g.literal_value
        columns = Columns(b, kind.literal_value, n, place, left)
        sums = [cgutils.alloca_once_value(b, same(0.0)) for _ in range(LANES)]
        with columns.each() as (index, keys):
            for i in range(n):
                x = load_vector(b, query, columns.slot(i, index))
                for key, total in zip(keys, sums[i * len(keys) :], strict=False):
                    b.store(vector_call(b, "fmuladd", key, x, b.load(total)), total)
        store_vector(b, totals(b, [b.load(total) for total in sums]), out)
        return context.get_dummy_value()

    place = (numbers, scale, low, stride, scale_stride, groups, size)
    return types.void(g, kind, query, *place, left, out), emit


@literal
def finish_scores(_: Any, g: Any, cap: Any, masks: Any, token: Any, left: Any, scores: Any, top: Any) -> Any:
    """Turn one step of dot products into scores, and write the largest seen in each lane to `top`.

    `masks` is 0, or the address of g addresses: of the bytes that say which tokens each query sees, at which
    `token` says where this step begins.
    """

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        cap, masks, token, left, scores, top = args[1:]
        n = g.literal_value
        found = _present(b, capped(b, load_vector(b, scores), cap), left, LANES // n)
        kept = cgutils.alloca_once_value(b, found)
        with b.if_then(b.icmp_unsigned("!=", masks, int64(0)), likely=False):
            b.store(b.select(_seen(b, n, masks, token), found, same(LOWEST)), kept)
        found = b.load(kept)
        store_vector(b, found, scores)
        store_vector(b, larger(b, found, load_vector(b, top)), top)
        return context.get_dummy_value()

    return types.void(g, cap, masks, token, left, scores, top), emit


def _seen(b: Builder, g: int, masks: Value, token: Value) -> Value:
    """Which tokens of a step the masks let its queries see, as a vector of booleans."""
    per, byte = LANES // g, ir.IntType(8)
    parts = []
    for i in range(g):
        mask = b.load(pointer(b, masks, int64(8 * i), I64), align=8)
        parts.append(b.load(pointer(b, mask, token, ir.VectorType(byte, per)), align=1))
    while len(parts) > 1:
        width = parts[0].type.count
        both = ir.Constant(ir.VectorType(I32, 2 * width), list(range(2 * width)))
        parts = [b.shuffle_vector(x, y, both) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return b.icmp_unsigned("!=", parts[0], ir.Constant(ir.VectorType(byte, LANES), [0] * LANES))


@literal
def level(_: Any, g: Any, top: Any) -> Any:
    """Give all lanes of a query the largest of them."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        x, shift = load_vector(b, args[1]), 1
        while shift < LANES // g.literal_value:
            x, shift = larger(b, x, swapped(b, x, shift)), 2 * shift
        store_vector(b, x, args[1])
        return context.get_dummy_value()

    return types.void(g, top), emit


@intrinsic
def fill_memory(_: Any, to: Any, value: Any) -> Any:
    """Write the same number to every lane."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        store_vector(b, spread(b, args[1]), args[0])
        return context.get_dummy_value()

    return types.void(to, types.float32), emit


@intrinsic
def weigh(_: Any, scores: Any, top: Any, total: Any) -> Any:
    """Turn one step of scores into weights, exp2(score - top), and add them to `total`."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        scores, top, total = args
        below = b.fsub(load_vector(b, scores), load_vector(b, top))
        weights = b.select(b.fcmp_ordered(">", below, same(FAINTEST)), exp2(b, below), same(0.0))
        store_vector(b, weights, scores)
        store_vector(b, b.fadd(weights, load_vector(b, total)), total)
        return context.get_dummy_value()

    return types.void(scores, top, total), emit


@literal
def mix(
    _: Any,
    g: Any,
    kind: Any,
    weights: Any,
    numbers: Any,
    scale: Any,
    low: Any,
    stride: Any,
    scale_stride: Any,
    groups: Any,
    size: Any,
    left: Any,
    out: Any,
) -> Any:
    """Add the weighted values of one step to `out` (g, vectors, LANES)."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        weights, *place, left, out = args[2:]
        columns = Columns(b, kind.literal_value, g.literal_value, place, left)
        step = load_vector(b, weights)
        spread_out = [spread(b, b.extract_element(step, ir.Constant(I32, i))) for i in range(LANES)]
        with columns.each() as (index, rows):
            for i in range(g.literal_value):
                at = columns.slot(i, index)
                total = load_vector(b, out, at)
                for row, weight in zip(rows, spread_out[i * len(rows) :], strict=False):
                    total = vector_call(b, "fmuladd", row, weight, total)
                store_vector(b, total, out, at)
        return context.get_dummy_value()

    place = (numbers, scale, low, stride, scale_stride, groups, size)
    return types.void(g, kind, weights, *place, left, out), emit


@intrinsic
def add(_: Any, counter: Any, amount: Any) -> Any:
    """Atomically add to the int64 at this address, and return what was there before."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        return b.atomic_rmw("add", pointer(b, args[0], None, I64), args[1], "seq_cst")

    return types.int64(counter, amount), emit


@intrinsic
def call(_: Any, function: Any, arguments: Any) -> Any:
    """Call the C function at this address, which returns nothing, with a tuple of arguments."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        given = cgutils.unpack_tuple(b, args[1])
        kind = ir.FunctionType(ir.VoidType(), [x.type for x in given])
        b.call(b.inttoptr(args[0], kind.as_pointer()), given)
        return context.get_dummy_value()

    return types.void(function, arguments), emit
