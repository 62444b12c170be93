"""Dot products of queries with keys that are rebuilt from latents and rotated, as steps of `numba_kernel`.

A key is a linear map of its token's latent, plus a mean, rotated at the token's position. CHANNEL_BLOCK
tokens are decoded at a time, whatever packing holds them. TILE of them are rebuilt together, two vectors of
channels at a time: those that the rotary embedding turns with one another. Queries then meet these few keys.

The *words* of a decoded token are its numbers in fp32; or two numbers of bf16 each, where the model computes
in bf16 and the CPU multiplies pairs of them with sums in fp32. The cosine and sine of a position p are those
of p - p % STRIDE and of p % STRIDE, added as angles. So two small tables serve any number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lowkey.backends.numba_cache import kept_cfunc
from lowkey.backends.numba_channels import CHANNEL_BLOCK, VECTORS, Channel
from lowkey.backends.numba_ir import (
    BYTES_PER_NUMBER,
    FLOAT_VECTOR,
    I16,
    I32,
    I64,
    INTEGER_VECTOR,
    LANES,
    STORED,
    Builder,
    Value,
    int64,
    larger_integer,
    literal,
    load_scalar,
    load_vector,
    pointer,
    smaller,
    spread,
    store_vector,
    transposed,
    vector_call,
)
from lowkey.backends.numba_vectors import Columns, call, score
from lowkey.backends.stored import STRIDE

MULTIPLIES_PAIRS = bool(LANES == 16 and binding.get_host_cpu_features().get("avx512bf16"))
TILE = LANES // 2  # tokens that are rebuilt at a time: twice as many sums fill half of the registers
VECTOR = 4 * LANES  # bytes of a vector
# What a record says, all in int64: the addresses of a row's queries, map, mean and positions, and of the
# coarse and the fine table; pairs of vectors of a key, and words of a token; the address of a decoder, and
# that of room for CHANNEL_BLOCK tokens and their keys.
RECORD = 10


class _BFloat(ir.Type):
    """A number of bf16, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _plus_product(b: Builder, total: Value, x: Value, y: Value, pairs: bool) -> Value:
    """total + x y in every lane; with pairs, both products of the numbers of bf16 in a word are added."""
    if not pairs:
        return vector_call(b, "fmuladd", x, y, total)
    numbers = ir.VectorType(_BFloat(), 2 * LANES)
    kind = ir.FunctionType(FLOAT_VECTOR, [FLOAT_VECTOR, numbers, numbers])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return b.call(function, [total, b.bitcast(x, numbers), b.bitcast(y, numbers)])


def _rounded(b: Builder, x: Value, bits: int) -> Value:
    """A vector of fp32 without the last bits of its mantissas, to the nearest, ties to even."""
    if not bits:
        return x

    def constant(n: int) -> Value:
        return ir.Constant(INTEGER_VECTOR, [n] * LANES)

    raw = b.bitcast(x, INTEGER_VECTOR)
    up = b.add(constant(2 ** (bits - 1) - 1), b.and_(b.lshr(raw, constant(bits)), constant(1)))
    return b.bitcast(b.and_(b.add(raw, up), constant(2**32 - 2**bits)), FLOAT_VECTOR)


def _stored(b: Builder, x: Value, pairs: bool) -> Value:
    """Numbers in fp32 as tokens keep them once they are decoded: a vector or a scalar."""
    if not pairs:
        return x
    vector = isinstance(x.type, ir.VectorType)
    whole = INTEGER_VECTOR if vector else I32

    def constant(n: int) -> Value:
        return ir.Constant(whole, [n] * LANES if vector else n)

    raw = b.bitcast(x, whole)
    up = b.add(constant(0x7FFF), b.and_(b.lshr(raw, constant(16)), constant(1)))
    return b.trunc(b.lshr(b.add(raw, up), constant(16)), STORED["bfloat16"] if vector else I16)


def _keep(b: Builder, x: Value, pairs: bool, out: Value, place: Value) -> None:
    """Write numbers of a decoded token, from the one at `place` on."""
    size = 2 if pairs else 4
    kept = _stored(b, x, pairs)
    b.store(kept, pointer(b, out, b.mul(place, int64(size)), kept.type), align=size)


