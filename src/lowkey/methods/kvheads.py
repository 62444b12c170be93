"""Merging KV heads (arXiv:2406.07056): several become one, by SVD of their joint activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowkey.core.options import option
from lowkey.core.types import Basis, LayerBases, LayerStatistics, LowkeyError, head_blocks
from lowkey.methods.base import Method, PlainForm, whole_head_numbers, whole_head_ranks
from lowkey.ops.bases import principal
from lowkey.ops.commuting import commuting_basis, spread_energy
from lowkey.ops.products import joint_moments
from lowkey.probes.layer_probe import LayerProbe

KeyForm = Literal["joint", "commuting", "mean"]


@dataclass(frozen=True)
class KVHeadSVD(Method):
    """Merging of KV heads by SVD, an orthonormal method in closed form.

    Every t = `group` KV heads side by side become one: the d directions of their joint Gram matrix (t d, t d)
    that keep most energy, the paper's "SVD-a". Values are projected group by group in every form.

    Source: arXiv:2406.07056; no public code is known. Its Eq. 17-18, for keys under RoPE, are known to us
    from reports of others. The paper continues with LoRA training, which is `lowkey.recover` here.

    Args:
        group: how many KV heads become one; it divides their number. 0 (default) is the least number above 1
            that does, which is 2 for an even number of heads.
        keys: `layer` (default, the paper's form under RoPE) projects the keys of all heads together to the
            width h d / t that is left, and every query head meets all of it. `grouped` projects group by
            group. `commuting` (ours) mixes the heads of a group by one complex number per frequency, so that
            what is left is a key head that RoPE can rotate and `export` can write.
        heads: `consecutive` (default, the paper's) groups neighbouring heads; `similar` (ours) groups them so
            that little energy is lost.
        basis: `activations` (default). Two rivals that the paper compares with: `weights` is the SVD of the
            projections, that is, the Gram matrix under white inputs (biases included; under `post_rope`
            rotated at the positions of the windows). `mean` averages heads, whatever `keys` says.
        whole: serve only ranks that leave whole heads, of d / t (rounded up) per head left in a group, as in
            the paper (default true). Otherwise any rank, if the form of keys has it.
    """

    summary: ClassVar[str] = "several KV heads become one, by SVD of their joint activations"
    paper: ClassVar[str] = "arXiv:2406.07056"
    allocator: ClassVar[str] = "uniform"
    plain_form: ClassVar[PlainForm | None] = "fewer heads"
    plain_options: ClassVar[Mapping[str, str]] = {"keys": "commuting"}

    group: int = option(0, at_least=0, at_most=1024)
    keys: Literal["layer", "grouped", "commuting"] = "layer"
    heads: Literal["consecutive", "similar"] = "consecutive"
    basis: Literal["activations", "weights", "mean"] = "activations"
    whole: bool = True

    def candidates(self, heads: int, head_dim: int, ranks: list[int]) -> list[int]:
        """Return the ranks of whole heads, or all ranks with `whole=false`."""
        group = self.group_of(heads)
        return whole_head_ranks(group, head_dim, ranks) if self._serves_whole_heads else ranks

    def numbers_per_token(self, rank: int, heads: int, head_dim: int) -> int:
        """Return the numbers of the whole heads that a rank stands for."""
        group = self.group_of(heads)
        if self._serves_whole_heads:
            return heads // group * whole_head_numbers(rank, group, head_dim)
        return rank * heads

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        """Return the merging bases of keys and of values."""
        h, rotary = statistics.heads, probe.rotary_dim
        group = self.group_of(h)
        d = len(statistics.values) // h
        if self.basis == "weights":
            keys, values = probe.white_moments(probe.layout, "basis 'weights'", "use basis 'activations'")
        else:
            keys, values = joint_moments(statistics, probe.layout)
        order = self._order(keys, values, h, group, rotary)
        if order is not None:
            # Channel indices of the heads in their new order, to permute rows and columns of the moments.
            channels = (order.unsqueeze(1) * d + torch.arange(d)).flatten()
            keys, values = keys[channels][:, channels], values[channels][:, channels]
        key_group = h if self._joins_all_keys else group
        unit = d if self._serves_whole_heads else 1  # columns that are kept or dropped together
        key_basis = merged_head_basis(keys, h, key_group, self._key_form, rotary, unit * key_group // group)
        return LayerBases(
            key_basis, merged_head_basis(values, h, group, self._value_form, rotary, unit), order
        )

    def group_of(self, heads: int) -> int:
        """Return how many of `heads` KV heads become one.

        Raises:
            LowkeyError: if the option `group` does not divide the number of heads.
        """
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        if self.group and self.group not in divisors:
            remedy = (
                f"choose one of {', '.join(map(str, divisors[1:]))}" if heads > 1 else "choose another method"
            )
            raise LowkeyError(f"group {self.group}: must divide the model's {heads} KV heads; {remedy}")
        return self.group or divisors[:2][-1]

    @property
    def _serves_whole_heads(self) -> bool:
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
    def _joins_all_keys(self) -> bool:
        return self.keys == "layer" and self.basis != "mean"

    def _order(self, keys: Tensor, values: Tensor, h: int, group: int, rotary: int) -> Tensor | None:
        """Return the heads in the order in which they are grouped, (h); None if they stay as they are.

        Args:
            keys: joint moment (h d, h d). The keys of a whole layer have no groups, so only values count.
            values: the same.
            h: number of KV heads.
            group: how many become one.
            rotary: channels of a head that are rotated.
        """
        if self.heads == "consecutive":
            return None
        # losses of keys and values as shares of their own energy, so that neither outweighs the other
        cost = pair_losses(values, h, self._value_form, rotary) / values.trace()
        if not self._joins_all_keys:
            cost = cost + pair_losses(keys, h, self._key_form, rotary) / keys.trace()
        order = cheapest_groups(cost, group)
        return None if torch.equal(order, torch.arange(h)) else order


def merged_head_basis(moment: Tensor, h: int, t: int, form: KeyForm, rotary: int, unit: int) -> Basis:
    """Return the basis of every t of h heads side by side.

    Args:
        moment: joint second moment of the heads (h d, h d).
        h: number of KV heads.
        t: how many become one.
        form: how they are merged.
        rotary: channels of a head that are rotated.
        unit: only whole multiples of so many columns are kept.
    """
    columns, energy = merging_columns(head_blocks(moment, h // t), t, form, rotary)
    return Basis(columns.float(), spectrum=energy, merge=t, unit=unit)


def merging_columns(moments: Tensor, t: int, form: KeyForm, rotary: int) -> tuple[Tensor, Tensor]:
    """Return the columns of a merging basis, most energy first.

    Args:
        moments: joint second moments of the t heads of each group (G, t d, t d).
        t: heads in a group.
        form: `joint` (any direction), `commuting` (with RoPE) or `mean` (the average of the heads first).
        rotary: channels of a head that are rotated.

    Returns:
        Columns (G, t d, t d), and the energies (G, d) of t columns each.
    """
    d = moments.shape[-1] // t
    if form == "joint":
        # a rank per head takes t columns of the group, so their energies are summed t by t
        columns, energy = principal(moments)
        return columns, energy.unflatten(-1, (d, t)).sum(-1)
    if form == "commuting":
        columns, head_energy = commuting_basis(moments, t, rotary)
        return columns, spread_energy(head_energy, d)
    # the first d columns are the mean of the heads, channel by channel; the others complete the basis
    columns = torch.kron(cosine_transform(t), torch.eye(d, dtype=torch.float64)).expand(len(moments), -1, -1)
    energy = (columns.mT @ moments @ columns).diagonal(dim1=1, dim2=2)
    return columns, spread_energy(energy.unflatten(-1, (t, d)).sum(-1), d)


def cosine_transform(t: int) -> Tensor:
    """Return the orthonormal cosine transform (t, t), whose first column is constant."""
    n = torch.arange(t, dtype=torch.float64)
    columns = torch.cos(math.pi / t * torch.outer(n + 0.5, n)) * (2 / t) ** 0.5
    columns[:, 0] = t**-0.5
    return columns


def pair_losses(moment: Tensor, h: int, form: KeyForm, rotary: int) -> Tensor:
    """Return the energy (h, h) that is lost when two heads of a joint moment (h d, h d) become one."""
    d = len(moment) // h
    blocks = moment.view(h, d, h, d).transpose(1, 2)
    lost = moment.new_zeros(h, h)
    for i in range(h - 1):
        rest = torch.arange(i + 1, h)
        # joint moments (n, 2 d, 2 d) of head i with each of the n heads after it
        upper = torch.cat([blocks[i, i].expand(len(rest), -1, -1), blocks[i, rest]], -1)
        lower = torch.cat([blocks[rest, i], blocks[rest, rest]], -1)
        pairs = torch.cat([upper, lower], -2)
        kept = merging_columns(pairs, 2, form, rotary)[0][..., :d]
        lost[i, rest] = pairs.diagonal(dim1=1, dim2=2).sum(-1) - (kept * (pairs @ kept)).sum((1, 2))
    return (lost + lost.mT).clamp_min(0)


def cheapest_groups(cost: Tensor, t: int) -> Tensor:
    """Group heads so that the costs of the pairs within groups sum to little.

    Starting from consecutive groups, two heads change places as long as that lowers the sum. The result is a
    local optimum.

    Args:
        cost: cost of a pair of heads in one group, (h, h).
        t: heads in a group.

    Returns:
        The heads (h), group after group.
    """
    h = len(cost)
    group = torch.arange(h) // t  # the group of each head
    while True:
        to_group = cost @ torch.nn.functional.one_hot(group).to(cost)  # of a head to all heads of a group
        there = to_group[:, group]  # (a, b): of head a to the group of head b
        own = there.diagonal()
        # If a and b change places, each pays for the other's group without the other itself.
        change = there + there.mT - 2 * cost - own - own.unsqueeze(1)
        change = change.masked_fill(group == group.unsqueeze(1), 0.0)
        if float(change.min()) >= -1e-9 * float(cost.sum()):
            break
        a, b = divmod(int(change.argmin()), h)
        group[a], group[b] = group[b].clone(), group[a].clone()
    # Groups in the order of their first heads, heads of a group in their own order.
    first = torch.stack([(group == g).nonzero()[0, 0] for g in group])
    return (first * h + torch.arange(h)).argsort()
