"""Asymmetric integers with a scale for each group, packed: two of 4 bits or four of 2 bits in a byte."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from lowkey.backends.stored import unpack_codes


@dataclass(frozen=True)
class Packed:
    """Quantised numbers: x ~= code * scale + low, over groups along the last axis.

    Args:
        codes: uint8 (*b, n / codes per byte).
        scale: (*b, n / group).
        low: (*b, n / group), the smallest number of each group.
        bits: 2, 4 or 8.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    bits: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """(codes, scale, low)."""
        return self.codes, self.scale, self.low


def quantize(x: Float[Tensor, "*b n"], bits: int, group: int) -> Packed:
    """Round to integers, with one scale and one offset in x's dtype for each group.

    Args:
        x: the numbers.
        bits: 2, 4 or 8.
        group: numbers of the last axis that share a scale; divides n.
    """
    grouped = x.float().unflatten(-1, (x.shape[-1] // group, group))
    low, high = grouped.amin(-1), grouped.amax(-1)
    # The scale is rounded up to x's dtype. Rounded down, it would cut off the largest number of a group; in
    # bf16 at 8 bits, by a whole step.
    up = 1 + torch.finfo(x.dtype).eps / 2
    # a group of equal numbers has a range of 0, by which nothing could be divided
    scale = ((high - low) / (2**bits - 1) * up).clamp_min(1e-8).to(x.dtype)
    low = low.to(x.dtype)
    codes = (grouped - low.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
    codes = codes.round().clamp(0, 2**bits - 1)
    return Packed(pack(codes.flatten(-2).to(torch.uint8), bits), scale, low, bits)


def dequantize(p: Packed) -> Tensor:
    """The numbers (*b, n) in the dtype of the scales."""
    numbers = unpack_codes(p.codes, p.bits, torch.float32)
    if not numbers.numel():
        return numbers.to(p.scale.dtype)
    numbers = numbers.unflatten(-1, (p.scale.shape[-1], -1))
    # in one fp32 buffer: a step of decoding over a long cache takes noticeably longer with more
    numbers = numbers.mul_(p.scale.float().unsqueeze(-1)).add_(p.low.float().unsqueeze(-1))
    return numbers.flatten(-2).to(p.scale.dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (*b, n) of some bits each -> bytes (*b, n bits / 8), the first code in the lowest bits.

    `backends.stored.unpack_codes` is the inverse.
    """
    per_byte = 8 // bits
    return reduce(torch.bitwise_or, [codes[..., i::per_byte] << (bits * i) for i in range(per_byte)])
