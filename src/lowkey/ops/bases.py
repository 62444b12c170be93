"""Orthonormal bases from second moments."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lowkey.core.types import Basis, Heads


def principal(moment: Float[Tensor, "*h d d"]) -> tuple[Float[Tensor, "*h d d"], Float[Tensor, "*h d"]]:
    """The eigenvectors and eigenvalues of second moments, largest first, in fp64.

    Signs of eigenvectors are arbitrary. Here the largest entry of each is made positive, so that runs agree.

    Returns:
        (eigenvectors as columns, eigenvalues, at least 0).
    """
    energy, vectors = torch.linalg.eigh(moment.double())
    vectors, energy = vectors.flip(-1), energy.flip(-1).clamp_min(0)
    largest = vectors.abs().argmax(-2, keepdim=True)
    return vectors * vectors.gather(-2, largest).sign(), energy


def orthonormal(a: Float[Tensor, "*h d r"]) -> Float[Tensor, "*h d r"]:
    """An orthonormal basis whose first k columns span the first k columns of `a`, for every k.

    It is the Q of a QR decomposition in fp32, with signs such that the diagonal of R is positive.
    """
    q, r = torch.linalg.qr(a.float())
    return q * r.diagonal(dim1=-2, dim2=-1).detach().sign().unsqueeze(-2)


def is_orthonormal(columns: Float[Tensor, "*h d r"], tolerance: float = 1e-3) -> bool:
    """Whether no entry of the columns' Gram matrix is further than `tolerance` from the identity's."""
    gram = columns.float().mT @ columns.float()
    eye = torch.eye(gram.shape[-1], device=gram.device)
    return bool((gram - eye).abs().max() < tolerance)


def principal_basis(moments: Tensor, heads: Heads) -> Basis:
    """The eigenbasis of the heads' second moments (h, d, d).

    Args:
        moments: of each head.
        heads: `per_head` for a basis of each head's own, `shared` for one basis of their sum.
    """
    vectors, energy = principal(moments.sum(0, keepdim=True) if heads == "shared" else moments)
    return Basis(vectors.float(), spectrum=energy)
