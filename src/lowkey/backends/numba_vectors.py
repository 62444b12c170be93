"""The inner steps of attention as vector code for `numba_kernel`, written in LLVM IR.

The compiler's own vectorisation of plain loops leaves half of the memory's bandwidth unused: it widens bf16
once for each query, sums each score across lanes by itself, and uses half of a wide register. Only generic
vector instructions are used here, so any CPU will do.

A *step* is LANES scores: g queries times LANES / g keys, query by query. Addresses and strides are in bytes.
The last columns of a row are read by one more vector that ends at the last column. Where it overlaps the
vector before, the query is 0, and outputs are written twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
# Rows this far ahead are fetched while others are computed; else memory and arithmetic would take turns.
PREFETCH_BYTES = 8192
LOWEST = -3e38  # the score of a key that is not there
# Powers of 2 below this become 0. They are far below what sums in fp32 keep, and subnormal numbers are slow.
FAINTEST = -100.0

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
BYTES = ir.IntType(8).as_pointer()
FLOAT_VECTOR, INTEGER_VECTOR = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(I32, LANES)
STORED = {
    "float32": FLOAT_VECTOR,
    "bfloat16": ir.VectorType(I16, LANES),
    "float16": ir.VectorType(ir.HalfType(), LANES),
}
BYTES_PER_NUMBER = {"float32": 4, "bfloat16": 2, "float16": 2}
# coefficients of 2^x for x in [-1/2, 1/2], highest power first, from Cephes
EXP2 = (1.535336188e-4, 1.339887440e-3, 9.618437358e-3, 5.550332471e-2, 2.402264791e-1, 6.931472029e-1, 1.0)

Builder = ir.IRBuilder
Value = ir.Value
literal = intrinsic(prefer_literal=True)


def _whole(value: int) -> Value:
    """A constant of 64 bits."""
    return ir.Constant(I64, value)


def _same(value: float) -> Value:
    """A vector constant with the same number in every lane."""
    return ir.Constant(FLOAT_VECTOR, [value] * LANES)


def _spread(b: Builder, x: Value) -> Value:
    """The scalar x in every lane."""
    one = b.insert_element(ir.Constant(ir.VectorType(x.type, LANES), ir.Undefined), x, ir.Constant(I32, 0))
    return b.shuffle_vector(one, one, ir.Constant(INTEGER_VECTOR, [0] * LANES))


def _call(b: Builder, name: str, *args: Value) -> Value:
    """An LLVM intrinsic on vectors of numbers."""
    kind = ir.FunctionType(FLOAT_VECTOR, [FLOAT_VECTOR] * len(args))
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}.v{LANES}f32"), args)


def _pointer(b: Builder, address: Value, offset: Value | None = None, kind: ir.Type = FLOAT_VECTOR) -> Value:
    return b.bitcast(
        b.gep(b.inttoptr(address, BYTES), [_whole(0) if offset is None else offset]), kind.as_pointer()
    )


def _load(b: Builder, address: Value, offset: Value | None = None, kind: str = "float32") -> Value:
    """LANES stored numbers, widened."""
    raw = b.load(_pointer(b, address, offset, STORED[kind]), align=BYTES_PER_NUMBER[kind])
    if kind == "bfloat16":  # the upper half of an fp32 number
        return b.bitcast(
            b.shl(b.zext(raw, INTEGER_VECTOR), ir.Constant(INTEGER_VECTOR, [16] * LANES)), FLOAT_VECTOR
        )
    return raw if kind == "float32" else b.fpext(raw, FLOAT_VECTOR)


def _store(b: Builder, x: Value, address: Value, offset: Value | None = None) -> None:
    b.store(x, _pointer(b, address, offset), align=4)


def _fetch(b: Builder, address: Value, offset: Value) -> None:
    """Prefetch the memory PREFETCH_BYTES ahead; past the end of an array that is harmless."""
    kind = ir.FunctionType(ir.VoidType(), [BYTES, I32, I32, I32])
    where = _pointer(b, address, b.add(offset, _whole(PREFETCH_BYTES)), ir.IntType(8))
    read, second_level, data = (ir.Constant(I32, n) for n in (0, 2, 1))
    b.call(
        cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0"), [where, read, second_level, data]
    )


def _smaller(b: Builder, x: Value, y: Value) -> Value:
    return b.select(b.icmp_signed("<", x, y), x, y)


def _larger(b: Builder, x: Value, y: Value) -> Value:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _totals(b: Builder, parts: Sequence[Value]) -> Value:
    """Lane i becomes the sum over all lanes of parts[i], in log2(LANES) rounds that halve pairs."""
    width = LANES
    while len(parts) > 1:
        left = [start + i for start in range(0, 2 * LANES, width) for i in range(width // 2)]
        halves = [ir.Constant(INTEGER_VECTOR, [i + shift for i in left]) for shift in (0, width // 2)]
        parts = [
            b.fadd(*(b.shuffle_vector(x, y, half) for half in halves))
            for x, y in zip(parts[::2], parts[1::2], strict=True)
        ]
        width //= 2
    return parts[0]


def _exp2(b: Builder, x: Value) -> Value:
    """2^x in every lane: a polynomial for the fraction, and the exponent bits for the whole part."""
    x = _larger(b, _same(-126.0), b.select(b.fcmp_ordered(">", x, _same(126.0)), _same(126.0), x))
    n = _call(b, "rint", x)
    f, y = b.fsub(x, n), _same(EXP2[0])
    for c in EXP2[1:]:
        y = _call(b, "fmuladd", y, f, _same(c))
    exponent = b.add(b.fptosi(n, INTEGER_VECTOR), ir.Constant(INTEGER_VECTOR, [127] * LANES))
    return b.fmul(y, b.bitcast(b.shl(exponent, ir.Constant(INTEGER_VECTOR, [23] * LANES)), FLOAT_VECTOR))


def _capped(b: Builder, x: Value, cap: Value) -> Value:
    """cap tanh(y), given x = 2 y / ln 2; a cap of 0 is none."""
    kept = cgutils.alloca_once_value(b, x)
    with b.if_then(b.fcmp_ordered("!=", cap, ir.Constant(ir.FloatType(), 0.0)), likely=False):
        tanh = b.fsub(_same(1.0), b.fdiv(_same(2.0), b.fadd(_exp2(b, x), _same(1.0))))
        b.store(b.fmul(_spread(b, cap), tanh), kept)
    return b.load(kept)


def _rows(b: Builder, address: Value, stride: Value, left: Value, count: int) -> list[Value]:
    """The addresses of the next `count` rows; past the last of `left` rows, the last one again."""
    last = b.sub(left, _whole(1))
    return [b.add(address, b.mul(stride, _smaller(b, _whole(i), last))) for i in range(count)]


def _present(b: Builder, scores: Value, left: Value, keys: int) -> Value:
    """The scores, with LOWEST for keys past the last."""
    place = ir.Constant(ir.VectorType(I64, LANES), [i % keys for i in range(LANES)])
    return b.select(b.icmp_signed("<", place, _spread(b, left)), scores, _same(LOWEST))


class _Columns:
    """The vectors that cover rows of `width` numbers, for the LANES / g rows from `address` on."""

    def __init__(
        self, b: Builder, kind: str, g: int, address: Value, stride: Value, left: Value, width: Value
    ) -> None:
        self.b, self.kind = b, kind
        self.rows = _rows(b, address, stride, left, LANES // g)
        self.last = b.sub(width, _whole(LANES))
        self.count = b.sdiv(b.add(width, _whole(LANES - 1)), _whole(LANES))

    def load(self, index: Value) -> list[Value]:
        """Vector `index` of each row, widened to fp32."""
        offset = self.b.mul(
            _smaller(self.b, self.b.mul(index, _whole(LANES)), self.last), _whole(BYTES_PER_NUMBER[self.kind])
        )
        for row in self.rows:  # before the loads, so that memory works ahead
            _fetch(self.b, row, offset)
        return [_load(self.b, row, offset, self.kind) for row in self.rows]

    def place(self, query: int, index: Value) -> Value:
        """The offset of vector `index` of a query's numbers, which are stored without overlap."""
        return self.b.mul(self.b.add(self.b.mul(self.count, _whole(query)), index), _whole(4 * LANES))


