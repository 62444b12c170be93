"""How stored numbers are written down: as they are, or as integers with scales of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lowkey.core.types import LowkeyError
from lowkey.ops.quantize import Packed, dequantize, quantize

GROUP = 32  # numbers that share a scale
NO_BITS = "none"  # no integers, where a plan says otherwise


class Packing(Protocol):
    """pack: (b, G, s, r), s a multiple of `block`, -> the tensors held, one for each of `fields`, whose
    dimension `axis` grows with s;
    unpack: back to (b, G, s, r), given r; nbytes: of s tokens of one head, in a model of so many bytes per
    number."""

    block: ClassVar[int]
    axis: ClassVar[int]
    fields: ClassVar[tuple[str, ...]]

    def pack(self, x: Tensor) -> tuple[Tensor, ...]: ...
    def unpack(self, parts: tuple[Tensor, ...], width: int) -> Tensor: ...
    def nbytes(self, tokens: int, width: int, itemsize: int) -> int: ...


@dataclass(frozen=True)
class Unpacked:
    """As the model's own numbers."""

    block: ClassVar[int] = 1
    axis: ClassVar[int] = 2
    fields: ClassVar[tuple[str, ...]] = ("",)

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,)

    def unpack(self, parts: tuple[Tensor, ...], width: int) -> Tensor:
        return parts[0]

    def nbytes(self, tokens: int, width: int, itemsize: int) -> int:
        return tokens * width * itemsize


@dataclass(frozen=True)
class PerToken:
    """Integers of 2, 4 or 8 bits; channels of one token in groups of at most 32 share a scale and an offset
    in the model's dtype.
    """

    bits: int
    block: ClassVar[int] = 1
    axis: ClassVar[int] = 2
    fields: ClassVar[tuple[str, ...]] = ("codes", "scale", "low")

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        groups, size = self._groups(x.shape[-1])
        return quantize(_padded(x, groups * size), self.bits, size).tensors

    def unpack(self, parts: tuple[Tensor, ...], width: int) -> Tensor:
        return dequantize(packed_parts(parts, self.bits))[..., :width]

    def nbytes(self, tokens: int, width: int, itemsize: int) -> int:
        groups, size = self._groups(width)
        return tokens * groups * (size * self.bits // 8 + 2 * itemsize)

    def _groups(self, width: int) -> tuple[int, int]:
        """(groups, channels of each): as even as can be, and whole bytes."""
        groups = math.ceil(width / GROUP)
        size = math.ceil(width / groups)
        return groups, size + -size % (8 // self.bits)


@dataclass(frozen=True)
class PerChannel:
    """Integers of 2, 4 or 8 bits; one channel of 32 tokens in a row shares a scale and an offset, as KIVI
    does for keys (arXiv:2402.02750), in which a few channels are much larger than the others. KIVI's values
    leave the exact window one by one; ours leave with their keys, in the same blocks."""

    bits: int
    block: ClassVar[int] = GROUP
    axis: ClassVar[int] = 3
    fields: ClassVar[tuple[str, ...]] = ("codes", "scale", "low")

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        return quantize(x.mT, self.bits, GROUP).tensors

    def unpack(self, parts: tuple[Tensor, ...], width: int) -> Tensor:
        return dequantize(packed_parts(parts, self.bits)).mT

    def nbytes(self, tokens: int, width: int, itemsize: int) -> int:
        return width * tokens // GROUP * (GROUP * self.bits // 8 + 2 * itemsize)


def joined_parts(old: tuple[Tensor, ...], new: tuple[Tensor, ...], axis: int) -> tuple[Tensor, ...]:
    """More tokens behind those held."""
    return tuple(torch.cat(pair, axis) for pair in zip(old, new, strict=True))


def packed_parts(parts: tuple[Tensor, ...], bits: int) -> Packed:
    codes, scale, low = parts
    return Packed(codes, scale, low, bits)


def _padded(x: Tensor, width: int) -> Tensor:
    """To more channels by repeating the last, which leaves the scale of its group alone."""
    return (
        x
        if x.shape[-1] == width
        else torch.cat([x, x[..., -1:].expand(*x.shape[:-1], width - x.shape[-1])], -1)
    )


@dataclass(frozen=True)
class Scheme:
    """How a cache's keys and values are packed. bits: of every stored number; recent: last tokens kept exact
    at least, unless `exact` is given; turned: keys and values pass a block Hadamard transform first, which
    spreads what is large in a few channels over all of them (arXiv:2407.21118)."""

    bits: int
    keys: Packing
    values: Packing
    recent: int = 0
    turned: bool = False


SCHEMES: dict[str, Callable[[], Scheme]] = {
    "int8": lambda: Scheme(8, PerToken(8), PerToken(8)),
    "int4": lambda: Scheme(4, PerToken(4), PerToken(4)),
    "int2": lambda: Scheme(2, PerToken(2), PerToken(2)),
    "kivi8": lambda: Scheme(8, PerChannel(8), PerToken(8), recent=GROUP),
    "kivi4": lambda: Scheme(4, PerChannel(4), PerToken(4), recent=GROUP),
    "kivi2": lambda: Scheme(2, PerChannel(2), PerToken(2), recent=GROUP),
    "hadamard8": lambda: Scheme(8, PerToken(8), PerToken(8), turned=True),
    "hadamard4": lambda: Scheme(4, PerToken(4), PerToken(4), turned=True),
    "hadamard2": lambda: Scheme(2, PerToken(2), PerToken(2), turned=True),
}


def scheme(bits: int | str) -> Scheme:
    """A scheme by name; 8, 4 and 2 are `int8`, `int4` and `int2`. Errors: LowkeyError for another."""
    name = scheme_name(bits)
    if name not in SCHEMES:
        raise LowkeyError(f"bits {bits!r}: packed storage is one of 8, 4, 2, {', '.join(SCHEMES)}")
    return SCHEMES[name]()


def scheme_or_none(bits: int | str | None) -> Scheme | None:
    """A scheme by name, or None for the model's own numbers: None or `none`."""
    return None if bits is None or bits == NO_BITS else scheme(bits)


def scheme_name(bits: int | str) -> str:
    return f"int{bits}" if str(bits).isdigit() else str(bits)
