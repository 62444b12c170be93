"""Integers that look random and depend on nothing but what is hashed."""

from __future__ import annotations

from torch import Tensor

LOW = 2**32 - 1  # the low 32 bits
OF_SEED = 0xC2B2AE3D  # an odd number that spreads seeds over what is hashed
MIXING = ((16, 0x7FEB352D), (15, 0x846CA68B))


def hashed(x: Tensor) -> Tensor:
    """Mix the low 32 bits of integers; different ones stay different."""
    x = x & LOW
    for shift, factor in MIXING:
        x = ((x ^ (x >> shift)) * factor) & LOW
    return x ^ (x >> 16)
