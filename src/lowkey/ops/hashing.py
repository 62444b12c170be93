"""Integers that look random and depend on nothing but what is hashed."""

from __future__ import annotations

from torch import Tensor

LOW = 2**32 - 1  # the low 32 bits
OF_SEED = 0xC2B2AE3D  # an odd number that spreads seeds over what is hashed
OF_HEAD, OF_LAYER = 0x9E3779B1, 0x85EBCA77  # the same for heads and layers
MIXING = ((16, 0x7FEB352D), (15, 0x846CA68B))


def hashed(x: Tensor) -> Tensor:
    """Mix the low 32 bits of integers; different ones stay different."""
    x = x & LOW
    for shift, factor in MIXING:
        x = ((x ^ (x >> shift)) * factor) & LOW
    return x ^ (x >> 16)


def drawn_uniformly(at: Tensor, layer: int, seed: int) -> Tensor:
    """A number in [0, 1) for every place of every head, whenever and beside whatever it is drawn.

    Args:
        at: (b, h, s), the places, int64.
        layer: of the places.
        seed: of the draw.
    """
    heads = at.new_tensor(range(at.shape[1])).view(1, -1, 1)
    x = hashed(at + OF_HEAD * heads + OF_LAYER * layer + OF_SEED * seed)
    return (x >> 8).float() / 2**24  # fp32 holds 24 bits
