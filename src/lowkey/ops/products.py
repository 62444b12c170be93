"""Closed-form maps that keep a product of two matrices, and moments of several heads side by side."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lowkey.core.types import Basis, LayerStatistics, Layout, LowkeyError, head_blocks
from lowkey.ops.bases import principal


def oblique_basis(
    left: Float[Tensor, "G n n"], right: Float[Tensor, "G n n"], ridge: float, t: int = 1
) -> Basis:
    """For every rank, the projector P that minimises ||X Y^T - X P Y^T||_F.

    With X^T X = L_X L_X^T, Y^T Y = L_Y L_Y^T and the SVD L_X^T L_Y = U S V^T, the solution is P = A B^T with
    A = L_X^{-T} U_r and B = L_X U_r. This is KQ-SVD (arXiv:2512.05916) from Gram matrices; any square roots
    will do, here the symmetric ones. P is oblique: A is not orthonormal and B is not A, but B^T A = I.

    Args:
        left: X^T X, of t heads side by side.
        right: Y^T Y, the same.
        ridge: added to X^T X so that it can be inverted, relative to its mean eigenvalue.
        t: heads in a group.

    Returns:
        The maps A and B^T for every rank. spectrum: S^2, the energy of each direction of X Y^T, summed over
        every t directions.
    """
    root, inverse = root_and_inverse(left, ridge)
    # the symmetric roots in the place of L_X and L_Y
    u, singular, _ = torch.linalg.svd(root @ square_root(right))
    down, up = inverse @ u, root @ u
    # Columns a_i and b_i are scaled to equal norms, which leaves P alone and keeps all entries within fp16.
    # (Scaling by S^{1/2}, which would also level keys and queries, sends b_i to infinity where S vanishes.)
    scale = (up.norm(dim=-2, keepdim=True) / down.norm(dim=-2, keepdim=True)).sqrt() * column_signs(down)
    energy = singular.square().unflatten(-1, (-1, t)).sum(-1)
    return Basis((down * scale).float(), (up / scale).mT.float(), spectrum=energy, merge=t)


def root_and_inverse(moment: Float[Tensor, "G n n"], ridge: float) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a moment and its inverse, in fp64.

    Args:
        moment: symmetric, positive semidefinite.
        ridge: added to the eigenvalues so that there is an inverse, relative to their mean.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    least = torch.finfo(torch.float32).tiny  # for a moment that is zero
    values = values.clamp_min(0) + (ridge * values.mean(-1, keepdim=True)).clamp_min(least)
    root, inverse = (vectors * v.unsqueeze(-2) @ vectors.mT for v in (values.sqrt(), values.rsqrt()))
    return root, inverse


def block_diagonal_groups(moments: Float[Tensor, "h d d"], t: int) -> Float[Tensor, "G n n"]:
    """Joint moments of every t heads, with the products of different heads taken as zero."""
    return torch.stack([torch.block_diag(*group) for group in moments.split(t)])


def square_root(moment: Float[Tensor, "G n n"]) -> Float[Tensor, "G n n"]:
    """The symmetric square root of a positive semidefinite moment, in fp64."""
    values, vectors = torch.linalg.eigh(moment.double())
    return vectors * values.clamp_min(0).sqrt().unsqueeze(-2) @ vectors.mT


def column_signs(columns: Float[Tensor, "*h d r"]) -> Float[Tensor, "*h 1 r"]:
    """The sign of each column's largest entry, 1 or -1; multiplying by it makes runs agree."""
    largest = columns.gather(-2, columns.abs().argmax(-2, keepdim=True))
    return 1 - 2 * (largest < 0).to(columns)


def joint_moments(statistics: LayerStatistics, layout: Layout) -> tuple[Tensor, Tensor]:
    """The joint second moments (h d, h d) of the keys that a layout stores, and of the values."""
    return statistics.keys_pre if layout == "pre_rope" else statistics.keys_post, statistics.values


def merged_basis(joint: Float[Tensor, "n n"], heads: int, t: int) -> Basis:
    """Uncentred PCA of every t heads side by side.

    Args:
        joint: joint second moment of all heads, n = h d.
        heads: h.
        t: heads in a group.
    """
    vectors, energy = principal(head_blocks(joint, heads // t))
    return Basis(vectors.float(), spectrum=energy.unflatten(-1, (-1, t)).sum(-1), merge=t)


def group_size(heads: int, wanted: int, usual: int = 0) -> int:
    """How many heads share a latent.

    Args:
        heads: KV heads of the model.
        wanted: what was asked for.
        usual: the method's default. If that is what was asked for, it gives way to the largest divisor of
            `heads` up to it.

    Raises:
        LowkeyError: if `wanted` does not divide the heads.
    """
    if wanted == usual > 0:
        return next(t for t in range(min(usual, heads), 0, -1) if heads % t == 0)
    if wanted < 1 or heads % wanted:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise LowkeyError(
            f"group {wanted}: must divide the model's {heads} KV heads; choose one of {divisors}"
        )
    return wanted


def reorder_heads(joint: Float[Tensor, "n n"], order: Tensor | None, heads: int) -> Float[Tensor, "n n"]:
    """A joint moment with its heads in another order (h); None leaves it as it is."""
    if order is None:
        return joint
    rows = joint.unflatten(0, (heads, -1))[order].flatten(0, 1)
    return rows.unflatten(1, (heads, -1))[:, order].flatten(1, 2)
