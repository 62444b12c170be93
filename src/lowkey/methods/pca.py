"""Uncentred PCA of keys and of values: the baseline that every other basis must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowkey.core.types import Heads, LayerBases, LayerStatistics, head_blocks
from lowkey.methods.base import Method
from lowkey.ops.bases import principal_basis
from lowkey.probes.layer_probe import LayerProbe


@dataclass(frozen=True)
class PCA(Method):
    """Uncentred PCA, an orthonormal method in closed form.

    The basis of keys is formed by the top eigenvectors of their second moment E[k^T k], and that of values by
    those of E[v^T v]. Of all orthonormal bases these lose the least energy of keys and of values themselves;
    queries and everything after them play no part.

    The defaults of both options are those of the other orthonormal methods, so that results differ by the
    basis alone.

    Args:
        key_bases: `shared` (default) has one basis for all KV heads of a layer, `per_head` one for each.
        value_bases: the same for values (default `per_head`).
    """

    summary: ClassVar[str] = "uncentred PCA of keys and values, the plain baseline"

    key_bases: Heads = "shared"
    value_bases: Heads = "per_head"

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        """Return eigenvectors of the second moments."""
        keys, values = statistics.keys(probe.layout), head_blocks(statistics.values, statistics.heads)
        return LayerBases(principal_basis(keys, self.key_bases), principal_basis(values, self.value_bases))
