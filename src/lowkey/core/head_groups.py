"""What may be done to heads and latents without knowing what they are.

Heads side by side in groups: `t` KV heads share one latent (h = G t); t = 1 is one latent per head.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def group_latents(x: Float[Tensor, "*b h s d"], down: Float[Tensor, "*c m n r"]) -> Float[Tensor, "*b G s r"]:
    """Latents of the groups; down (G|1, t d, r). A 1 in the place of G, when t is 1, means shared by all
    heads.
    """
    t = down.shape[-2] // x.shape[-1]
    if t > 1:
        x = x.unflatten(-3, (-1, t)).transpose(-3, -2).flatten(-2)
    return x @ down


def rebuilt_heads(
    latent: Float[Tensor, "*b G s r"], up: Float[Tensor, "*c h r d"]
) -> Float[Tensor, "*b h s d"]:
    """Every head as its own block of `up` (h|1, r, d) rebuilds it from its group's latent."""
    t = up.shape[-3] // latent.shape[-3]
    if t <= 1:
        return latent @ up
    return (latent.unsqueeze(-3) @ up.unflatten(-3, (-1, t))).flatten(-4, -3)


def per_head_maps(rows: Float[Tensor, "G r n"], t: int) -> Float[Tensor, "h r d"]:
    """Maps from a group's latent to its t heads side by side, as one map per head."""
    return rows.unflatten(-1, (t, -1)).transpose(-3, -2).flatten(-4, -3) if t > 1 else rows


def side_by_side(heads: Float[Tensor, "h r d"], t: int) -> Float[Tensor, "G r n"]:
    """The inverse of `blocks`."""
    return heads.unflatten(-3, (-1, t)).transpose(-3, -2).flatten(-2) if t > 1 else heads


def block_hadamard(n: int) -> Float[Tensor, "n n"]:
    """Symmetric and orthonormal: the largest powers of two that add up to n, as blocks."""
    sizes = [1 << i for i in reversed(range(n.bit_length())) if n >> i & 1]
    return torch.block_diag(*(_hadamard(s) for s in sizes))


def _hadamard(n: int) -> Float[Tensor, "n n"]:
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h * n**-0.5
