"""Least squares whose unknowns are drawn to a known solution, where the data do not decide."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

MOST_STEPS = 512
LOOKED_AFTER = 16  # steps between looks at how much changes, each of which an accelerator waits for
SETTLED = 1e-7  # the largest change of an unknown at which a solution counts as found


def drawn(gram: Float[Tensor, "t t"], pull: float) -> Float[Tensor, "t t"]:
    """`gram` with `pull` times the mean of its diagonal added to the diagonal."""
    return gram + pull * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def bounded_least_squares(
    gram: Float[Tensor, "t t"], target: Float[Tensor, " t"], pull: float, low: float, high: float
) -> Float[Tensor, " t"]:
    """The x between two bounds that minimises |A x - y|^2 + c |x - 1|^2.

    Accelerated projected gradient steps, with unknowns scaled so that each has the same curvature. All
    entries of A are at least 0.

    Args:
        gram: A^T A.
        target: A^T y.
        pull: c, as a multiple of the mean of the diagonal of A^T A; above 0.
        low: the least that an unknown may be, below 1.
        high: the most that an unknown may be, above 1.
    """
    if not bool(gram.diagonal().any()):
        return torch.ones_like(target)
    whole = drawn(gram, pull)
    goal = target + pull * gram.diagonal().mean()
    scale = whole.diagonal().rsqrt()
    whole = scale.unsqueeze(1) * whole * scale
    goal, least, most = goal * scale, low / scale, high / scale
    step = 1 / whole.sum(1).max()  # entries are at least 0, so no eigenvalue exceeds the largest sum of a row
    x = ahead = 1 / scale
    momentum = start = torch.ones_like(step)
    for taken in range(1, MOST_STEPS + 1):
        new = (ahead - step * (whole @ ahead - goal)).clamp(least, most)
        change = new - x
        # begin anew where the momentum points uphill
        momentum = torch.where((ahead - new) @ change > 0, start, momentum)
        following = (1 + (1 + 4 * momentum**2).sqrt()) / 2
        ahead, x, momentum = new + (momentum - 1) / following * change, new, following
        if taken % LOOKED_AFTER == 0 and float((change * scale).abs().max()) < SETTLED:
            break
    return x * scale
