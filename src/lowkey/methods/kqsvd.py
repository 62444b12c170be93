"""KQ-SVD (arXiv:2512.05916): the low-rank maps that keep the product of keys and queries, and of values and
output weights, best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowkey.backends import grouped
from lowkey.backends.segment import Segment
from lowkey.core.options import option
from lowkey.core.types import LayerBases, LayerStatistics, device_of, head_blocks
from lowkey.methods.base import Method
from lowkey.models import families
from lowkey.models.attention_interface import AttendingLayer, Call, Incoming
from lowkey.ops.products import beside_one_another, group_size, joint_moments, oblique_basis
from lowkey.ops.rope import unrotate
from lowkey.probes.layer_probe import LayerProbe

WINDOWS_AT_ONCE = 4


@dataclass(frozen=True)
class KQSVD(Method):
    """Per KV head the oblique projector that minimises ||K Q^T - K P Q^T||_F, with the queries of its g heads
    stacked, and the one that minimises ||V W_O - V P W_O||_F. Every pair of a query and a key counts, the
    future ones too, and the softmax does not.

    outputs: W_O of the g heads side by side (`stacked`, the optimum of ||V W_O,i - V P W_O,i||_F summed over
    them), or their mean (`averaged`, as in the published code). What attention puts out is the sum of A_i V
    W_O,i over them, for which `stacked` is right if what they read is uncorrelated, and `averaged` if they
    all attend alike.
    weighting: `outputs` (ours; not in the paper) weights a query by c_m = sum_n a_mn^2 ||(v_n - o_m) W_O||^2:
    how much the output of attention moves, to first order, when its scores are off by independent errors of
    one size. Norms after attention are left out.
    group: how many KV heads share one latent (ours; 1 in the paper), a divisor of their number, or 0 for all
    of a layer; then the same errors are minimised in sum over these heads.
    ridge: what is added to the moments of keys and values, relative to their mean eigenvalue.

    Under `pre_rope` all this is about un-rotated keys and queries, whose product is no score; the paper has
    rotated ones. It chooses ranks by the tail of S, per layer, and so does the allocator `tail`.
    """

    summary: ClassVar[str] = "the best rank-r maps for K Q^T and for V W_O"
    paper: ClassVar[str] = "arXiv:2512.05916"
    allocator: ClassVar[str] = "tail"

    outputs: Literal["stacked", "averaged"] = "stacked"
    weighting: Literal["none", "outputs"] = "none"
    group: int = option(1, at_least=0, at_most=1024)
    ridge: float = option(1e-6, at_least=0, at_most=1)

    def candidates(self, heads: int, head_dim: int, ranks: list[int]) -> list[int]:
        group_size(heads, self.group or heads)
        return ranks

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        heads, t = statistics.heads, group_size(statistics.heads, self.group or statistics.heads)
        # (h, g, D, d)
        weights = families.projections(probe.model, probe.index).o.double().unflatten(0, (heads, -1))
        queries = (
            statistics.queries(probe.layout)
            if self.weighting == "none"
            else weighted_queries(probe, grams(weights))
        )
        read = grams(weights).sum(1) if self.outputs == "stacked" else grams(weights.mean(1))
        keys, values = (head_blocks(m, heads // t) for m in joint_moments(statistics, probe.layout))
        return LayerBases(
            oblique_basis(keys, beside_one_another(queries, t), self.ridge, t),
            oblique_basis(values, beside_one_another(read, t), self.ridge, t),
        )


def grams(weights: Tensor) -> Tensor:
    """W^T W (..., d, d) of output weights (..., D, d): what a difference of values weighs in the output."""
    return weights.mT @ weights


@torch.no_grad()
def weighted_queries(probe: LayerProbe, outputs: Tensor) -> Tensor:
    """(h, d, d): the sum of c_m q_m^T q_m over the fitting windows, given the `grams` (h, g, d, d) of the
    output weights.
    """
    device = device_of(probe.block)
    watch = Watch(probe, outputs.float().to(device))
    for x in probe.inputs[: probe.training].split(WINDOWS_AT_ONCE):
        probe.run(x.to(device), watch)
    return watch.moment


class Watch(AttendingLayer):
    """Stands in for a cache layer: attends to everything it is given, once, and adds up weighted queries."""

    def __init__(self, probe: LayerProbe, outputs: Tensor) -> None:
        self.probe, self.outputs = probe, outputs
        self.moment = torch.zeros(outputs.shape[0], *outputs.shape[2:], dtype=torch.float64)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Incoming, Incoming]:
        incoming = Incoming(self, keys, values)
        return incoming, incoming

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        out, weights = self._attended(keys, values, call)
        queries = call.query
        if self.probe.layout == "pre_rope":
            cos, sin = self.probe.rope(torch.arange(keys.shape[2], device=keys.device).unsqueeze(0), keys)
            queries = unrotate(queries, cos.unsqueeze(1), sin.unsqueeze(1))
        self.moment += torch.einsum("bhgt,bhgtd,bhgte->hde", weights, queries, queries).double().cpu()
        return out

    def _attended(self, keys: Tensor, values: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """(out (b, h, g, t, d), c (b, h, g, t)).

        a^2 is again a softmax, of doubled scores, times a number per query: so the sum over a^2 is one more
        attention, over v and |v|^2 in the metric of the output weights, and no score is held longer than in
        any other attention.
        """
        mask, d = call.full_mask(keys.shape[2]), values.shape[3]
        sizes = torch.einsum("bhsd,hgde,bhse->bhsg", values, self.outputs, values)
        out, lse = grouped.partial([Segment(call.query, keys, values, mask)], call.scaling, call.softcap)
        doubled = None if call.softcap is None else 2 * call.softcap
        wide = Segment(call.query, keys, torch.cat([values, sizes], -1), mask)
        mean, lse_squared = grouped.partial([wide], 2 * call.scaling, doubled)
        own = mean[..., d:].diagonal(dim1=2, dim2=4).transpose(2, 3)  # each query head's own size
        through = torch.einsum("hgde,bhgte->bhgtd", self.outputs, out)
        spread = own + ((out - 2 * mean[..., :d]) * through).sum(-1)
        return out, spread.clamp_min(0) * (lse_squared - 2 * lse).exp()