def _dots(b: Builder, columns: _Columns, g: int, query: Value) -> Value:
    """The dot products of one step, one in each lane."""
    sums = [cgutils.alloca_once_value(b, _same(0.0)) for _ in range(LANES)]
    with cgutils.for_range(b, columns.count) as loop:
        keys = columns.load(loop.index)
        for i in range(g):
            x = _load(b, query, columns.place(i, loop.index))
            for key, total in zip(keys, sums[i * len(keys) :], strict=False):
                b.store(_call(b, "fmuladd", key, x, b.load(total)), total)
    return _totals(b, [b.load(total) for total in sums])


@literal
def score(
    _: Any,
    g: Any,
    kind: Any,
    cap: Any,
    query: Any,
    keys: Any,
    stride: Any,
    left: Any,
    width: Any,
    out: Any,
    top: Any,
) -> Any:
    """Write one step of scores, in units of ln 2, to `out`, and the largest seen in each lane to `top`."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        cap, query, keys, stride, left, width, out, top = args[2:]
        n = g.literal_value
        scores = _capped(
            b, _dots(b, _Columns(b, kind.literal_value, n, keys, stride, left, width), n, query), cap
        )
        scores = _present(b, scores, left, LANES // n)
        _store(b, scores, out)
        _store(b, _larger(b, scores, _load(b, top)), top)
        return context.get_dummy_value()

    return types.void(g, kind, cap, query, keys, stride, left, width, out, top), emit


@literal
def level(_: Any, g: Any, top: Any) -> Any:
    """Give all lanes of a query the largest of them."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        x, shift = _load(b, args[1]), 1
        while shift < LANES // g.literal_value:
            x = _larger(
                b, x, b.shuffle_vector(x, x, ir.Constant(INTEGER_VECTOR, [i ^ shift for i in range(LANES)]))
            )
            shift *= 2
        _store(b, x, args[1])
        return context.get_dummy_value()

    return types.void(g, top), emit


