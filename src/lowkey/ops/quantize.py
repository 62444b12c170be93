"""Group-wise asymmetric integers, really packed: two 4-bit or four 2-bit numbers in a byte."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """codes uint8 (*b, n/per_byte), scale and low (*b, n/group): x ~= code * scale + low over groups of the
    last axis.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    bits: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.codes, self.scale, self.low


def quantize(x: Float[Tensor, "*b n"], bits: int, group: int) -> Packed:
    """Round to `bits` (2, 4 or 8) with one scale and one offset, both in x's dtype, per `group` numbers of
    the last axis.

    The scale is rounded up, or the largest number of a group would be cut off: by a whole step in bf16 at 8
    bits.
    """
    grouped = x.float().unflatten(-1, (x.shape[-1] // group, group))
    low, high = grouped.amin(-1), grouped.amax(-1)
    up = 1 + torch.finfo(x.dtype).eps / 2
    scale = ((high - low) / (2**bits - 1) * up).clamp_min(1e-8).to(x.dtype)
    low = low.to(x.dtype)
    codes = (
        ((grouped - low.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)).round().clamp(0, 2**bits - 1)
    )
    return Packed(pack(codes.flatten(-2).to(torch.uint8), bits), scale, low, bits)


def dequantize(p: Packed) -> Tensor:
    """(*b, n) in the dtype of the scales; computed in fp32 in one buffer, which a decoding step over a long
    cache feels.
    """
    numbers = unpack(p.codes, p.bits, torch.float32)
    if not numbers.numel():
        return numbers.to(p.scale.dtype)
    numbers = numbers.unflatten(-1, (p.scale.shape[-1], -1))
    return (
        numbers.mul_(p.scale.float().unsqueeze(-1))
        .add_(p.low.float().unsqueeze(-1))
        .flatten(-2)
        .to(p.scale.dtype)
    )


def pack(codes: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    return reduce(torch.bitwise_or, [codes[..., i::per_byte] << (bits * i) for i in range(per_byte)])


def unpack(codes: Tensor, bits: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    if bits == 8:
        return codes.to(dtype)
    out = torch.empty(*codes.shape, 8 // bits, dtype=dtype, device=codes.device)
    for i in range(8 // bits):
        out[..., i] = (codes >> (bits * i)) & (2**bits - 1)
    return out.flatten(-2)
