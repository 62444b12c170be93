"""Error surfaces made up for allocators of ranks."""

from __future__ import annotations

import torch

from lowkey.allocation.profile import Profile

RANKS = (2, 4, 6, 8)
HEADS, ITEMSIZE = 3, 2
FULL = (8, 8)


def profile(surface, spectra=None, signals=None):
    """A profile of these errors, with spectra and signals made up where none are given."""
    layers = range(len(surface))
    measured = {name: [(1.0 + i % 3, 2.0 + i % 2) for i in layers] for name in ("fisher", "condition")}
    return Profile(
        RANKS, surface, HEADS, ITEMSIZE, spectra or [decaying(i) for i in layers], signals or measured
    )


def decaying(seed):
    """Energies (heads, 8), largest first, of keys and of values."""
    energies = torch.rand(2, HEADS, 8, generator=torch.Generator().manual_seed(seed)).add(0.05).pow(2)
    return tuple(side.sort(descending=True).values.tolist() for side in energies)


def bowl(layers=3, seed=0):
    """Separable, decreasing and convex in each rank, zero at full rank, like errors of truncated energies."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(layers):
        # the first steps up help most
        drops = torch.rand(2, len(RANKS) - 1, generator=generator).sort(descending=True).values
        k, v = ([float(row[i:].sum()) / 10 for i in range(len(RANKS))] for row in drops)
        made.append([[a + b for b in v] for a in k])
    return profile(made)


def full_bytes(p):
    """Bytes per token at full rank."""
    return p.bytes_per_token([FULL] * p.layer_count)
