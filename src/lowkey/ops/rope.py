"""Rotary embedding in the half-split layout of Hugging Face, and its inverse."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def rotate(
    x: Float[Tensor, "*b t d"], cos: Float[Tensor, "*c t p"], sin: Float[Tensor, "*c t p"]
) -> Float[Tensor, "*b t d"]:
    """Rotate the first `p` channels; the rest pass (partial rotary). cos and sin broadcast over heads."""
    width, half = cos.shape[-1], cos.shape[-1] // 2
    part = x[..., :width]
    out = part * cos
    # in place: faster than adding a turned copy, and the same bits
    out[..., :half] -= part[..., half:] * sin[..., :half]
    out[..., half:] += part[..., :half] * sin[..., half:]
    return torch.cat([out, x[..., width:]], dim=-1) if width < x.shape[-1] else out


def unrotate(
    x: Float[Tensor, "*b t d"], cos: Float[Tensor, "*c t p"], sin: Float[Tensor, "*c t p"]
) -> Float[Tensor, "*b t d"]:
    """The inverse of `rotate`, for scaled rotations too (YaRN multiplies cos and sin by an attention factor)."""
    scale = cos.square() + sin.square()
    return rotate(x, cos / scale, -sin / scale)


def half_turn(x: Float[Tensor, "*b t p"]) -> Float[Tensor, "*b t p"]:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)