@literal
def decode_token(
    _: Any,
    kind: Any,
    pairs: Any,
    numbers: Any,
    scale: Any,
    low: Any,
    groups: Any,
    size: Any,
    out: Any,
) -> Any:
    """Decode a token whose groups have at least LANES channels each; see `numba_vectors` for the kind."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        numbers, scale, low, groups, size, out = args[2:]
        place = numbers, scale, low, int64(0), int64(0), groups, size
        columns = Columns(b, kind.literal_value, LANES, place, int64(1))
        with columns.each() as (_, rows):
            _keep(b, rows[0], pairs.literal_value, out, columns.start)
        return context.get_dummy_value()

    return types.void(kind, pairs, numbers, scale, low, groups, size, out), emit


@literal
def decode_number(
    _: Any, kind: Any, pairs: Any, numbers: Any, scale: Any, low: Any, place: Any, out: Any, to: Any
) -> Any:
    """Decode the number at `place`, which has this scale and offset, and write it as number `to`."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        numbers, scale, low, place, out, to = args[2:]
        how, number = kind.literal_value.split(), kind.literal_value.split()[-1]
        if len(how) == 1:
            x = load_scalar(b, b.add(numbers, b.mul(place, int64(BYTES_PER_NUMBER[number]))), number)
        else:
            bits = int(how[0][-1])
            at = b.mul(place, int64(bits))
            byte = b.zext(b.load(pointer(b, numbers, b.lshr(at, int64(3)), ir.IntType(8))), I64)
            code = b.and_(b.lshr(byte, b.and_(at, int64(7))), int64(2**bits - 1))
            scaled = b.fmul(b.sitofp(code, ir.FloatType()), load_scalar(b, scale, number))
            x = b.fadd(scaled, load_scalar(b, low, number))
        _keep(b, x, pairs.literal_value, out, to)
        return context.get_dummy_value()

    return types.void(kind, pairs, numbers, scale, low, place, out, to), emit


@literal
def decode_channels(
    _: Any,
    kind: Any,
    pairs: Any,
    numbers: Any,
    scale: Any,
    low: Any,
    stride: Any,
    scale_stride: Any,
    first: Any,
    out: Any,
    token: Any,
) -> Any:
    """Decode LANES channels of a block of tokens, from `first` on; a decoded token has `token` bytes."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        *place, first, out, token = args[2:]
        channels = []
        for j in range(LANES):
            channel = Channel(b, kind.literal_value, place, b.add(first, int64(j)))
            scale, low = spread(b, channel.scale), spread(b, channel.low)
            channels.append([vector_call(b, "fmuladd", codes, scale, low) for codes in channel.codes])
        for v in range(VECTORS):
            for i, x in enumerate(transposed(b, [vectors[v] for vectors in channels])):
                to = b.add(out, b.mul(token, int64(v * LANES + i)))
                _keep(b, x, pairs.literal_value, to, first)
        return context.get_dummy_value()

    return types.void(kind, pairs, numbers, scale, low, stride, scale_stride, first, out, token), emit


@literal
def store_zero(_: Any, pairs: Any, out: Any, place: Any) -> Any:
    """Write a zero as the number at `place` of a decoded token."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        _keep(b, ir.Constant(ir.FloatType(), 0.0), pairs.literal_value, *args[1:])
        return context.get_dummy_value()

    return types.void(pairs, out, place), emit


def _sums(
    b: Builder, pairs: bool, tokens: Value, token: Value, words: Value, maps: Value, mean: Value
) -> list[list[Value]]:
    """A pair of vectors of TILE keys before their rotation, each in a register; see `rebuild`."""
    start = [load_vector(b, mean, int64(side * VECTOR)) for side in (0, 1)]
    sums = [[cgutils.alloca_once(b, FLOAT_VECTOR) for _ in start] for _ in range(TILE)]
    for both in sums:
        for total, x in zip(both, start, strict=True):
            b.store(x, total)
    rows = [b.add(tokens, b.mul(token, int64(i))) for i in range(TILE)]
    with cgutils.for_range(b, words) as loop:
        at = b.mul(loop.index, int64(2 * VECTOR))
        own = [load_vector(b, maps, b.add(at, int64(side * VECTOR))) for side in (0, 1)]
        for row, both in zip(rows, sums, strict=True):
            x = spread(b, load_scalar(b, b.add(row, b.mul(loop.index, int64(4)))))
            for total, y in zip(both, own, strict=True):
                b.store(_plus_product(b, b.load(total), x, y, pairs), total)
    return sums