@intrinsic
def fill_memory(_: Any, to: Any, value: Any) -> Any:
    """Write the same number to every lane."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        _store(b, _spread(b, args[1]), args[0])
        return context.get_dummy_value()

    return types.void(to, types.float32), emit


@intrinsic
def weigh(_: Any, scores: Any, top: Any, total: Any) -> Any:
    """Turn one step of scores into weights, exp2(score - top), and add them to `total`."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        scores, top, total = args
        below = b.fsub(_load(b, scores), _load(b, top))
        weights = b.select(b.fcmp_ordered(">", below, _same(FAINTEST)), _exp2(b, below), _same(0.0))
        _store(b, weights, scores)
        _store(b, b.fadd(weights, _load(b, total)), total)
        return context.get_dummy_value()

    return types.void(scores, top, total), emit


@literal
def mix(
    _: Any, g: Any, kind: Any, weights: Any, values: Any, stride: Any, left: Any, width: Any, out: Any
) -> Any:
    """Add the weighted values of one step to `out` (g, vectors, LANES)."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        weights, values, stride, left, width, out = args[2:]
        columns = _Columns(b, kind.literal_value, g.literal_value, values, stride, left, width)
        step = _load(b, weights)
        spread = [_spread(b, b.extract_element(step, ir.Constant(I32, i))) for i in range(LANES)]
        with cgutils.for_range(b, columns.count) as loop:
            rows = columns.load(loop.index)
            for i in range(g.literal_value):
                total = _load(b, out, columns.place(i, loop.index))
                for row, weight in zip(rows, spread[i * len(rows) :], strict=False):
                    total = _call(b, "fmuladd", row, weight, total)
                _store(b, total, out, columns.place(i, loop.index))
        return context.get_dummy_value()

    return types.void(g, kind, weights, values, stride, left, width, out), emit


@intrinsic
def add(_: Any, counter: Any, amount: Any) -> Any:
    """Atomically add to the int64 at this address, and return what was there before."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        return b.atomic_rmw("add", _pointer(b, args[0], None, I64), args[1], "seq_cst")

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
