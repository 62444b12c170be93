"""What `calibrate` and `lowkey compress` take if no method is named: what has the least KL on a real model.

docs/results/smollm2.md has the evidence at each budget.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from lowkey.calibration import sensitivity
from lowkey.core.types import Layout, LowkeyError
from lowkey.methods import KQSVD, FisherSVD, Method
from lowkey.models import families
from lowkey.storage.packing import NO_BITS


@dataclass(frozen=True)
class Recommended:
    """A method and what goes with it.

    Args:
        method: the low-rank method.
        layout: whether keys are stored before or after their rotation.
        allocator: name of the rank allocator.
        bits: packing of the latents; `none` for the model's own numbers.
    """

    method: Method
    layout: Layout
    allocator: str
    bits: str


def recommended(model: PreTrainedModel, share: float | None) -> Recommended:
    """Return what does best on a real model.

    Args:
        model: the model to compress.
        share: share of the full cache's bytes that is to be kept. None under an error budget: it bounds
            measured errors of layers, so that these choose the ranks (`greedy`), and no integers are added,
            whose rounding is not in those errors.
    """
    try:
        families.check_layout(model, "pre_rope")
        layout: Layout = "pre_rope"
    except LowkeyError:
        layout = "post_rope"
    try:
        sensitivity.check_signals(model, ("fisher",))
    except LowkeyError:  # weights that give no gradients
        return Recommended(KQSVD(group=0), layout, "uniform", _bits(share))
    return Recommended(FisherSVD(), layout, "spectrum" if share is not None else "greedy", _bits(share))


def _bits(share: float | None) -> str:
    """Return the packing for a share of the bytes.

    At equal bytes on SmolLM2-135M, more ranks in fewer bits beat fewer ranks in more bits, down to 4 bits.
    But 4 bits hold every rank in a third of the bytes, so that they have no use for more bytes: above 45 %
    of the bytes, 8 bits are better.
    """
    if share is None or share >= 1:
        return NO_BITS
    return "kivi8" if share > 0.45 else "kivi4"