def _store_turned(b: Builder, both: Sequence[Value], cos: Value, sin: Value, out: Value) -> None:
    """Rotate a pair of vectors of a key, and write it."""
    x, y = (b.load(total) for total in both)
    store_vector(b, vector_call(b, "fmuladd", x, cos, b.fneg(b.fmul(y, sin))), out)
    store_vector(b, vector_call(b, "fmuladd", y, cos, b.fmul(x, sin)), out, int64(VECTOR))


@literal
def rebuild_in_order(
    _: Any,
    pairs: Any,
    tokens: Any,
    token: Any,
    words: Any,
    maps: Any,
    mean: Any,
    turns: Any,
    keys: Any,
    key: Any,
) -> Any:
    """As `rebuild`, of tokens at positions in order.

    `turns` is the address of the pair's cosines and sines at the first position; those of the next lie as far
    behind as the next key.
    """

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        tokens, token, words, maps, mean, turns, keys, key = args[1:]
        for i, both in enumerate(_sums(b, pairs.literal_value, tokens, token, words, maps, mean)):
            at = b.mul(key, int64(i))
            turn = b.add(turns, at)
            cos, sin = load_vector(b, turn), load_vector(b, turn, int64(VECTOR))
            _store_turned(b, both, cos, sin, b.add(keys, at))
        return context.get_dummy_value()

    return types.void(pairs, tokens, token, words, maps, mean, turns, keys, key), emit


@literal
def rebuild(
    _: Any,
    pairs: Any,
    bits: Any,
    tokens: Any,
    token: Any,
    words: Any,
    maps: Any,
    mean: Any,
    positions: Any,
    left: Any,
    coarse: Any,
    fine: Any,
    table: Any,
    keys: Any,
    key: Any,
) -> Any:
    """Rebuild a pair of vectors of TILE keys, rotate them, and write them.

    Args:
        pairs: whether a word is two numbers of bf16.
        bits: of the mantissa that the model's dtype leaves out, in which the model rotates.
        tokens: the address of the decoded tokens.
        token: bytes from one to the next.
        words: of each.
        maps: the address of (words, 2, LANES).
        mean: of (2, LANES), in fp32.
        positions: of the tokens' positions, int32.
        left: how many tokens there are; past the last, its position counts again.
        coarse, fine: of this pair's part of the tables.
        table: bytes from cosines to sines, half of those from row to row.
        keys: of the pair in the first key.
        key: bytes to the next key.
    """

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        tokens, token, words, maps, mean, positions, left, coarse, fine, table, keys, key = args[2:]
        sums = _sums(b, pairs.literal_value, tokens, token, words, maps, mean)
        for i, both in enumerate(sums):
            at = smaller(b, int64(i), b.sub(left, int64(1)))
            at = b.load(pointer(b, positions, b.mul(at, int64(4)), I32), align=4)
            position = larger_integer(b, b.sext(at, I64), int64(0))
            rows_of_tables = (
                b.add(coarse, b.mul(b.mul(table, int64(2)), b.sdiv(position, int64(STRIDE)))),
                b.add(fine, b.mul(b.mul(table, int64(2)), b.srem(position, int64(STRIDE)))),
            )
            angles = _angle_sum(
                b, *(load_vector(b, x, at) for x in rows_of_tables for at in (int64(0), table))
            )
            cos, sin = (_rounded(b, angle, bits.literal_value) for angle in angles)
            _store_turned(b, both, cos, sin, b.add(keys, b.mul(key, int64(i))))
        return context.get_dummy_value()

    given = tokens, token, words, maps, mean, positions, left, coarse, fine, table, keys, key
    return types.void(pairs, bits, *given), emit


