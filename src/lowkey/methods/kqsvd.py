"""KQ-SVD (arXiv:2512.05916): the maps that best keep keys times queries, and values times output weights."""

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
from lowkey.models.attention_interface import AttendingLayer, Call, Incoming
from lowkey.models.projections import projections
from lowkey.ops.products import block_diagonal_groups, group_size, joint_moments, oblique_basis
from lowkey.ops.rope import unrotate
from lowkey.probes.layer_probe import LayerProbe

WINDOWS_AT_ONCE = 4  # windows per forward pass


@dataclass(frozen=True)
class KQSVD(Method):
    """KQ-SVD, an oblique method in closed form that keeps products instead of keys and values themselves.

    Per KV head, keys get the projector P that minimises ||K Q^T - K P Q^T||_F, with the queries of the head's
    g query heads stacked. Values get the one that minimises ||V W_O - V P W_O||_F. Every pair of a query and
    a key counts, pairs with later keys too, and the softmax does not.

    Source: arXiv:2512.05916. The paper stores rotated keys. Under `pre_rope` the product is that of unrotated
    keys and queries, which is no attention score. Ranks are chosen by the tail of the singular values of
    these products, per layer: allocator `tail`.

    Args:
        outputs: `stacked` (default) takes W_O of the g query heads side by side, which is optimal for
            ||V W_O,i - V P W_O,i||_F summed over them. `averaged` takes their mean, as in the published code.
            Attention adds up A_i V W_O,i over the heads: `stacked` is right if what the heads read is
            uncorrelated, `averaged` if they all attend alike.
        weighting: `none` (default) or `outputs` (ours). `outputs` weights query m by
            c_m = sum_n a_mn^2 ||(v_n - o_m) W_O||^2: how far the attention output moves, to first order, if
            its scores are off by independent errors of one size. Norms after attention are left out.
        group: how many KV heads share one latent (default 1, the paper's; more is ours); it divides their
            number, or is 0 for all. The errors above are then summed over the group.
        ridge: what is added to the moments of keys and values, relative to their mean eigenvalue (default
            1e-6).
    """

    summary: ClassVar[str] = "the best rank-r maps for K Q^T and for V W_O"
    paper: ClassVar[str] = "arXiv:2512.05916"
    allocator: ClassVar[str] = "tail"

    outputs: Literal["stacked", "averaged"] = "stacked"
    weighting: Literal["none", "outputs"] = "none"
    group: int = option(1, at_least=0, at_most=1024)
    ridge: float = option(1e-6, at_least=0, at_most=1)

    def candidates(self, heads: int, head_dim: int, ranks: list[int]) -> list[int]:
        """Return all ranks; refuse a group that does not divide the heads."""
        group_size(heads, self.group or heads)
        return ranks

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        """Return the projectors that keep K Q^T and V W_O best."""
        heads, t = statistics.heads, group_size(statistics.heads, self.group or statistics.heads)
        # (h, g, D, d): output weights of the g query heads of every KV head
        weights = projections(probe.model, probe.index).o.double().unflatten(0, (heads, -1))
        if self.weighting == "none":
            queries = statistics.queries(probe.layout)
        else:
            queries = weighted_queries(probe, grams(weights))
        # what reads the values, as a metric for their errors
        read = grams(weights).sum(1) if self.outputs == "stacked" else grams(weights.mean(1))
        keys, values = (head_blocks(m, heads // t) for m in joint_moments(statistics, probe.layout))
        return LayerBases(
            oblique_basis(keys, block_diagonal_groups(queries, t), self.ridge, t),
            oblique_basis(values, block_diagonal_groups(read, t), self.ridge, t),
        )


def grams(weights: Tensor) -> Tensor:
    """Return W^T W (..., d, d) of output weights (..., D, d).

    It is the metric in which a difference of values counts in the layer's output.
    """
    return weights.mT @ weights


@torch.no_grad()
def weighted_queries(probe: LayerProbe, outputs: Tensor) -> Tensor:
    """Return the sum of c_m q_m^T q_m over the queries of the training windows; `KQSVD` defines c_m.

    Args:
        probe: the layer with its inputs.
        outputs: `grams` of the output weights (h, g, d, d).

    Returns:
        One moment per KV head, (h, d, d) in fp64.
    """
    device = device_of(probe.block)
    layer = WeightedQueryLayer(probe, outputs.float().to(device))
    for x in probe.inputs[: probe.training_count].split(WINDOWS_AT_ONCE):
        probe.run(x.to(device), layer)
    return layer.moment


class WeightedQueryLayer(AttendingLayer):
    """Stands in for a cache layer: attends to what it is given and sums the weighted moments of queries.

    Attributes:
        moment: the sum so far, (h, d, d) in fp64.
    """

    def __init__(self, probe: LayerProbe, outputs: Tensor) -> None:
        self.probe, self.outputs = probe, outputs
        self.moment = torch.zeros(outputs.shape[0], *outputs.shape[2:], dtype=torch.float64)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Incoming, Incoming]:
        """Take keys and values (b, h, t, d); the attention function then calls `attend` with the queries."""
        incoming = Incoming(self, keys, values)
        return incoming, incoming

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Return the attention output, and add the queries' weighted moments to the sum."""
        out, weights = self._attend_and_weigh(keys, values, call)
        queries = call.query
        if self.probe.layout == "pre_rope":
            cos, sin = self.probe.rope(torch.arange(keys.shape[2], device=keys.device).unsqueeze(0), keys)
            queries = unrotate(queries, cos.unsqueeze(1), sin.unsqueeze(1))
        self.moment += torch.einsum("bhgt,bhgtd,bhgte->hde", weights, queries, queries).double().cpu()
        return out

    def _attend_and_weigh(self, keys: Tensor, values: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Return the attention output (b, h, g, t, d) and the weights c (b, h, g, t) of the queries.

        a^2 is again a softmax, of doubled scores, times one number per query. So the sum over a^2 is one more
        attention, over v and over |v|^2 in the metric of the output weights. No matrix of scores is stored.
        """
        mask, d = call.full_mask(keys.shape[2]), values.shape[3]
        # |v_n W_O|^2 of every value, for each of the g query heads
        sizes = torch.einsum("bhsd,hgde,bhse->bhsg", values, self.outputs, values)
        out, lse = grouped.partial([Segment(call.query, keys, values, mask)], call.scaling, call.softcap)
        # soft-capped scores are cap * tanh(s / cap): doubled with the cap they are exactly twice as large
        doubled_cap = None if call.softcap is None else 2 * call.softcap
        wide = Segment(call.query, keys, torch.cat([values, sizes], -1), mask)
        mean, lse_squared = grouped.partial([wide], 2 * call.scaling, doubled_cap)
        own_size = mean[..., d:].diagonal(dim1=2, dim2=4).transpose(2, 3)  # of each query head its own column
        # ||(v - o) W||^2 = |v W|^2 - 2 (v W) . (o W) + |o W|^2, averaged over the doubled softmax
        out_in_metric = torch.einsum("hgde,bhgte->bhgtd", self.outputs, out)
        spread = own_size + ((out - 2 * mean[..., :d]) * out_in_metric).sum(-1)
        return out, spread.clamp_min(0) * (lse_squared - 2 * lse).exp()
