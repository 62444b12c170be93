"""ReCalKV (arXiv:2505.24357): similar key heads share latents, values share a calibrated one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowkey.core.head_groups import per_head_maps
from lowkey.core.options import option
from lowkey.core.types import Factors, LayerBases, LayerStatistics, Layout
from lowkey.methods.base import CalibrationContext, Method
from lowkey.models import families
from lowkey.models.projections import projections
from lowkey.ops.bases import principal
from lowkey.ops.products import column_signs, group_size, joint_moments, merged_basis, reorder_heads
from lowkey.probes.layer_inputs import first_inputs
from lowkey.probes.layer_probe import LayerProbe, LowRankReconstruction, layer_in_fp32, layer_outputs
from lowkey.storage.reconstruction import ReconstructionLayer
from lowkey.storage.second_moments import joint_moment

VALUE_RIDGE = 1e-9  # relative to the mean eigenvalue: no direction of the values is wholly without energy
PAPER_HEADS_PER_GROUP = 4  # the paper's


@dataclass(frozen=True)
class ReCalKV(Method):
    """ReCalKV, an orthonormal method in closed form: reordered groups of key heads, calibrated joint values.

    Keys: KV heads are reordered so that similar ones are neighbours (section 3.2). Then every `group` of them
    gets a whitened SVD, which is PCA of the group's keys. Similarity is linear CKA of the heads' whitened
    weights; what a norm or a bias adds to keys afterwards does not count in it.

    Values: a whitened SVD of the whole W_V, so all heads share one latent. Once ranks are chosen,
    `iterations` rounds of alternating least squares calibrate it (section 3.3). They take each layer's inputs
    from the stream that the compressed layers before it leave, as the published code does. On inputs of the
    uncompressed model the whitened SVD is optimal already, and calibration would change nothing. A round is
    one step of subspace iteration towards PCA of the values in the compressed stream, which is optimal there.

    Source: arXiv:2505.24357 and its code. Where we differ: every token counts on its own, while the code
    first sums 8 windows position by position; biases move with their heads, while the code leaves them
    behind; under `post_rope` (ours) rotated keys are grouped.

    Args:
        group: how many KV heads share one latent of keys (default 4, the paper's, which becomes the largest
            divisor of the number of KV heads up to 4). Any other number must divide it.
        iterations: rounds of calibration of the values (default 1).
    """

    summary: ClassVar[str] = (
        "keys of similar heads in groups, values jointly and calibrated in the compressed stream"
    )
    paper: ClassVar[str] = "arXiv:2505.24357"
    allocator: ClassVar[str] = "fisher"
    layout: ClassVar[Layout] = "pre_rope"
    has_finish = True

    group: int = option(PAPER_HEADS_PER_GROUP, at_least=1, at_most=1024)
    iterations: int = option(1, at_least=0, at_most=1000)

    def candidates(self, heads: int, head_dim: int, ranks: list[int]) -> list[int]:
        """Return all ranks; refuse a group that does not divide the heads."""
        group_size(heads, self.group, PAPER_HEADS_PER_GROUP)
        return ranks

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        """Return PCA of the reordered groups of keys, and of all values together."""
        heads = statistics.heads
        t = group_size(heads, self.group, PAPER_HEADS_PER_GROUP)
        weights = projections(probe.model, probe.index).k
        similarity = cka(whitened(weights, statistics.inputs))
        order = order_of(grouped_by_similarity(similarity, t))
        keys, values = (reorder_heads(m, order, heads) for m in joint_moments(statistics, probe.layout))
        return LayerBases(merged_basis(keys, heads, t), merged_basis(values, heads, heads), order)

    def finish(self, factors: dict[int, Factors], context: CalibrationContext) -> dict[int, Factors]:
        """Calibrate the value maps layer by layer, each on the stream that the compressed layers leave."""
        model, batch, factors = context.model, context.batch, dict(factors)
        hidden = first_inputs(model, context.training_windows, batch)
        for i in context.progress(range(max(factors) + 1), "calibrating values"):
            # a copy in fp32: the model itself stays as it is
            block, transform = layer_in_fp32(model, i), None
            if i in factors:
                recorder = ValueMoment(factors[i].v_down.shape[1])
                layer_outputs(model, i, block, hidden, recorder, batch)
                factors[i] = calibrated(factors[i], recorder.moment, self.iterations)
                maps = factors[i].to(next(block.parameters()))
                low_rank = LowRankReconstruction(maps, context.layout, families.rope(model, i))
                transform = ReconstructionLayer(low_rank, context.exact)
            # The next layer reads what this one puts out when it is compressed.
            hidden = layer_outputs(model, i, block, hidden, transform, batch)
        return factors


# -- keys


def whitened(weights: Tensor, inputs: Tensor) -> Tensor:
    """Return the whitened key projection S^T W of every head.

    Args:
        weights: W (h, d, D).
        inputs: second moment C_X of the layer's inputs (D, D); S S^T = C_X, from its eigenvectors.

    Returns:
        (h, D, d) in fp64.
    """
    vectors, energy = principal(inputs)
    return (energy.sqrt().unsqueeze(-1) * vectors.mT) @ weights.double().mT


def cka(parts: Tensor) -> Tensor:
    """Return linear CKA (h, h) of matrices (h, D, d), whose D rows are centred samples (Eq. 2-3).

    Eq. 2-3 and the published code use D x D Gram matrices. The trace of their product is ||X^T Y||_F^2, which
    needs only d x d ones. Like that code, this centres the rows of S^T W; which root S is chosen then
    matters, by about 1 / D of the energy.
    """
    h, _, d = parts.shape
    side_by_side = (parts - parts.mean(1, keepdim=True)).transpose(0, 1).flatten(1)
    hsic = (side_by_side.mT @ side_by_side).square().view(h, d, h, d).sum((1, 3))
    own = hsic.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return hsic / own / own.unsqueeze(1)


def grouped_by_similarity(similarity: Tensor, t: int) -> list[list[int]]:
    """Group heads greedily by their similarity (section 3.2).

    Pair after pair, most similar first, opens a group, or a head joins its partner's group while there is
    room. Heads that are left over fill the remaining places in their own order. The published code lets pairs
    overflow a group and repairs that afterwards.

    Args:
        similarity: (h, h).
        t: heads in a group.

    Returns:
        h / t groups of t heads.
    """
    h = len(similarity)
    groups: list[list[int]] = []
    pairs = sorted(
        ((i, j) for i in range(h) for j in range(i + 1, h)), key=lambda p: (-float(similarity[p]), p)
    )
    # of both heads of a pair, one or none may have a group already
    for pair in pairs if t > 1 else []:
        ungrouped = [i for i in pair if not any(i in g for g in groups)]
        partner = next((g for g in groups if len(ungrouped) == 1 and not set(pair).isdisjoint(g)), None)
        if partner is not None and len(partner) < t:
            partner += ungrouped
        elif len(ungrouped) == 2 and len(groups) < h // t:
            groups.append(list(pair))
    groups += [[] for _ in range(h // t - len(groups))]
    for i in range(h):
        if not any(i in g for g in groups):
            next(g for g in groups if len(g) < t).append(i)
    return groups


def order_of(groups: list[list[int]]) -> Tensor | None:
    """Return the heads (h) group after group, or None if that is their own order.

    Groups are ordered by their first head, and heads within a group by their number.
    """
    order = [i for g in sorted(sorted(g) for g in groups) for i in g]
    return None if order == sorted(order) else torch.tensor(order)


# -- values


class ValueMoment:
    """Sums the joint second moment of a layer's values, and returns keys and values unchanged.

    Attributes:
        moment: the sum so far, (h d, h d) in fp64.
    """

    def __init__(self, width: int) -> None:
        self.moment = torch.zeros(width, width, dtype=torch.float64)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the values (b, h, t, d) to the moment."""
        self.moment += joint_moment(values).double().cpu()
        return keys, values