def _angle_sum(b: Builder, cos_a: Value, sin_a: Value, cos_b: Value, sin_b: Value) -> tuple[Value, Value]:
    """Cosines and sines of a + b."""
    cos = vector_call(b, "fmuladd", cos_a, cos_b, b.fneg(b.fmul(sin_a, sin_b)))
    return cos, vector_call(b, "fmuladd", sin_a, cos_b, b.fmul(cos_a, sin_b))


@intrinsic
def integer_at(_: Any, address: Any, index: Any) -> Any:
    """The int64 at this index from an address on."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        return b.load(pointer(b, args[0], b.mul(args[1], int64(8)), I64), align=8)

    return types.int64(address, index), emit


@literal
def pack_vector(_: Any, number: Any, pairs: Any, row: Any, has_next: Any, stride: Any, out: Any) -> Any:
    """Write LANES columns of a map's row as words, in pairs with those of the next row, if there is one."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        row, has_next, stride, out = args[2:]
        if not pairs.literal_value:
            store_vector(b, load_vector(b, row, None, number.literal_value), out)
            return context.get_dummy_value()
        there = b.icmp_signed("==", has_next, int64(1))
        sides = []
        for at in (row, b.select(there, b.add(row, stride), row)):
            raw = b.load(pointer(b, at, None, STORED["bfloat16"]), align=2)
            sides.append(b.zext(raw, INTEGER_VECTOR))
        second = b.select(there, sides[1], ir.Constant(INTEGER_VECTOR, [0] * LANES))
        words = b.or_(sides[0], b.shl(second, ir.Constant(INTEGER_VECTOR, [16] * LANES)))
        store_vector(b, b.bitcast(words, FLOAT_VECTOR), out)
        return context.get_dummy_value()

    return types.void(number, pairs, row, has_next, stride, out), emit


@literal
def pack_number(_: Any, number: Any, pairs: Any, row: Any, has_next: Any, stride: Any, out: Any) -> Any:
    """As `pack_vector`, for one column."""

    def emit(context: Any, b: Builder, signature: Any, args: Sequence[Value]) -> Value:
        row, has_next, stride, out = args[2:]
        if not pairs.literal_value:
            x = load_scalar(b, row, number.literal_value)
            b.store(x, pointer(b, out, None, ir.FloatType()), align=4)
            return context.get_dummy_value()
        there = b.icmp_signed("==", has_next, int64(1))
        sides = []
        for at in (row, b.select(there, b.add(row, stride), row)):
            sides.append(b.zext(b.load(pointer(b, at, None, I16), align=2), I32))
        second = b.select(there, sides[1], ir.Constant(I32, 0))
        word = b.or_(sides[0], b.shl(second, ir.Constant(I32, 16)))
        b.store(word, pointer(b, out, None, I32), align=4)
        return context.get_dummy_value()

    return types.void(number, pairs, row, has_next, stride, out), emit


@cache
def rebuilder(g: int, pairs: bool, bits: int) -> Any:
    """A C function that writes the dot products of g queries with `left` keys that it rebuilds.

    Args:
        g: queries that share one reading of the latents.
        pairs: whether words are pairs of bf16.
        bits: of the mantissa that the model's dtype leaves out, in which the model rotates.

    Returns:
        The function. It takes what `numba_kernel.scorer` takes, but for the address of a record in the place
        of a query.
    """
    per = LANES // g

    @kept_cfunc(types.void(*[types.int64] * 12))
    def by_rebuilding(
        record, numbers, scale, low, stride, scales, channel, scale_channel, groups, size, left, out
    ):
        query, maps, mean = integer_at(record, 0), integer_at(record, 1), integer_at(record, 2)
        positions, coarse, fine = integer_at(record, 3), integer_at(record, 4), integer_at(record, 5)
        count, words = integer_at(record, 6), integer_at(record, 7)
        decode, room = integer_at(record, 8), integer_at(record, 9)
        token, table = 4 * words, count * VECTOR
        keys, key = room + CHANNEL_BLOCK * token, 2 * table
        for begin in range(0, left, CHANNEL_BLOCK):
            tokens = min(CHANNEL_BLOCK, left - begin)
            place = stride, scales, channel, scale_channel, groups, size
            call(decode, (numbers, scale, low, *place, begin, tokens, room, token))
            for pair in range(count):
                for start in range(0, tokens, TILE):
                    rebuild(
                        pairs,
                        bits,
                        room + start * token,
                        token,
                        words,
                        maps + pair * words * 2 * VECTOR,
                        mean + pair * 2 * VECTOR,
                        positions + 4 * (begin + start),
                        tokens - start,
                        coarse + pair * VECTOR,
                        fine + pair * VECTOR,
                        table,
                        keys + start * key + pair * 2 * VECTOR,
                        key,
                    )
            for start in range(0, tokens, per):
                to, at, wide = out + (begin + start) // per * VECTOR, keys + start * key, key // 4
                score(g, "float32", query, at, at, at, key, 0, 1, wide, tokens - start, to)

    return by_rebuilding


