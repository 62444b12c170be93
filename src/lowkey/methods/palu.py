"""Palu (arXiv:2407.21118): a whitened SVD of the key and of the value projection, a group of heads at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowkey.core.options import option
from lowkey.core.types import LayerBases, LayerStatistics, Layout
from lowkey.methods.base import Method
from lowkey.ops.products import group_size, joint_moments, merged_basis
from lowkey.probes.layer_probe import LayerProbe


@dataclass(frozen=True)
class Palu(Method):
    """Every `group` KV heads side by side share one latent (the paper's G-LRD); 1 is its M-LRD, all heads its
    J-LRD.

    The paper whitens: S S^T = X^T X, then the SVD of S^T W of a group. The right singular vectors are the
    eigenvectors of W^T X^T X W, so this is uncentred PCA of the group's own keys or values, which is how it
    is computed here. Biases and norms, of which the weights say nothing, are thereby in it. group: the
    paper's 4 becomes the largest divisor up to 4 of the number of KV heads; any other must divide it.

    The paper caches keys before rotation; under `post_rope` the rotated ones are grouped, which it does not
    do. Its code rounds the ranks of a group to multiples of 32: `rank_multiple` is of ranks per head, so that
    8 is its 32 for groups of 4.
    """

    summary: ClassVar[str] = "whitened SVD of W_K and W_V, heads in groups that share a latent"
    paper: ClassVar[str] = "arXiv:2407.21118"
    allocator: ClassVar[str] = "fisher"
    layout: ClassVar[Layout] = "pre_rope"

    group: int = option(4, at_least=1, at_most=1024)

    def candidates(self, heads: int, head_dim: int, ranks: list[int]) -> list[int]:
        group_size(heads, self.group, 4)
        return ranks

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        keys, values = joint_moments(statistics, probe.layout)
        t = group_size(statistics.heads, self.group, 4)
        return LayerBases(merged_basis(keys, statistics.heads, t), merged_basis(values, statistics.heads, t))
