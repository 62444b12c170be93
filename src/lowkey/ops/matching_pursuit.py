"""Orthogonal matching pursuit for many problems at once, on their normal equations."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LEAST_LEFT = 1e-12  # what is left of a column that others span, as a share of its own square


def pursued(
    gram: Float[Tensor, "n s s"],
    target: Float[Tensor, "n s"],
    allowed: Bool[Tensor, "n s"],
    counts: Int[Tensor, " n"],
    pull: float,
    low: float,
    high: float,
) -> Bool[Tensor, "n s"]:
    """Choose columns of A one after the other, so that their weighted sum comes close to y.

    Each time the column of the largest product with the residual `y - A x` is taken, and x is solved anew
    over all taken columns: |A x - y|^2 + c |x - 1|^2, then clamped to its bounds.

    Args:
        gram: A^T A of every problem.
        target: A^T y.
        allowed: which columns may be taken.
        counts: how many are taken; all that are allowed if there are fewer.
        pull: c, as a multiple of the mean square of an allowed column; above 0.
        low: the least that an unknown may be.
        high: the most that an unknown may be.

    Returns:
        Which columns are taken.
    """
    n, s = target.shape
    counts = torch.where(counts < allowed.sum(1), counts, 0)  # the others need no choice
    most, row = int(counts.max()), torch.arange(n, device=gram.device)
    squares = gram.diagonal(dim1=1, dim2=2)
    ridge = pull * squares.masked_fill(~allowed, 0.0).sum(1) / allowed.sum(1).clamp_min(1)
    taken = torch.zeros(n, most, dtype=torch.long, device=gram.device)
    factor, columns = gram.new_zeros(n, most, most), gram.new_zeros(n, most, s)
    goal, rest, free = gram.new_zeros(n, most, 1), target, allowed.clone()
    for k in range(most):
        j = rest.masked_fill(~free, -torch.inf).argmax(1)
        taken[:, k], free[row, j] = j, False
        columns[:, k] = gram[row, j]
        goal[:, k, 0] = target[row, j] + ridge
        # one more row of the Cholesky factor of the taken columns' equations
        beside = columns[:, k].gather(1, taken[:, :k]).unsqueeze(2)
        across = torch.linalg.solve_triangular(factor[:, :k, :k], beside, upper=False)
        own = squares[row, j] + ridge
        left = own - across.square().sum((1, 2))
        factor[:, k, :k] = across[..., 0]
        factor[:, k, k] = left.maximum(LEAST_LEFT * own).clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
        x = torch.cholesky_solve(goal[:, : k + 1], factor[:, : k + 1, : k + 1]).clamp(low, high)
        rest = target - (x.mT @ columns[:, : k + 1])[:, 0]
    counted = torch.arange(most, device=gram.device) < counts.unsqueeze(1)
    chosen = torch.zeros(n, s, dtype=torch.int, device=gram.device).scatter_add_(1, taken, counted.int()) > 0
    return torch.where((counts > 0).unsqueeze(1), chosen, allowed)
