"""LoRC (arXiv:2410.03111): truncated SVD of the key and of the value projection; no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowkey import families
from lowkey.methods.base import Method
from lowkey.ops.products import joint_moments, merged_basis, rotated_moment
from lowkey.probe import Probe
from lowkey.types import LayerBases, LayerStatistics, Layout, LowkeyError, device_of


@dataclass(frozen=True)
class LoRC(Method):
    """W_K ~ U S V^T: what is cached is k V_r, and V_r^T rebuilds the keys. The same for W_V.

    scope: `layer` takes the whole projection, all KV heads in one latent, as the paper does; `head` one head at a time.
    whiten: the SVD of C_X^{1/2} W_K instead, C_X the moment of the layer's inputs, which is PCA of the keys themselves. It takes data,
    as the paper does not, and is far better (arXiv:2406.07056 compares the two).

    Biases, of which the paper's models have none, pass through the same maps: a bias counts as the weight of one more input, always 1,
    so that the SVD is that of W_K with b_K as one more row.
    The paper merges V into W_Q, which a rotation in between forbids: keys are cached before rotation (`pre_rope`). Under `post_rope` the
    keys that white inputs would give are rotated to every position of a window and the basis is that of all of them (ours).
    No public code is known.
    """

    summary: ClassVar[str] = "truncated SVD of the whole W_K and of the whole W_V, without data"
    paper: ClassVar[str] = "arXiv:2410.03111"
    allocator: ClassVar[str] = "condition"
    layout: ClassVar[Layout] = "pre_rope"

    scope: Literal["layer", "head"] = "layer"
    whiten: bool = False

    def fit(self, statistics: LayerStatistics, probe: Probe, ranks: list[int], seed: int) -> LayerBases:
        heads = statistics.heads
        keys, values = joint_moments(statistics, probe.layout) if self.whiten else _from_weights(probe)
        t = heads if self.scope == "layer" else 1
        return LayerBases(merged_basis(keys, heads, t), merged_basis(values, heads, t))


def _from_weights(probe: Probe) -> tuple[Tensor, Tensor]:
    """Joint moments (h d, h d) of the keys and values that white inputs would give."""
    p = families.projections(probe.model, probe.index)
    if p.normed:
        raise LowkeyError(
            "option whiten=false of method 'lorc': keys of this model pass a norm after their projection, of which weights say nothing; "
            "set whiten=true"
        )
    keys = _gram(p.k, p.k_bias)
    if probe.layout == "post_rope":
        positions = torch.arange(probe.inputs.shape[1], device=device_of(probe.block)).unsqueeze(0)
        cos, sin = (x[0, 0].cpu() for x in probe.rope(positions, torch.empty(0, device=positions.device)))
        keys = rotated_moment(keys, cos, sin, p.k.shape[1])
    return keys, _gram(p.v, p.v_bias)


def _gram(weight: Tensor, bias: Tensor | None) -> Tensor:
    """(h d, h d) in fp64, from weights (h, d, D) and a bias (h, d)."""
    flat = weight.flatten(0, 1).double()
    return flat @ flat.mT + (0 if bias is None else torch.outer(bias.flatten().double(), bias.flatten().double()))
