"""ReCalKV (arXiv:2505.24357): similar heads share a latent for keys, all heads one for values, which is
calibrated afterwards.
"""

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
from lowkey.ops.bases import principal
from lowkey.ops.products import group_size, joint_moments, merged_basis, reordered, signs
from lowkey.probes.layer_inputs import first_inputs
from lowkey.probes.layer_probe import LayerProbe, LowRankReconstruction, layer_in_fp32, layer_outputs
from lowkey.storage.reconstruction import ReconstructionLayer
from lowkey.storage.second_moments import joint_moment

VALUE_RIDGE = 1e-9  # relative to the mean eigenvalue: no direction of the values is wholly without energy


@dataclass(frozen=True)
class ReCalKV(Method):
    """Keys: KV heads are reordered so that similar ones are neighbours (section 3.2), then every `group` of
    them gets a whitened SVD, that is, PCA of their keys. group: the paper's 4 becomes the largest divisor up
    to 4 of the number of KV heads; any other must divide it. Similarity is that of the whitened weights; what
    a norm or a bias adds to keys afterwards does not count in it. Values: a whitened SVD of the whole W_V,
    then `iterations` rounds of calibration (section 3.3) once ranks are chosen.

    Calibration takes each layer's inputs from the stream that the compressed layers before it leave, keys
    included, as the published code does. All tokens count, one by one; that code adds up 8 windows position
    by position first. On the inputs of the uncompressed model the whitened SVD is the optimum already, and
    calibration changes nothing. Every round is one step of subspace iteration towards PCA of the values in
    the compressed stream, which is the optimum there. Biases go where their heads go; that code leaves them
    behind. Under `post_rope`, which is not the paper's, rotated keys are grouped.
    """

    summary: ClassVar[str] = (
        "keys of similar heads in groups, values jointly and calibrated in the compressed stream"
    )
    paper: ClassVar[str] = "arXiv:2505.24357"
    allocator: ClassVar[str] = "fisher"
    layout: ClassVar[Layout] = "pre_rope"
    has_finish: ClassVar[bool] = True

    group: int = option(4, at_least=1, at_most=1024)
    iterations: int = option(1, at_least=0, at_most=1000)

    def candidates(self, heads: int, head_dim: int, ranks: list[int]) -> list[int]:
        group_size(heads, self.group, 4)
        return ranks

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        heads = statistics.heads
        t = group_size(heads, self.group, 4)
        similarity = cka(whitened(families.projections(probe.model, probe.index).k, statistics.inputs))
        order = order_of(grouped_by_similarity(similarity, t))
        keys, values = (reordered(m, order, heads) for m in joint_moments(statistics, probe.layout))
        return LayerBases(merged_basis(keys, heads, t), merged_basis(values, heads, heads), order)

    def finish(self, factors: dict[int, Factors], context: CalibrationContext) -> dict[int, Factors]:
        model, layers, found = context.model, sorted(factors), dict(factors)
        hidden = first_inputs(model, context.training_windows, context.batch)
        for i in context.progress(range(layers[-1] + 1), "calibrating values"):
            block, storage = layer_in_fp32(model, i), None
            if i in found:
                seen = Values(found[i].v_down.shape[1])
                layer_outputs(model, i, block, hidden, seen, context.batch)
                found[i] = calibrated(found[i], seen.moment, self.iterations)
                maps = found[i].to(next(block.parameters()))
                storage = ReconstructionLayer(
                    LowRankReconstruction(maps, context.layout, families.rope(model, i)), context.exact
                )
            hidden = layer_outputs(model, i, block, hidden, storage, context.batch)
        return found


# -- keys


def whitened(weights: Tensor, inputs: Tensor) -> Tensor:
    """S^T W (h, D, d) in fp64 of weights (h, d, D), with S S^T = C_X from the eigenvectors of C_X (D, D)."""
    vectors, energy = principal(inputs)
    return (energy.sqrt().unsqueeze(-1) * vectors.mT) @ weights.double().mT


def cka(parts: Tensor) -> Tensor:
    """Linear CKA (h, h) of matrices (h, D, d), whose D rows are taken as samples and centred (Eq. 2-3).

    Eq. 2-3 and the published code write it with D x D Gram matrices; the trace of their product is ||X^T
    Y||_F^2, which takes d x d ones. That code centres the rows of S^T W, which depends on the root S that is
    chosen, by about 1/D of the energy; so does this.
    """
    h, _, d = parts.shape
    side = (parts - parts.mean(1, keepdim=True)).transpose(0, 1).flatten(1)
    hsic = (side.mT @ side).square().view(h, d, h, d).sum((1, 3))
    own = hsic.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return hsic / own / own.unsqueeze(1)


def grouped_by_similarity(similarity: Tensor, t: int) -> list[list[int]]:
    """Groups of t heads: pair after pair, most similar first, opens a group or joins its partner's while
    there is room for it.

    Heads that are left over fill what room there is, in their own order (section 3.2; the code lets pairs
    overflow and repairs that after).
    """
    h = len(similarity)
    groups: list[list[int]] = []
    pairs = sorted(
        ((i, j) for i in range(h) for j in range(i + 1, h)), key=lambda p: (-float(similarity[p]), p)
    )
    for pair in pairs if t > 1 else []:
        alone = [i for i in pair if not any(i in g for g in groups)]
        joined = next((g for g in groups if len(alone) == 1 and not set(pair).isdisjoint(g)), None)
        if joined is not None and len(joined) < t:
            joined += alone
        elif len(alone) == 2 and len(groups) < h // t:
            groups.append(list(pair))
    groups += [[] for _ in range(h // t - len(groups))]
    for i in range(h):
        if not any(i in g for g in groups):
            next(g for g in groups if len(g) < t).append(i)
    return groups


def order_of(groups: list[list[int]]) -> Tensor | None:
    """Heads group after group, groups by their first head and heads in their own order; None where nothing
    moves.
    """
    order = [i for g in sorted(sorted(g) for g in groups) for i in g]
    return None if order == sorted(order) else torch.tensor(order)


# -- values


class Values:
    """Stands in for a cache layer: adds up the joint moment of the values, and gives back what it was given."""

    def __init__(self, width: int) -> None:
        self.moment = torch.zeros(width, width, dtype=torch.float64)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.moment += joint_moment(values).double().cpu()
        return keys, values


def calibrated(f: Factors, moment: Tensor, iterations: int) -> Factors:
    """The value maps after alternating least squares on values of this joint moment (h d, h d), heads in
    their own order.

    Up map: L = argmin ||V D L - V|| = (D^T C D)^{-1} D^T C for the down map D and C = V^T V (Eq. 7). Down
    map: D = L^+ (Eq. 8, where the factor of the weights is W_V L^+), the best for that L whatever the values.
    Then D L projects onto the rows of L, and an orthonormal basis Q of these gives the same Q Q^T = L^+ L; it
    is what is kept. At full rank there is nothing to gain.
    """
    down, heads = f.v_down[0].double(), f.merge[1]
    if down.shape[0] == down.shape[1]:
        return f
    c = reordered(moment, f.order, heads)
    c = c + (VALUE_RIDGE * c.diagonal().mean()).clamp_min(torch.finfo(torch.float32).tiny) * torch.eye(
        len(c), dtype=torch.float64
    )
    for _ in range(iterations):
        fitted = torch.linalg.solve(down.mT @ c @ down, down.mT @ c)
        down = torch.linalg.qr(fitted.mT).Q
    kept = (down * signs(down)).float().unsqueeze(0)
    return replace(f, v_down=kept, v_up=per_head_maps(kept.mT, heads).contiguous())
