"""Rotary embedding in the half-split layout of Hugging Face, and its inverse."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def rotate(
    x: Float[Tensor, "*b t d"], cos: Float[Tensor, "*c t p"], sin: Float[Tensor, "*c t p"]
) -> Float[Tensor, "*b t d"]:
    """Rotate the first `p` channels of x; the others pass unchanged (partial rotary embedding).

    Channel j forms a pair with channel j + p / 2.

    Args:
        x: queries or keys.
        cos: of each position, repeated for both halves; broadcasts over heads.
        sin: the same.
    """
    width, half = cos.shape[-1], cos.shape[-1] // 2
    part = x[..., :width]
    out = part * cos
    # in place: faster than adding a rotated copy, and equal to it in every bit
    out[..., :half] -= part[..., half:] * sin[..., :half]
    out[..., half:] += part[..., :half] * sin[..., half:]
    return torch.cat([out, x[..., width:]], dim=-1) if width < x.shape[-1] else out


def unrotate(
    x: Float[Tensor, "*b t d"], cos: Float[Tensor, "*c t p"], sin: Float[Tensor, "*c t p"]
) -> Float[Tensor, "*b t d"]:
    """The inverse of `rotate`, also where cos and sin are scaled (YaRN multiplies them by a factor)."""
    scale = cos.square() + sin.square()
    return rotate(x, cos / scale, -sin / scale)


def turned(
    x: Float[Tensor, "*b t p"], cos: Float[Tensor, "*c t p"], signed_sin: Float[Tensor, "*c t p"]
) -> Float[Tensor, "*b t p"]:
    """As `unrotate`, in few operations, with what `inverse_turn` returns. All channels are rotated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


def inverse_turn(
    cos: Float[Tensor, "*c t p"], sin: Float[Tensor, "*c t p"]
) -> tuple[Float[Tensor, "*c t p"], Float[Tensor, "*c t p"]]:
    """What `unrotate` multiplies each channel and its partner with, given the arguments of `rotate`."""
    scale, half = cos.square() + sin.square(), cos.shape[-1] // 2
    sin = sin / scale
    return cos / scale, torch.cat([sin[..., :half], -sin[..., half:]], -1)


def rotate_half(x: Float[Tensor, "*b t p"]) -> Float[Tensor, "*b t p"]:
    """Every pair of channels rotated by 90 degrees."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)
