"""Plain uncentred PCA of keys and of values: the baseline every other basis must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lowkey.ops.bases import principal
from lowkey.probe import Probe
from lowkey.types import Basis, LayerBases, LayerStatistics, head_blocks

Heads = Literal["shared", "per_head"]


@dataclass(frozen=True)
class PCA:
    """Top eigenvectors of the second moment of keys alone and of values alone.

    key_bases, value_bases: one basis per KV head, or one shared by the heads of a layer.
    """

    summary: ClassVar[str] = "uncentred PCA of keys and values, the plain baseline"
    paper: ClassVar[str] = ""
    allocator: ClassVar[str] = "greedy"

    key_bases: Heads = "per_head"
    value_bases: Heads = "per_head"

    def fit(self, statistics: LayerStatistics, probe: Probe, ranks: list[int], seed: int) -> LayerBases:
        keys, values = statistics.keys(probe.layout), head_blocks(statistics.values, statistics.heads)
        return LayerBases(principal_basis(keys, self.key_bases), principal_basis(values, self.value_bases))


def principal_basis(moments: Tensor, heads: Heads) -> Basis:
    """The eigenbasis of (h, d, d) moments, per head or of their sum."""
    vectors, energy = principal(moments.sum(0, keepdim=True) if heads == "shared" else moments)
    return Basis(vectors.float(), spectrum=energy)