@cache
def decoder(kind: str, pairs: bool) -> Any:
    """A C function that decodes `tokens` tokens, CHANNEL_BLOCK at most, from token `begin` of a row on.

    Args:
        kind: how they are stored; see `numba_vectors` and `numba_channels`.
        pairs: whether words are pairs of bf16.
    """
    if kind.startswith("channel"):

        @kept_cfunc(types.void(*[types.int64] * 13))
        def by_block(
            numbers, scale, low, stride, scales, channel, scale_channel, _, size, begin, tokens, out, token
        ):
            at, shift = numbers + begin // CHANNEL_BLOCK * stride, begin // CHANNEL_BLOCK * scales
            if size >= LANES:
                for c in range(0, size, LANES):
                    first, scaled, lowest = min(c, size - LANES), scale + shift, low + shift
                    decode_channels(
                        kind, pairs, at, scaled, lowest, channel, scale_channel, first, out, token
                    )
            for t in range(CHANNEL_BLOCK):
                for c in range(size if size < LANES else 0):
                    own = shift + c * scale_channel
                    decode_number(
                        kind, pairs, at + c * channel, scale + own, low + own, t, out + t * token, c
                    )
                if pairs and size % 2:
                    store_zero(pairs, out + t * token, size)

        return by_block

    number_bytes = BYTES_PER_NUMBER[kind.split()[-1]]

    @kept_cfunc(types.void(*[types.int64] * 13))
    def by_token(
        numbers, scale, low, stride, scales, channel, scale_channel, groups, size, begin, tokens, out, token
    ):
        for t in range(tokens):
            at, shift, to = numbers + (begin + t) * stride, (begin + t) * scales, out + t * token
            if size >= LANES:
                decode_token(kind, pairs, at, scale + shift, low + shift, groups, size, to)
            else:
                for c in range(groups * size):
                    own = shift + c // size * number_bytes
                    decode_number(kind, pairs, at, scale + own, low + own, c, to, c)
            if pairs and groups * size % 2:
                store_zero(pairs, to, groups * size)

    return by_token


@cache
def packer(number: str, pairs: bool) -> Any:
    """A C function that packs maps as `rebuild` reads them: pair of vectors by pair, word by word.

    Args:
        number: the dtype of the maps.
        pairs: whether words are pairs of bf16.

    Returns:
        The function. It takes the address of (h, r, d), strides in bytes, h, r, and the address of (vectors)
        first columns and of (vectors) counts of columns; words of a token; and the address of the result
        (h, vectors / 2, words, 2, LANES), of zeros.
    """
    size, at_once = BYTES_PER_NUMBER[number], 2 if pairs else 1

    @kept_cfunc(types.void(*[types.int64] * 11))
    def pack(maps, head, row, column, heads, rows, vectors, columns, counts, words, out):
        for h in range(heads):
            for v in range(vectors):
                first, count = integer_at(columns, v), integer_at(counts, v)
                to = out + ((h * (vectors // 2) + v // 2) * words * 2 + v % 2) * VECTOR
                for k in range(0, rows, at_once):
                    at = maps + h * head + k * row + first * column
                    more, place = np.int64(k + 1 < rows), to + k // at_once * 2 * VECTOR
                    if count == LANES and column == size:
                        pack_vector(number, pairs, at, more, row, place)
                    else:
                        for x in range(count):
                            pack_number(number, pairs, at + x * column, more, row, place + 4 * x)

    return pack
