"""Fisher SVD (ours): the maps of keys and values that cost the model's own loss least, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowkey.core.options import option
from lowkey.core.types import LayerBases
from lowkey.methods.base import CalibrationContext, GradientMethod


@dataclass(frozen=True)
class FisherSVD(GradientMethod):
    """Fisher SVD, an oblique method in closed form from the gradients of the model's loss (ours).

    Per layer, and for keys and values apart, it takes the projectors P that minimise tr(F E C E^T), E = I -
    P. C is the second moment of keys (or values). F is that of the gradients of the loss with respect to
    them, with labels drawn from the model, which is their Fisher information. It costs one pass forward and
    back over the training windows; the model's weights stay as they are.

    Derivation: to second order, KL(original || compressed) is the mean over tokens of (g . E k)^2 / 2, if the
    errors of different tokens, layers and sides do not add up. Gradients g and keys k are then taken for
    independent, as in K-FAC (arXiv:1503.05671). The result is KQ-SVD (arXiv:2512.05916) with gradients in
    place of queries and output weights, so it knows causality, the softmax and all later layers.

    Tokens that the cache keeps exactly count in neither C nor F: a gradient counts only the queries from
    which a token is further away than `recent`. If exact tokens are more than half of a window, all tokens
    count.

    The energies of the spectra have one unit in all layers, for keys and for values, so the allocator
    `spectrum` can compare them.

    Args:
        group: how many KV heads share one latent; it divides their number, or is 0 (default) for all.
        ridge: what is added to C, relative to its mean eigenvalue (default 1e-6).
    """

    summary: ClassVar[str] = (
        "the best rank-r maps in the metric of the model's loss (Fisher information), of heads together"
    )

    ridge: float = option(1e-6, at_least=0, at_most=1)

    def tune(self, bases: dict[int, LayerBases], context: CalibrationContext) -> dict[int, LayerBases]:
        """Return the closed form for all layers."""
        return self.closed_form(context, self.ridge)
