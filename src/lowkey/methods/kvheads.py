"""Fewer KV heads (arXiv:2406.07056): several consecutive ones become one, by an SVD of their joint
activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowkey.core.options import option
from lowkey.core.types import Basis, LayerBases, LayerStatistics, LowkeyError, head_blocks
from lowkey.methods.base import Method, whole_head_numbers, whole_head_ranks
from lowkey.ops.bases import principal
from lowkey.ops.commuting import commuting_basis, spread_energy
from lowkey.ops.products import joint_moments
from lowkey.probes.layer_probe import LayerProbe

KeyForm = Literal["joint", "commuting", "mean"]


@dataclass(frozen=True)
class KVHeadSVD(Method):
    """Of every `group` = t KV heads side by side, the d directions of their joint (t d, t d) Gram that hold
    most ("SVD-a").

    group: must divide the KV heads; 0 is the least number above 1 that does, 2 where they are even.

    keys: `layer` is the paper's form under RoPE (its Eq. 17-18, as others report them): one projection of all
    heads' keys to the width that is left, h d / t numbers that every query head meets; `grouped` has a
    projection for each group; `commuting` (ours) mixes the heads by one complex number per frequency, so that
    what is left is a key head that RoPE can rotate and `export` can write. Values are projected group by
    group in every form.
    heads: which are grouped, `consecutive` ones as in the paper or `similar` ones (ours): grouped so that the
    least energy is lost.
    basis: `weights` (the SVD of the projections, which is the Gram under white inputs, biases included,
    rotated at the positions of the windows under `post_rope`) and `mean` (heads are averaged, whatever `keys`
    says) are the paper's rivals.
    whole: only ranks that leave whole heads, d/t (rounded up) for one of each group, as in the paper;
    otherwise any rank, where the form has it. The paper continues with LoRA training: `lowkey.recover`.
    """

    summary: ClassVar[str] = "several KV heads become one, by SVD of their joint activations"
    paper: ClassVar[str] = "arXiv:2406.07056"
    allocator: ClassVar[str] = "uniform"

    group: int = option(0, at_least=0, at_most=1024)
    keys: Literal["layer", "grouped", "commuting"] = "layer"
    heads: Literal["consecutive", "similar"] = "consecutive"
    basis: Literal["activations", "weights", "mean"] = "activations"
    whole: bool = True

    def candidates(self, heads: int, head_dim: int, ranks: list[int]) -> list[int]:
        group = self.group_of(heads)
        return whole_head_ranks(group, head_dim, ranks) if self._whole_heads else ranks

    def numbers_per_token(self, rank: int, heads: int, head_dim: int) -> int:
        group = self.group_of(heads)
        return (
            heads // group * whole_head_numbers(rank, group, head_dim) if self._whole_heads else rank * heads
        )

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        h, rotary = statistics.heads, probe.rotary_dim
        group = self.group_of(h)
        d = len(statistics.values) // h
        keys, values = self._moments(statistics, probe)
        order = self._order(keys, values, h, group, rotary)
        if order is not None:
            index = (order.unsqueeze(1) * d + torch.arange(d)).flatten()
            keys, values = keys[index][:, index], values[index][:, index]
        wide, unit = h if self._whole_layer else group, d if self._whole_heads else 1
        keys_merged = merging(keys, h, wide, self._key_form, rotary, unit * wide // group)
        return LayerBases(keys_merged, merging(values, h, group, self._value_form, rotary, unit), order)

    def group_of(self, heads: int) -> int:
        """How many of so many KV heads become one. Errors: LowkeyError for a group that does not divide them."""
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        if self.group and self.group not in divisors:
            remedy = (
                f"choose one of {', '.join(map(str, divisors[1:]))}" if heads > 1 else "choose another method"
            )
            raise LowkeyError(f"group {self.group}: must divide the model's {heads} KV heads; {remedy}")
        return self.group or divisors[:2][-1]

    @property
    def _whole_heads(self) -> bool:
        return self.whole or self._key_form == "commuting"

    @property
    def _key_form(self) -> KeyForm:
        if self.basis == "mean":
            return "mean"
        return "commuting" if self.keys == "commuting" else "joint"

    @property
    def _value_form(self) -> KeyForm:
        return "mean" if self.basis == "mean" else "joint"

    @property
    def _whole_layer(self) -> bool:
        return self.keys == "layer" and self.basis != "mean"

    def _moments(self, statistics: LayerStatistics, probe: LayerProbe) -> tuple[Tensor, Tensor]:
        """(h d, h d) of keys and of values."""
        if self.basis == "weights":
            return probe.white_moments(probe.layout, "basis 'weights'", "use basis 'activations'")
        return joint_moments(statistics, probe.layout)

    def _order(self, keys: Tensor, values: Tensor, h: int, group: int, rotary: int) -> Tensor | None:
        """The heads by groups; how the keys of a whole layer are grouped makes no difference."""
        if self.heads == "consecutive":
            return None
        cost = pair_losses(values, h, self._value_form, rotary) / values.trace()
        if not self._whole_layer:
            cost = cost + pair_losses(keys, h, self._key_form, rotary) / keys.trace()
        found = cheapest_groups(cost, group)
        return None if torch.equal(found, torch.arange(h)) else found


def merging(moment: Tensor, h: int, t: int, form: KeyForm, rotary: int, unit: int) -> Basis:
    """Of each t of h heads side by side, with their joint second moment (h d, h d)."""
    columns, energy = reduced(head_blocks(moment, h // t), t, form, rotary)
    return Basis(columns.float(), spectrum=energy, merge=t, unit=unit)


def reduced(moments: Tensor, t: int, form: KeyForm, rotary: int) -> tuple[Tensor, Tensor]:
    """(columns (G, t d, t d), energies (G, d) of t columns each) from (G, t d, t d)."""
    d = moments.shape[-1] // t
    if form == "joint":
        columns, energy = principal(moments)
        return columns, energy.unflatten(-1, (d, t)).sum(-1)
    if form == "commuting":
        columns, held = commuting_basis(moments, t, rotary)
        return columns, spread_energy(held, d)
    columns = torch.kron(cosine_transform(t), torch.eye(d, dtype=torch.float64)).expand(len(moments), -1, -1)
    held = (columns.mT @ moments @ columns).diagonal(dim1=1, dim2=2).unflatten(-1, (t, d)).sum(-1)
    return columns, spread_energy(held, d)


def cosine_transform(t: int) -> Tensor:
    """(t, t) orthonormal, the first column constant: the cosine transform."""
    n = torch.arange(t, dtype=torch.float64)
    found = torch.cos(math.pi / t * torch.outer(n + 0.5, n)) * (2 / t) ** 0.5
    found[:, 0] = t**-0.5
    return found


def pair_losses(moment: Tensor, h: int, form: KeyForm, rotary: int) -> Tensor:
    """(h, h): the energy that is lost when two heads of the joint moment (h d, h d) become one."""
    d = len(moment) // h
    blocks = moment.view(h, d, h, d).transpose(1, 2)
    lost = moment.new_zeros(h, h)
    for i in range(h - 1):
        rest = torch.arange(i + 1, h)
        upper = torch.cat([blocks[i, i].expand(len(rest), -1, -1), blocks[i, rest]], -1)
        lower = torch.cat([blocks[rest, i], blocks[rest, rest]], -1)
        pairs = torch.cat([upper, lower], -2)
        kept = reduced(pairs, 2, form, rotary)[0][..., :d]
        lost[i, rest] = pairs.diagonal(dim1=1, dim2=2).sum(-1) - (kept * (pairs @ kept)).sum((1, 2))
    return (lost + lost.mT).clamp_min(0)


def cheapest_groups(cost: Tensor, t: int) -> Tensor:
    """Heads (h) in groups of t whose costs of pairs (h, h) add up to little: from consecutive ones, two
    change places while that pays.
    """
    h = len(cost)
    group = torch.arange(h) // t
    while True:
        to = cost @ torch.nn.functional.one_hot(group).to(cost)
        there = to[:, group]  # of head a in the group of head b
        own = there.diagonal()
        change = there + there.mT - 2 * cost - own - own.unsqueeze(1)
        change = change.masked_fill(group == group.unsqueeze(1), 0.0)
        if float(change.min()) >= -1e-9 * float(cost.sum()):
            break
        a, b = divmod(int(change.argmin()), h)
        group[a], group[b] = group[b].clone(), group[a].clone()
    first = torch.stack([(group == g).nonzero()[0, 0] for g in group])
    return (first * h + torch.arange(h)).argsort()