def calibrated(f: Factors, moment: Tensor, iterations: int) -> Factors:
    """Return factors whose value maps were refitted by alternating least squares (section 3.3).

    Up map: L = argmin ||V D L - V|| = (D^T C D)^{-1} D^T C for the down map D and C = V^T V (Eq. 7).
    Down map: D = L^+ (Eq. 8, where the factor of the weights is W_V L^+), the best for that L whatever the
    values. D L then projects onto the rows of L, and an orthonormal basis Q of these rows gives the same
    projection, Q Q^T = L^+ L; so Q is what is kept. At full rank nothing can be gained.

    Args:
        f: the layer's factors.
        moment: C, the joint second moment of the values (h d, h d), heads in their own order.
        iterations: rounds.
    """
    down, heads = f.v_down[0].double(), f.merge[1]
    if down.shape[0] == down.shape[1]:
        return f
    c = reorder_heads(moment, f.order, heads)
    ridge = (VALUE_RIDGE * c.diagonal().mean()).clamp_min(torch.finfo(torch.float32).tiny)
    # without it, directions that no value takes would make the system singular
    c = c + ridge * torch.eye(len(c), dtype=torch.float64)
    for _ in range(iterations):
        up = torch.linalg.solve(down.mT @ c @ down, down.mT @ c)
        down = torch.linalg.qr(up.mT).Q
    # QR leaves the signs of columns open; they are fixed so that results can be compared
    kept = (down * column_signs(down)).float().unsqueeze(0)
    return replace(f, v_down=kept, v_up=per_head_maps(kept.mT, heads).contiguous())
