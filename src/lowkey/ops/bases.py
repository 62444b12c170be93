"""Orthonormal bases from second moments."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lowkey.core.types import Basis, Heads


def principal(moment: Float[Tensor, "*h d d"]) -> tuple[Float[Tensor, "*h d d"], Float[Tensor, "*h d"]]:
    """Eigenvectors as columns, largest energy first, and the energies (clamped at 0). Signs are fixed, so
    runs agree.
    """
    energy, vectors = torch.linalg.eigh(moment.double())
    vectors, energy = vectors.flip(-1), energy.flip(-1).clamp_min(0)
    largest = vectors.abs().argmax(-2, keepdim=True)
    return vectors * vectors.gather(-2, largest).sign(), energy


def orthonormal(a: Float[Tensor, "*h d r"]) -> Float[Tensor, "*h d r"]:
    """An orthonormal basis of the columns' nested spans: the Q of QR in fp32, columns signed so that R's
    diagonal is positive.
    """
    q, r = torch.linalg.qr(a.float())
    return q * r.diagonal(dim1=-2, dim2=-1).detach().sign().unsqueeze(-2)


def is_orthonormal(columns: Float[Tensor, "*h d r"], tolerance: float = 1e-3) -> bool:
    gram = columns.float().mT @ columns.float()
    eye = torch.eye(gram.shape[-1], device=gram.device)
    return bool((gram - eye).abs().max() < tolerance)


def principal_basis(moments: Tensor, heads: Heads) -> Basis:
    """The eigenbasis of (h, d, d) moments, per head or of their sum."""
    vectors, energy = principal(moments.sum(0, keepdim=True) if heads == "shared" else moments)
    return Basis(vectors.float(), spectrum=energy)
