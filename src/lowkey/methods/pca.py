"""Plain uncentred PCA of keys and of values: the baseline every other basis must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowkey.core.types import Heads, LayerBases, LayerStatistics, head_blocks
from lowkey.methods.base import Method
from lowkey.ops.bases import principal_basis
from lowkey.probes.layer_probe import LayerProbe


@dataclass(frozen=True)
class PCA(Method):
    """Top eigenvectors of the second moment of keys alone and of values alone.

    key_bases, value_bases: one basis per KV head, or one shared by the heads of a layer; the same defaults as
    the other methods, so that what differs between their rows is the basis.
    """

    summary: ClassVar[str] = "uncentred PCA of keys and values, the plain baseline"

    key_bases: Heads = "shared"
    value_bases: Heads = "per_head"

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        keys, values = statistics.keys(probe.layout), head_blocks(statistics.values, statistics.heads)
        return LayerBases(principal_basis(keys, self.key_bases), principal_basis(values, self.value_bases))
