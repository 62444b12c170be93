"""KV heads in groups that share a latent, and the maps between heads and latents.

Every `t` KV heads side by side form a group: h = G t. With t = 1, each head has a latent of its own.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def group_latents(x: Float[Tensor, "*b h s d"], down: Float[Tensor, "*c m n r"]) -> Float[Tensor, "*b G s r"]:
    """Project heads into the latents of their groups.

    Args:
        x: keys or values.
        down: (G, t d, r), the map of each group; with t = 1 also (1, d, r), one map for all heads.
    """
    t = down.shape[-2] // x.shape[-1]
    if t > 1:
        x = x.unflatten(-3, (-1, t)).transpose(-3, -2).flatten(-2)
    if x.ndim == 4 and x.shape[2] == 1 and x.shape[1] == len(down):
        # one token: a product of four dimensions would copy the maps for every sequence
        return torch.bmm(x.squeeze(2).transpose(0, 1), down).transpose(0, 1).unsqueeze(2)
    return x @ down


def rebuilt_heads(
    latent: Float[Tensor, "*b G s r"], up: Float[Tensor, "*c h r d"]
) -> Float[Tensor, "*b h s d"]:
    """Rebuild heads from the latents of their groups.

    Args:
        latent: of each group.
        up: (h, r, d), the map of each head; with t = 1 also (1, r, d), one map for all heads.
    """
    t = up.shape[-3] // latent.shape[-3]
    if t <= 1:
        return latent @ up
    return (latent.unsqueeze(-3) @ up.unflatten(-3, (-1, t))).flatten(-4, -3)


def per_head_maps(rows: Float[Tensor, "G r n"], t: int) -> Float[Tensor, "h r d"]:
    """Cut maps from a latent to t heads side by side (n = t d) into one map for each head."""
    return rows.unflatten(-1, (t, -1)).transpose(-3, -2).flatten(-4, -3) if t > 1 else rows


def side_by_side(heads: Float[Tensor, "h r d"], t: int) -> Float[Tensor, "G r n"]:
    """The inverse of `per_head_maps`."""
    return heads.unflatten(-3, (-1, t)).transpose(-3, -2).flatten(-2) if t > 1 else heads


def block_hadamard(n: int) -> Float[Tensor, "n n"]:
    """A symmetric, orthonormal matrix of normalised Hadamard blocks.

    The sizes of the blocks are the powers of two that add up to n, largest first.
    """
    sizes = [1 << i for i in reversed(range(n.bit_length())) if n >> i & 1]
    return torch.block_diag(*(_hadamard(s) for s in sizes))


def _hadamard(n: int) -> Float[Tensor, "n n"]:
    h = torch.ones(1, 1)  # Sylvester's construction doubles it
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h * n**-0.5
