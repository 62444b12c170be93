"""What commutes with rotary embedding in the half-split layout.

Channels (f, f + p/2) of the first p = `rotary` channels of a head are one complex number, which position m
turns by exp(i m w_f), in every head alike. So a map that mixes heads by one complex number per frequency, a
rotation and a scale in the plane of the pair, commutes with the turns of all positions exactly (the principle
of TransMLA, arXiv:2502.07864, at freqfold 1). Channels past p are not turned: any map of them among
themselves commutes. Row vectors throughout: mapped = x @ map.
"""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from lowkey.ops.bases import principal
from lowkey.ops.rope import half_turn


def commuting_basis(
    moment: Float[Tensor, "G n n"], t: int, rotary: int
) -> tuple[Float[Tensor, "G n n"], Float[Tensor, "G t"]]:
    """(columns, energy) of the joint second moments of t heads side by side, n = t d: the best orthonormal
    basis of those that commute.

    Per frequency the eigenvectors of the t x t Hermitian Gram of the heads' complex numbers; jointly those of
    all channels past `rotary`. The first d columns are the first merged head, channels in standard order, so
    that it is a key head that can be rotated; the next d the second, and so on. energy: what each of the
    merged heads holds, largest first.
    """
    groups, d = moment.shape[0], moment.shape[-1] // t
    heads = moment.double().view(groups, t, d, t, d).transpose(2, 3)
    energy, vectors = torch.linalg.eigh(_numbers(heads, rotary).movedim(-1, 1))
    found = _maps(_with_signs(vectors.flip(-1)).movedim(1, -1), d)
    held = 2 * energy.flip(-1).clamp_min(0).sum(1)
    if rotary < d:
        own, rest = principal(heads[..., rotary:, rotary:].transpose(2, 3).flatten(3).flatten(1, 2))
        found[..., rotary:, rotary:] = own.view(groups, t, d - rotary, t, d - rotary).transpose(2, 3)
        held = held + rest.view(groups, t, -1).sum(-1)
    return found.transpose(2, 3).flatten(3).flatten(1, 2), held


def spread_energy(energy: Float[Tensor, "G t"], d: int) -> Float[Tensor, "G d"]:
    """The energy of t whole heads, each spread evenly over its d columns, in sums of t columns: what energy
    rules read.
    """
    t = energy.shape[-1]
    return (energy / d).repeat_interleave(d, -1).unflatten(-1, (d, t)).sum(-1)


def nearest_commuting(maps: Float[Tensor, "*b d d"], rotary: int) -> Float[Tensor, "*b d d"]:
    """The orthogonal projection onto the maps that commute."""
    d = maps.shape[-1]
    found = _maps(_numbers(maps, rotary), d)
    found[..., rotary:, rotary:] = maps[..., rotary:, rotary:]
    return found


def commutes(maps: Float[Tensor, "*b n d"], rotary: int, tolerance: float = 1e-5) -> bool:
    """Whether maps (t d, d) of t heads side by side to one, or (d, d), commute with the turns of all
    positions.
    """
    square = maps.double().unflatten(-2, (-1, maps.shape[-1]))
    return bool((square - nearest_commuting(square, rotary)).norm() <= tolerance * square.norm())


def turning(maps: Float[Tensor, "*b d d"], rotary: int) -> Float[Tensor, "*b d d"]:
    """The orthogonal Q that commute and maximise tr(Q^T map): a phase per frequency, and a Procrustes
    rotation of the channels past `rotary`, which for rotary = 0 are all of them."""
    d = maps.shape[-1]
    numbers = _numbers(maps, rotary)
    found = _maps(torch.where(numbers.abs() > 0, numbers.sgn(), torch.ones_like(numbers)), d)
    if rotary < d:
        u, _, v = torch.linalg.svd(maps[..., rotary:, rotary:])
        found[..., rotary:, rotary:] = u @ v
    return found


def rotated_moment(
    moment: Float[Tensor, "n n"], d: int, cos: Float[Tensor, "s p"], sin: Float[Tensor, "s p"]
) -> Float[Tensor, "n n"]:
    """The joint second moment of heads (d wide, side by side) after rotation of their first p channels, in
    the mean over positions.
    """
    ones = torch.ones(len(cos), d - cos.shape[-1], dtype=torch.float64)
    cos, sin = torch.cat([cos.double(), ones], -1), torch.cat([sin.double(), 0 * ones], -1)
    cc, cs, ss = (a.mT @ b / len(cos) for a, b in ((cos, cos), (cos, sin), (sin, sin)))
    heads = moment.double().unflatten(-1, (-1, d)).unflatten(0, (-1, d)).transpose(1, 2)
    p = d - ones.shape[-1]
    right, left = _half_turned(heads, p), _half_turned(heads.mT, p).mT
    both = _half_turned(left, p)
    return (heads * cc + right * cs + left * cs.mT + both * ss).transpose(1, 2).flatten(2).flatten(0, 1)


def _half_turned(x: Float[Tensor, "*b d"], p: int) -> Float[Tensor, "*b d"]:
    return torch.cat([half_turn(x[..., :p]), x[..., p:]], -1)


def _numbers(maps: Float[Tensor, "*b d d"], rotary: int) -> Complex[Tensor, "*b q"]:
    """The complex number per frequency of the nearest commuting map; of E[x^T y] it is half of E[conj(x) y]."""
    q = rotary // 2
    (aa, ab), (ba, bb) = ([_pairs(maps, i, j, q) for j in (0, 1)] for i in (0, 1))
    return torch.complex(aa + bb, ab - ba) / 2


def _maps(numbers: Complex[Tensor, "*b q"], d: int) -> Float[Tensor, "*b d d"]:
    """Written out as real matrices, zero past the rotary channels."""
    q = numbers.shape[-1]
    found = numbers.real.new_zeros(*numbers.shape[:-1], d, d)
    for i, j, part in (
        (0, 0, numbers.real),
        (0, 1, numbers.imag),
        (1, 0, -numbers.imag),
        (1, 1, numbers.real),
    ):
        _pairs(found, i, j, q).copy_(part)
    return found


def _pairs(maps: Float[Tensor, "*b d d"], i: int, j: int, q: int) -> Float[Tensor, "*b q"]:
    """A view of the entries from the i-th to the j-th channel of every pair."""
    return maps[..., i * q : (i + 1) * q, j * q : (j + 1) * q].diagonal(dim1=-2, dim2=-1)


def _with_signs(vectors: Complex[Tensor, "*b t t"]) -> Complex[Tensor, "*b t t"]:
    """Phases are free: the largest entry of every column becomes real and positive, so that runs agree."""
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * largest.sgn().conj()
