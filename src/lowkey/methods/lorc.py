"""LoRC (arXiv:2410.03111): truncated SVD of the key projection and of the value projection, without data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lowkey.core.types import LayerBases, LayerStatistics, Layout
from lowkey.methods.base import Method
from lowkey.ops.products import joint_moments, merged_basis
from lowkey.probes.layer_probe import LayerProbe


@dataclass(frozen=True)
class LoRC(Method):
    """LoRC, a data-free orthonormal method: truncated SVD of the projection weights.

    With W_K = U S V^T, the cache stores k V_r, and V_r^T gives the keys back; the same for W_V. Biases, which
    the paper's models do not have, pass through the same maps: a bias counts as the weight of one more input
    that is always 1, so the SVD is that of W_K with b_K as one more row.

    Source: arXiv:2410.03111; no public code is known. The paper merges V into W_Q. A rotation between them
    forbids that, so keys are cached before their rotation (`pre_rope`). Under `post_rope` (ours), the keys
    that white inputs would give are rotated to every position of a window, and the basis is that of all of
    them.

    Args:
        scope: `layer` (default, the paper's) decomposes the whole projection, so that all KV heads share one
            latent; `head` decomposes one head at a time.
        whiten: decompose C_X^{1/2} W_K instead, with C_X the second moment of the layer's inputs; this is PCA
            of the keys themselves. It needs data, which the paper's method does not, and is far better
            (arXiv:2406.07056 compares the two). Default false.
    """

    summary: ClassVar[str] = "truncated SVD of the whole W_K and of the whole W_V, without data"
    paper: ClassVar[str] = "arXiv:2410.03111"
    allocator: ClassVar[str] = "condition"
    layout: ClassVar[Layout] = "pre_rope"

    scope: Literal["layer", "head"] = "layer"
    whiten: bool = False

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        """Return the right singular vectors of W_K and of W_V."""
        heads = statistics.heads
        if self.whiten:
            keys, values = joint_moments(statistics, probe.layout)
        else:
            keys, values = probe.white_moments(
                probe.layout, "option whiten=false of method 'lorc'", "set whiten=true"
            )
        # The right singular vectors of a matrix are the eigenvectors of its Gram matrix.
        t = heads if self.scope == "layer" else 1
        return LayerBases(merged_basis(keys, heads, t), merged_basis(values, heads, t))
