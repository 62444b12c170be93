"""Maps that commute with rotary embedding in the half-split layout.

Channels (f, f + p/2) of the first p = `rotary` channels of a head are one complex number. Position m rotates
it by exp(i m w_f), in every head alike. A map that multiplies each such number by a complex number of its
own, that is, rotates and scales the plane of the pair, therefore commutes with the rotations of all positions
exactly. So does a map that mixes several heads by one complex number for each frequency and pair of heads
(the principle of TransMLA, arXiv:2502.07864, at freqfold 1). Channels past p are not rotated: any map of them
among themselves commutes.

Row vectors throughout: mapped = x @ map.
"""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from lowkey.ops.bases import principal
from lowkey.ops.rope import rotate_half


def commuting_basis(
    moment: Float[Tensor, "G n n"], t: int, rotary: int
) -> tuple[Float[Tensor, "G n n"], Float[Tensor, "G t"]]:
    """The best orthonormal basis, among those that commute, of t heads side by side.

    For each frequency it holds the eigenvectors of the t x t Hermitian Gram matrix of the heads' complex
    numbers; for the channels past `rotary`, the eigenvectors of their joint moment.

    Args:
        moment: joint second moments of each group, n = t d.
        t: heads in a group.
        rotary: channels of a head that are rotated.

    Returns:
        (columns, energy). The first d columns are the first merged head, with channels in standard order, so
        that it can be rotated as a key head; the next d the second, and so on. energy: of each merged head,
        largest first.
    """
    groups, d = moment.shape[0], moment.shape[-1] // t
    heads = moment.double().view(groups, t, d, t, d).transpose(2, 3)
    eigenvalues, vectors = torch.linalg.eigh(_complex_numbers(heads, rotary).movedim(-1, 1))
    columns = _real_maps(_with_fixed_phases(vectors.flip(-1)).movedim(1, -1), d)
    energy = 2 * eigenvalues.flip(-1).clamp_min(0).sum(1)  # the two channels of a pair hold the same
    if rotary < d:
        own, rest = principal(heads[..., rotary:, rotary:].transpose(2, 3).flatten(3).flatten(1, 2))
        columns[..., rotary:, rotary:] = own.view(groups, t, d - rotary, t, d - rotary).transpose(2, 3)
        energy = energy + rest.view(groups, t, -1).sum(-1)
    return columns.transpose(2, 3).flatten(3).flatten(1, 2), energy


def spread_energy(energy: Float[Tensor, "G t"], d: int) -> Float[Tensor, "G d"]:
    """The energy of t merged heads in the form of a `Basis.spectrum`.

    The energy of each head is spread evenly over its d columns; then every t columns are summed.
    """
    t = energy.shape[-1]
    return (energy / d).repeat_interleave(d, -1).unflatten(-1, (d, t)).sum(-1)


def nearest_commuting(maps: Float[Tensor, "*b d d"], rotary: int) -> Float[Tensor, "*b d d"]:
    """The orthogonal projection of maps onto those that commute."""
    d = maps.shape[-1]
    projected = _real_maps(_complex_numbers(maps, rotary), d)
    projected[..., rotary:, rotary:] = maps[..., rotary:, rotary:]
    return projected


def commutes(maps: Float[Tensor, "*b n d"], rotary: int, tolerance: float = 1e-5) -> bool:
    """Whether maps commute with the rotations of all positions.

    Args:
        maps: of one head, n = d, or of t heads side by side to one, n = t d.
        rotary: channels of a head that are rotated.
        tolerance: the largest relative distance from the nearest maps that commute.
    """
    square = maps.double().unflatten(-2, (-1, maps.shape[-1]))
    return bool((square - nearest_commuting(square, rotary)).norm() <= tolerance * square.norm())


