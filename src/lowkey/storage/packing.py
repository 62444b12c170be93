"""How stored numbers are written down: in the model's dtype, or as small integers with scales."""

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
NO_BITS = "none"  # the name for no integers, where a plan says otherwise


class Packing(Protocol):
    """Writes stored tokens (b, G, s, r) as tensors and reads them back.

    Attributes:
        bits: of a stored integer whose `fields` are codes, scale and low; 0 where numbers are stored as they
            are; None for any other form, which kernels cannot read: each step unpacks all of it.
        block: tokens that are packed together; s is always a multiple of it.
        axis: the dimension of the packed tensors that grows with s.
        fields: a name for each packed tensor.
    """

    block: ClassVar[int]
    axis: ClassVar[int]
    fields: ClassVar[tuple[str, ...]]

    @property
    def bits(self) -> int | None:
        """See the attributes."""
        ...

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        """(b, G, s, r) -> the tensors that are held, one for each of `fields`."""
        ...

    def unpack(self, parts: tuple[Tensor, ...], width: int) -> Tensor:
        """The inverse: back to (b, G, s, r), given the width r."""
        ...

    def nbytes(self, tokens: int, width: int, itemsize: int) -> int:
        """Bytes of some tokens of one stored head of this width.

        Args:
            tokens: how many, a multiple of `block`.
            width: r.
            itemsize: bytes of a number in the model's dtype.
        """
        ...


@dataclass(frozen=True)
class Unpacked:
    """Numbers in the model's dtype; see `Packing` for the methods."""

    bits: ClassVar[int] = 0
    block: ClassVar[int] = 1
    axis: ClassVar[int] = 2
    fields: ClassVar[tuple[str, ...]] = ("",)

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        """x itself."""
        return (x,)

    def unpack(self, parts: tuple[Tensor, ...], width: int) -> Tensor:
        """The one tensor itself."""
        return parts[0]

    def nbytes(self, tokens: int, width: int, itemsize: int) -> int:
        """Bytes of the numbers."""
        return tokens * width * itemsize


