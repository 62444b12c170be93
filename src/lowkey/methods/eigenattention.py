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
    """EigenAttention, an orthonormal method in closed form.

    The basis of keys is formed by the left singular vectors of keys and queries stacked, [K; Q], and that of
    values by those of V. They are computed as eigenvectors of the second moments C_K + C_Q and C_V, so no
    activations are stored. Keys are stored before their rotation. The rank allocator is `threshold`, which
    lowers one energy threshold until the layer's output error exceeds the error budget. These two are the
    paper's; any other layout and allocator works too.

    Source: arXiv:2408.05646. The official Llama code takes the key basis from keys alone, although it names
    the basis after both: `form=code`.

    Args:
        form: `paper` (default) takes the key basis from [K; Q], `code` from K alone.
        key_bases: `shared` (default, as paper and code do under RoPE) has one basis for all KV heads of a
            layer, `per_head` one for each.
        value_bases: the same for values (default `per_head`).
    """

    summary: ClassVar[str] = "eigenvectors of [K; Q] and of V"
    paper: ClassVar[str] = "arXiv:2408.05646"
    allocator: ClassVar[str] = "threshold"
    layout: ClassVar[Layout] = "pre_rope"

    form: Literal["paper", "code"] = "paper"
    key_bases: Heads = "shared"
    value_bases: Heads = "per_head"

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        """Return eigenvectors of C_K + C_Q and of C_V."""
        keys = statistics.keys(probe.layout)
        if self.form == "paper":
            # [K; Q]^T [K; Q] = K^T K + Q^T Q
            keys = keys + statistics.queries(probe.layout)
        values = head_blocks(statistics.values, statistics.heads)
        return LayerBases(principal_basis(keys, self.key_bases), principal_basis(values, self.value_bases))
