"""Palu (arXiv:2407.21118): whitened SVD of the key and of the value projection, per group of heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowkey.core.options import option
from lowkey.core.types import LayerBases, LayerStatistics, Layout
from lowkey.methods.base import Method
from lowkey.ops.products import group_size, joint_moments, merged_basis
from lowkey.probes.layer_probe import LayerProbe

PAPER_GROUP = 4


@dataclass(frozen=True)
class Palu(Method):
    """Palu, an orthonormal method in closed form in which a group of KV heads shares one latent.

    The paper whitens W, the projection of a group of heads side by side: with S S^T = X^T X it takes the SVD
    of S^T W. The right singular vectors are the eigenvectors of W^T X^T X W, so this is uncentred PCA of the
    group's own keys or values, and is computed as such. What biases and norms add to keys and values is
    thereby included; the weights alone say nothing of it.

    Source: arXiv:2407.21118. The paper caches keys before their rotation; under `post_rope` (ours) the
    rotated keys of a group are decomposed. Its code rounds the rank of a group to a multiple of 32.
    `rank_multiple` here is that of the rank per head, so 8 is its 32 for groups of 4.

    Args:
        group: how many KV heads share one latent (default 4, the paper's G-LRD, which becomes the largest
            divisor of the number of KV heads up to 4). Any other number must divide it: 1 is the paper's
            M-LRD, all heads its J-LRD.
    """

    summary: ClassVar[str] = "whitened SVD of W_K and W_V, heads in groups that share a latent"
    paper: ClassVar[str] = "arXiv:2407.21118"
    allocator: ClassVar[str] = "fisher"
    layout: ClassVar[Layout] = "pre_rope"

    group: int = option(PAPER_GROUP, at_least=1, at_most=1024)

    def candidates(self, heads: int, head_dim: int, ranks: list[int]) -> list[int]:
        """Return all ranks; refuse a group that does not divide the heads."""
        group_size(heads, self.group, PAPER_GROUP)
        return ranks

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        """Return PCA of the keys and of the values of every group."""
        keys, values = joint_moments(statistics, probe.layout)
        t = group_size(statistics.heads, self.group, PAPER_GROUP)
        return LayerBases(merged_basis(keys, statistics.heads, t), merged_basis(values, statistics.heads, t))