@dataclass(frozen=True)
class PerToken:
    """Integers whose scales belong to one token each.

    The channels of a token are cut into groups of at most 32, each with a scale and an offset in the model's
    dtype. See `Packing` for the methods.

    Args:
        bits: 2, 4 or 8.
    """

    bits: int
    block: ClassVar[int] = 1
    axis: ClassVar[int] = 2
    fields: ClassVar[tuple[str, ...]] = ("codes", "scale", "low")

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        """Quantise each token (b, G, s, r) by itself."""
        groups, size = self._groups(x.shape[-1])
        return quantize(_repeat_last_channel(x, groups * size), self.bits, size).tensors

    def unpack(self, parts: tuple[Tensor, ...], width: int) -> Tensor:
        """The decoded numbers, without the channels that filled up the last group."""
        return dequantize(packed_parts(parts, self.bits))[..., :width]

    def nbytes(self, tokens: int, width: int, itemsize: int) -> int:
        """Bytes of the codes, and of a scale and an offset for each group."""
        groups, size = self._groups(width)
        return tokens * groups * (size * self.bits // 8 + 2 * itemsize)

    def _groups(self, width: int) -> tuple[int, int]:
        """(number of groups, channels of each): groups as even as can be, and of whole bytes."""
        # 40 channels make two groups of 20, not one of 32 and one of 8
        groups = math.ceil(width / GROUP)
        size = math.ceil(width / groups)
        return groups, size + -size % (8 // self.bits)


@dataclass(frozen=True)
class PerChannel:
    """Integers whose scales belong to one channel of 32 tokens in a row, as KIVI has for keys.

    In keys, a few channels are much larger than the others (arXiv:2402.02750); a scale for each channel keeps
    the others precise. KIVI's values leave the exact window one by one; ours leave with their keys, in the
    same blocks. See `Packing` for the methods.

    Args:
        bits: 2, 4 or 8.
    """

    bits: int
    block: ClassVar[int] = GROUP
    axis: ClassVar[int] = 3
    fields: ClassVar[tuple[str, ...]] = ("codes", "scale", "low")

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        """Quantise each channel of each block of tokens by itself."""
        # contiguous, so that a channel's codes lie side by side, as kernels read them
        return quantize(x.mT.contiguous(), self.bits, GROUP).tensors

    def unpack(self, parts: tuple[Tensor, ...], width: int) -> Tensor:
        """The decoded numbers."""
        return dequantize(packed_parts(parts, self.bits)).mT

    def nbytes(self, tokens: int, width: int, itemsize: int) -> int:
        """Bytes of the codes, and of a scale and an offset for each channel of each block."""
        return width * tokens // GROUP * (GROUP * self.bits // 8 + 2 * itemsize)


def joined_parts(old: tuple[Tensor, ...], new: tuple[Tensor, ...], axis: int) -> tuple[Tensor, ...]:
    """The packed tensors of old tokens with those of new tokens behind them, along the packing's axis."""
    return tuple(torch.cat(pair, axis) for pair in zip(old, new, strict=True))


def packed_parts(parts: tuple[Tensor, ...], bits: int) -> Packed:
    """The tensors of an integer packing as `ops.quantize` takes them."""
    codes, scale, low = parts
    return Packed(codes, scale, low, bits)


def _repeat_last_channel(x: Tensor, width: int) -> Tensor:
    """Widen x (..., r) by repeats of its last channel, which do not change the scale of their group."""
    if x.shape[-1] == width:
        return x
    return torch.cat([x, x[..., -1:].expand(*x.shape[:-1], width - x.shape[-1])], -1)


@dataclass(frozen=True)
class Scheme:
    """How the keys and values of a cache are packed.

    Args:
        bits: of every stored number.
        keys: the packing of keys.
        values: the packing of values.
        recent: newest tokens that stay exact at least, unless `exact` is given.
        hadamard_rotated: whether keys and values pass a block Hadamard transform first, which spreads what is
            large in a few channels over all of them (arXiv:2407.21118).
    """

    bits: int
    keys: Packing
    values: Packing
    recent: int = 0
    hadamard_rotated: bool = False


# functions, so that a packing is made only when its name is chosen
SCHEMES: dict[str, Callable[[], Scheme]] = {
    "int8": lambda: Scheme(8, PerToken(8), PerToken(8)),
    "int4": lambda: Scheme(4, PerToken(4), PerToken(4)),
    "int2": lambda: Scheme(2, PerToken(2), PerToken(2)),
    "kivi8": lambda: Scheme(8, PerChannel(8), PerToken(8), recent=GROUP),
    "kivi4": lambda: Scheme(4, PerChannel(4), PerToken(4), recent=GROUP),
    "kivi2": lambda: Scheme(2, PerChannel(2), PerToken(2), recent=GROUP),
    "hadamard8": lambda: Scheme(8, PerToken(8), PerToken(8), hadamard_rotated=True),
    "hadamard4": lambda: Scheme(4, PerToken(4), PerToken(4), hadamard_rotated=True),
    "hadamard2": lambda: Scheme(2, PerToken(2), PerToken(2), hadamard_rotated=True),
}


def scheme(bits: int | str) -> Scheme:
    """The scheme of this name; 8, 4 and 2 stand for `int8`, `int4` and `int2`.

    Raises:
        LowkeyError: for an unknown name.
    """
    name = scheme_name(bits)
    if name not in SCHEMES:
        raise LowkeyError(f"bits {bits!r}: packed storage is one of 8, 4, 2, {', '.join(SCHEMES)}")
    return SCHEMES[name]()


def scheme_or_none(bits: int | str | None) -> Scheme | None:
    """The scheme of this name; None, for the model's own numbers, if the name is None or `none`.

    Raises:
        LowkeyError: for an unknown name.
    """
    return None if bits is None or bits == NO_BITS else scheme(bits)


def scheme_name(bits: int | str) -> str:
    """The name of a scheme that was given by name or by number of bits."""
    return f"int{bits}" if str(bits).isdigit() else str(bits)
