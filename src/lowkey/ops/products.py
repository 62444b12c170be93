"""Maps in closed form: those that keep a product, and those of several heads side by side."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lowkey.core.types import Basis, LayerStatistics, Layout, LowkeyError, head_blocks
from lowkey.ops.bases import principal


def oblique_basis(
    left: Float[Tensor, "G n n"], right: Float[Tensor, "G n n"], ridge: float, t: int = 1
) -> Basis:
    """For every rank the projectors P that minimise ||X Y^T - X P Y^T||_F, given the moments X^T X (`left`)
    and Y^T Y (`right`).

    With X^T X = L_X L_X^T, Y^T Y = L_Y L_Y^T and the SVD L_X^T L_Y = U S V^T, P = A B^T where A = L_X^{-T}
    U_r and B = L_X U_r (arXiv:2512.05916 from Grams; any square roots will do, here the symmetric ones). P is
    oblique: A is not orthonormal and B is not A, but B^T A = I. `ridge`, relative to the mean eigenvalue of
    X^T X, is added to it, so that it can be inverted. The moments are those of t heads side by side.

    Each pair of columns a_i, b_i is scaled to equal norms, which leaves P alone. So neither map has entries
    that fp16 cannot hold: scaling by S^{1/2}, which also levels keys and queries in the basis, sends b_i to
    infinity where S vanishes.
    spectrum: S^2, the energy of each direction of X Y^T, of t directions at a time.
    """
    root, inverse = roots(left, ridge)
    u, singular, _ = torch.linalg.svd(root @ square_root(right))
    down, up = inverse @ u, root @ u
    scale = (up.norm(dim=-2, keepdim=True) / down.norm(dim=-2, keepdim=True)).sqrt() * signs(down)
    energy = singular.square().unflatten(-1, (-1, t)).sum(-1)
    return Basis((down * scale).float(), (up / scale).mT.float(), spectrum=energy, merge=t)


def roots(moment: Float[Tensor, "G n n"], ridge: float) -> tuple[Tensor, Tensor]:
    """The symmetric root and its inverse, in fp64, after `ridge` times the mean eigenvalue is added, so that
    there is an inverse.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp_min(0) + (ridge * values.mean(-1, keepdim=True)).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    root, inverse = (vectors * v.unsqueeze(-2) @ vectors.mT for v in (values.sqrt(), values.rsqrt()))
    return root, inverse


def beside_one_another(moments: Float[Tensor, "h d d"], t: int) -> Float[Tensor, "G n n"]:
    """Moments of every t heads side by side whose products with one another count nothing: blocks on a
    diagonal.
    """
    return torch.stack([torch.block_diag(*group) for group in moments.split(t)])


def square_root(moment: Float[Tensor, "G n n"]) -> Float[Tensor, "G n n"]:
    """The symmetric root, in fp64."""
    values, vectors = torch.linalg.eigh(moment.double())
    return vectors * values.clamp_min(0).sqrt().unsqueeze(-2) @ vectors.mT


def signs(columns: Float[Tensor, "*h d r"]) -> Float[Tensor, "*h 1 r"]:
    """What makes the largest entry of every column positive, so that runs agree: 1 or -1."""
    largest = columns.gather(-2, columns.abs().argmax(-2, keepdim=True))
    return 1 - 2 * (largest < 0).to(columns)


def joint_moments(statistics: LayerStatistics, layout: Layout) -> tuple[Tensor, Tensor]:
    """(h d, h d) of the keys that this layout stores, and of the values."""
    return statistics.keys_pre if layout == "pre_rope" else statistics.keys_post, statistics.values


def merged_basis(joint: Float[Tensor, "n n"], heads: int, t: int) -> Basis:
    """Uncentred PCA of every t of the heads side by side, from their joint moment (h d, h d)."""
    vectors, energy = principal(head_blocks(joint, heads // t))
    return Basis(vectors.float(), spectrum=energy.unflatten(-1, (-1, t)).sum(-1), merge=t)


def group_size(heads: int, wanted: int, usual: int = 0) -> int:
    """How many heads share a latent: `wanted`, which must divide their number. Where `wanted` is the method's
    `usual` number, the largest divisor up to it."""
    if wanted == usual > 0:
        return next(t for t in range(min(usual, heads), 0, -1) if heads % t == 0)
    if wanted < 1 or heads % wanted:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise LowkeyError(
            f"group {wanted}: must divide the model's {heads} KV heads; choose one of {divisors}"
        )
    return wanted


def reordered(joint: Float[Tensor, "n n"], order: Tensor | None, heads: int) -> Float[Tensor, "n n"]:
    """A joint moment with the heads in another order."""
    if order is None:
        return joint
    return (
        joint.unflatten(0, (heads, -1))[order].flatten(0, 1).unflatten(1, (heads, -1))[:, order].flatten(1, 2)
    )
