"""Vector instructions in LLVM IR for the kernels of `numba_kernel`: constants, loads, sums and powers of 2.

Only generic vector instructions are used here, so any CPU will do. Addresses and strides are in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import binding, ir
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


def int64(value: int) -> Value:
    """A constant of 64 bits."""
    return ir.Constant(I64, value)


def same(value: float) -> Value:
    """A vector constant with the same number in every lane."""
    return ir.Constant(FLOAT_VECTOR, [value] * LANES)


def spread(b: Builder, x: Value) -> Value:
    """The scalar x in every lane."""
    one = b.insert_element(ir.Constant(ir.VectorType(x.type, LANES), ir.Undefined), x, ir.Constant(I32, 0))
    return b.shuffle_vector(one, one, ir.Constant(INTEGER_VECTOR, [0] * LANES))


def vector_call(b: Builder, name: str, *args: Value) -> Value:
    """An LLVM intrinsic on vectors of numbers."""
    kind = ir.FunctionType(FLOAT_VECTOR, [FLOAT_VECTOR] * len(args))
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}.v{LANES}f32"), args)


def pointer(b: Builder, address: Value, offset: Value | None = None, kind: ir.Type = FLOAT_VECTOR) -> Value:
    return b.bitcast(
        b.gep(b.inttoptr(address, BYTES), [int64(0) if offset is None else offset]), kind.as_pointer()
    )


def load_vector(
    b: Builder,
    address: Value,
    offset: Value | None = None,
    kind: str = "float32",
    count: Value | None = None,
) -> Value:
    """LANES stored numbers, widened; with a count, only so many are read, and zeros follow."""
    raw = _load(b, address, offset, STORED[kind], BYTES_PER_NUMBER[kind], count)
    if kind == "bfloat16":  # the upper half of an fp32 number
        return b.bitcast(
            b.shl(b.zext(raw, INTEGER_VECTOR), ir.Constant(INTEGER_VECTOR, [16] * LANES)), FLOAT_VECTOR
        )
    return raw if kind == "float32" else b.fpext(raw, FLOAT_VECTOR)


def _load(
    b: Builder, address: Value, offset: Value | None, kind: ir.VectorType, align: int, count: Value | None
) -> Value:
    """A vector from memory; with a count, only so many elements are read, and zeros follow."""
    where = pointer(b, address, offset, kind)
    if count is None:
        return b.load(where, align=align)
    n, name = kind.count, str(kind.element)
    name = {"float": "f32", "half": "f16"}.get(name, name)
    place = ir.Constant(ir.VectorType(I64, n), list(range(n)))
    one = b.insert_element(ir.Constant(ir.VectorType(I64, n), ir.Undefined), count, ir.Constant(I32, 0))
    counts = b.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, n), [0] * n))
    mask = b.icmp_signed("<", place, counts)
    called = ir.FunctionType(kind, [where.type, I32, mask.type, kind])
    function = cgutils.get_or_insert_function(b.module, called, f"llvm.masked.load.v{n}{name}.p0")
    return b.call(function, [where, ir.Constant(I32, align), mask, ir.Constant(kind, None)])


def load_scalar(b: Builder, address: Value, kind: str = "float32") -> Value:
    """One stored number, widened."""
    of_kind = {"float32": ir.FloatType(), "bfloat16": I16, "float16": ir.HalfType()}[kind]
    raw = b.load(pointer(b, address, None, of_kind), align=BYTES_PER_NUMBER[kind])
    if kind == "bfloat16":
        return b.bitcast(b.shl(b.zext(raw, I32), ir.Constant(I32, 16)), ir.FloatType())
    return raw if kind == "float32" else b.fpext(raw, ir.FloatType())


def load_codes(b: Builder, address: Value, offset: Value, bits: int, count: Value | None = None) -> Value:
    """LANES codes of 8, 4 or 2 bits each, the first in the lowest bits, as fp32.

    With a count, a multiple of the codes of a byte, only so many are read, and zeros follow.
    """
    some = None if count is None else b.lshr(b.mul(count, int64(bits)), int64(3))
    raw = _load(b, address, offset, ir.VectorType(ir.IntType(8), LANES * bits // 8), 1, some)
    if bits == 8:
        return b.sitofp(b.zext(raw, INTEGER_VECTOR), FLOAT_VECTOR)
    per_word = 32 // bits
    words = LANES // per_word
    if words:
        raw = b.bitcast(raw, ir.VectorType(I32, words))
    else:  # fewer codes than a word holds
        raw = b.bitcast(b.zext(b.bitcast(raw, ir.IntType(LANES * bits)), I32), ir.VectorType(I32, 1))
    repeated = b.shuffle_vector(raw, raw, ir.Constant(INTEGER_VECTOR, [i // per_word for i in range(LANES)]))
    shifts = ir.Constant(INTEGER_VECTOR, [i % per_word * bits for i in range(LANES)])
    code = b.and_(b.lshr(repeated, shifts), ir.Constant(INTEGER_VECTOR, [2**bits - 1] * LANES))
    return b.sitofp(code, FLOAT_VECTOR)


def store_vector(b: Builder, x: Value, address: Value, offset: Value | None = None) -> None:
    b.store(x, pointer(b, address, offset), align=4)


def fetch(b: Builder, address: Value, offset: Value) -> None:
    """Prefetch the memory PREFETCH_BYTES ahead; past the end of an array that is harmless."""
    kind = ir.FunctionType(ir.VoidType(), [BYTES, I32, I32, I32])
    where = pointer(b, address, b.add(offset, int64(PREFETCH_BYTES)), ir.IntType(8))
    read, second_level, data = (ir.Constant(I32, n) for n in (0, 2, 1))
    b.call(
        cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0"), [where, read, second_level, data]
    )


def smaller(b: Builder, x: Value, y: Value) -> Value:
    return b.select(b.icmp_signed("<", x, y), x, y)


def larger_integer(b: Builder, x: Value, y: Value) -> Value:
    return b.select(b.icmp_signed(">", x, y), x, y)


def larger(b: Builder, x: Value, y: Value) -> Value:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def summed(b: Builder, x: Value) -> Value:
    """The sum over all lanes, in every lane."""
    shift = 1
    while shift < LANES:
        x, shift = b.fadd(x, swapped(b, x, shift)), 2 * shift
    return x


def swapped(b: Builder, x: Value, shift: int) -> Value:
    """Lane i becomes lane i ^ shift."""
    return b.shuffle_vector(x, x, ir.Constant(INTEGER_VECTOR, [i ^ shift for i in range(LANES)]))


def totals(b: Builder, parts: Sequence[Value]) -> Value:
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


def transposed(b: Builder, rows: Sequence[Value]) -> list[Value]:
    """LANES vectors, of which lane i of vector j becomes lane j of vector i."""
    rows, shift = list(rows), 1
    while shift < LANES:
        lower = [i + LANES - shift if i & shift else i for i in range(LANES)]
        upper = [i + LANES if i & shift else i + shift for i in range(LANES)]
        for i in range(LANES):
            if not i & shift:
                pair = rows[i], rows[i | shift]
                for at, lanes in ((i, lower), (i | shift, upper)):
                    rows[at] = b.shuffle_vector(*pair, ir.Constant(INTEGER_VECTOR, lanes))
        shift *= 2
    return rows


def exp2(b: Builder, x: Value) -> Value:
    """2^x in every lane: a polynomial for the fraction, and the exponent bits for the whole part."""
    x = larger(b, same(-126.0), b.select(b.fcmp_ordered(">", x, same(126.0)), same(126.0), x))
    n = vector_call(b, "rint", x)
    f, y = b.fsub(x, n), same(EXP2[0])
    for c in EXP2[1:]:
        y = vector_call(b, "fmuladd", y, f, same(c))
    exponent = b.add(b.fptosi(n, INTEGER_VECTOR), ir.Constant(INTEGER_VECTOR, [127] * LANES))
    return b.fmul(y, b.bitcast(b.shl(exponent, ir.Constant(INTEGER_VECTOR, [23] * LANES)), FLOAT_VECTOR))


def capped(b: Builder, x: Value, cap: Value) -> Value:
    """cap tanh(y), given x = 2 y / ln 2; a cap of 0 is none."""
    kept = cgutils.alloca_once_value(b, x)
    with b.if_then(b.fcmp_ordered("!=", cap, ir.Constant(ir.FloatType(), 0.0)), likely=False):
        tanh = b.fsub(same(1.0), b.fdiv(same(2.0), b.fadd(exp2(b, x), same(1.0))))
        b.store(b.fmul(spread(b, cap), tanh), kept)
    return b.load(kept)
