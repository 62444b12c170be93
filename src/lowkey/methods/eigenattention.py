"""EigenAttention (arXiv:2408.05646): eigenvectors of keys joined with queries, and of values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lowkey.core.types import Heads, LayerBases, LayerStatistics, Layout, head_blocks
from lowkey.methods.base import Method
from lowkey.ops.bases import principal_basis
from lowkey.probes.layer_probe import LayerProbe


@dataclass(frozen=True)
class EigenAttention(Method):
    """SVD of stacked activations, here from their second moments.

    form: `paper` takes the key basis from keys and queries together ([K; Q]); `code` from keys alone, as the
    official Llama code does although it calls the basis kq. Both share it over the heads of a layer under
    RoPE; values have one per KV head. Keys are stored before rotation, and one energy threshold is lowered
    until the layer's output error exceeds an error budget (allocator `threshold`), as in the paper; any other
    layout and allocator works too.
    """

    summary: ClassVar[str] = "eigenvectors of [K; Q] and of V"
    paper: ClassVar[str] = "arXiv:2408.05646"
    allocator: ClassVar[str] = "threshold"
    layout: ClassVar[Layout] = "pre_rope"

    form: Literal["paper", "code"] = "paper"
    key_bases: Heads = "shared"
    value_bases: Heads = "per_head"

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        keys = statistics.keys(probe.layout)
        if self.form == "paper":
            keys = keys + statistics.queries(probe.layout)
        values = head_blocks(statistics.values, statistics.heads)
        return LayerBases(principal_basis(keys, self.key_bases), principal_basis(values, self.value_bases))
