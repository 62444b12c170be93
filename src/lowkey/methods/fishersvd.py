"""Fisher SVD (ours): the low-rank maps of keys and values that cost the model's own loss least, in closed
form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowkey.core.options import option
from lowkey.core.types import LayerBases
from lowkey.methods.base import CalibrationContext, GradientMethod


@dataclass(frozen=True)
class FisherSVD(GradientMethod):
    """The oblique projectors P_K, P_V that minimise tr(F E C E^T), E = I - P, per layer and for keys and for
    values apart.

    C is the second moment of keys (values), and F that of the gradients of the loss with respect to them,
    labels drawn from the model: their Fisher information. To second order KL(original || compressed) is the
    mean of (g . E k)^2 / 2 over tokens when the errors of different tokens, layers and sides do not add up;
    here g and k are taken for independent besides, as in K-FAC (arXiv:1503.05671). That is KQ-SVD
    (arXiv:2512.05916) with gradients in the place of queries and output weights, so it knows causality, the
    softmax and all later layers. Tokens that the cache keeps exactly have no part in either: a gradient
    counts only queries from which the token is farther than `recent`. Where exact tokens are more than half
    of a window, all tokens count.

    The energies of the spectra are of one unit for all layers, keys and values, so that the allocator
    `spectrum` can compare them.
    group: how many KV heads share one latent, a divisor of their number, or 0 for all. ridge: what is added
    to C, relative to its mean eigenvalue. One pass forward and back over the fitting windows; the model's
    weights stay as they are.
    """

    summary: ClassVar[str] = (
        "the best rank-r maps in the metric of the model's loss (Fisher information), of heads together"
    )

    ridge: float = option(1e-6, at_least=0, at_most=1)

    def tune(self, bases: dict[int, LayerBases], context: CalibrationContext) -> dict[int, LayerBases]:
        return self.closed_form(context, self.ridge)
