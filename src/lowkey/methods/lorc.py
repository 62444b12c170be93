"""LoRC (arXiv:2410.03111): truncated SVD of the key and of the value projection; no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lowkey.core.types import LayerBases, LayerStatistics, Layout
from lowkey.methods.base import Method
from lowkey.ops.products import joint_moments, merged_basis
from lowkey.probes.layer_probe import LayerProbe


@dataclass(frozen=True)
class LoRC(Method):
    """W_K ~ U S V^T: what is cached is k V_r, and V_r^T rebuilds the keys. The same for W_V.

    scope: `layer` takes the whole projection, all KV heads in one latent, as the paper does; `head` one head
    at a time.
    whiten: the SVD of C_X^{1/2} W_K instead, C_X the moment of the layer's inputs, which is PCA of the keys
    themselves. It takes data, as the paper does not, and is far better (arXiv:2406.07056 compares the two).

    Biases, of which the paper's models have none, pass through the same maps: a bias counts as the weight of
    one more input, always 1, so that the SVD is that of W_K with b_K as one more row. The paper merges V into
    W_Q, which a rotation in between forbids: keys are cached before rotation (`pre_rope`). Under `post_rope`
    the keys that white inputs would give are rotated to every position of a window and the basis is that of
    all of them (ours). No public code is known.
    """

    summary: ClassVar[str] = "truncated SVD of the whole W_K and of the whole W_V, without data"
    paper: ClassVar[str] = "arXiv:2410.03111"
    allocator: ClassVar[str] = "condition"
    layout: ClassVar[Layout] = "pre_rope"

    scope: Literal["layer", "head"] = "layer"
    whiten: bool = False

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        heads = statistics.heads
        if self.whiten:
            keys, values = joint_moments(statistics, probe.layout)
        else:
            keys, values = probe.white_moments(
                probe.layout, "option whiten=false of method 'lorc'", "set whiten=true"
            )
        t = heads if self.scope == "layer" else 1
        return LayerBases(merged_basis(keys, heads, t), merged_basis(values, heads, t))