def commuting_procrustes(maps: Float[Tensor, "*b d d"], rotary: int) -> Float[Tensor, "*b d d"]:
    """The orthogonal Q that commute and maximise tr(Q^T map).

    For each frequency this is the phase of the map's complex number; for the channels past `rotary`, which
    for rotary = 0 are all of them, it is the Procrustes rotation.
    """
    d = maps.shape[-1]
    numbers = _complex_numbers(maps, rotary)
    phases = torch.where(numbers.abs() > 0, numbers.sgn(), torch.ones_like(numbers))
    rotations = _real_maps(phases, d)
    if rotary < d:
        u, _, v = torch.linalg.svd(maps[..., rotary:, rotary:])
        rotations[..., rotary:, rotary:] = u @ v
    return rotations


def rotated_moment(
    moment: Float[Tensor, "n n"], d: int, cos: Float[Tensor, "s p"], sin: Float[Tensor, "s p"]
) -> Float[Tensor, "n n"]:
    """The joint second moment of heads after rotation, averaged over positions.

    Args:
        moment: before rotation, heads of width d side by side.
        d: head dim.
        cos: of the positions, for the first p channels.
        sin: the same.
    """
    # with R x = cos x + sin J x, J being `rotate_half`, the moment of R x has four terms
    ones = torch.ones(len(cos), d - cos.shape[-1], dtype=torch.float64)
    cos, sin = torch.cat([cos.double(), ones], -1), torch.cat([sin.double(), 0 * ones], -1)
    cc, cs, ss = (a.mT @ b / len(cos) for a, b in ((cos, cos), (cos, sin), (sin, sin)))
    heads = moment.double().unflatten(-1, (-1, d)).unflatten(0, (-1, d)).transpose(1, 2)
    p = d - ones.shape[-1]
    right, left = _half_rotated(heads, p), _half_rotated(heads.mT, p).mT
    both = _half_rotated(left, p)
    # products of cos and sin depend on channels alone, so each term is one element-wise product
    return (heads * cc + right * cs + left * cs.mT + both * ss).transpose(1, 2).flatten(2).flatten(0, 1)


def _half_rotated(x: Float[Tensor, "*b d"], p: int) -> Float[Tensor, "*b d"]:
    """`rotate_half` of the first p channels."""
    return torch.cat([rotate_half(x[..., :p]), x[..., p:]], -1)


def _complex_numbers(maps: Float[Tensor, "*b d d"], rotary: int) -> Complex[Tensor, "*b q"]:
    """The complex number of each frequency in the nearest map that commutes.

    Of a moment E[x^T y], it is half of E[conj(x) y].
    """
    q = rotary // 2
    # a + ib commutes as the real matrix [[a, b], [-b, a]]; the mean of the entries is the nearest such
    (aa, ab), (ba, bb) = ([_pairs(maps, i, j, q) for j in (0, 1)] for i in (0, 1))
    return torch.complex(aa + bb, ab - ba) / 2


def _real_maps(numbers: Complex[Tensor, "*b q"], d: int) -> Float[Tensor, "*b d d"]:
    """The inverse of `_complex_numbers`: real matrices, zero past the rotated channels."""
    q = numbers.shape[-1]
    maps = numbers.real.new_zeros(*numbers.shape[:-1], d, d)
    entries = ((0, 0, numbers.real), (0, 1, numbers.imag), (1, 0, -numbers.imag), (1, 1, numbers.real))
    for i, j, part in entries:
        _pairs(maps, i, j, q).copy_(part)
    return maps


def _pairs(maps: Float[Tensor, "*b d d"], i: int, j: int, q: int) -> Float[Tensor, "*b q"]:
    """A view of the entries from the i-th to the j-th channel of every pair."""
    return maps[..., i * q : (i + 1) * q, j * q : (j + 1) * q].diagonal(dim1=-2, dim2=-1)


def _with_fixed_phases(vectors: Complex[Tensor, "*b t t"]) -> Complex[Tensor, "*b t t"]:
    """The same eigenvectors with the largest entry of each real and positive, so that runs agree."""
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * largest.sgn().conj()
