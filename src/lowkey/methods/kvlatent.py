"""KV-Latent (arXiv:2507.11273): a subset of every head's channels, kept in whole rotary pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowkey.core.types import Basis, Factors, LayerBases, LayerStatistics, LowkeyError, head_blocks
from lowkey.methods.base import CalibrationContext, Method, PlainForm
from lowkey.models import families
from lowkey.ops.bases import principal_basis
from lowkey.probes.layer_probe import LayerProbe


@dataclass(frozen=True)
class KVLatent(Method):
    """KV-Latent, a method that drops channels: keys and queries keep the same ones, values their own.

    In the half-split layout, channels j and j + p/2 of the p rotary ones are rotated together. A rank keeps
    whole pairs, which rotate as before. So both layouts give the same numbers, and scores still depend on
    relative positions alone. Channels that are not rotated (partial rotary) are kept two by two, in
    proportion to their number.

    Ranks are even. An odd rank, which only a caller of the bases can ask for, splits a pair: what is kept was
    still rotated, but its scores depend on absolute positions.

    Source: arXiv:2507.11273 and its code. Scores keep the model's own scale here; the paper's 1/sqrt(r) is
    for a model that is trained afterwards. The paper trains in two stages, which is `lowkey.recover` with
    stages (("distill", n), ("ce", m)), or "kl" for "ce".

    Args:
        choose: which pairs are kept.
            `stride` (default, the paper's): evenly spaced pairs, the same in all heads. At rank d/s every
            s-th pair is kept, whose frequencies are those of a rotary embedding of dimension d/s.
            `data` (ours): in each KV head the pairs with the largest rms(q) rms(k), norms of the pair over
            the queries of all g query heads and over the keys. It is the score of MHA2MLA (arXiv:2502.14837),
            whose code takes means of norms, computed from second moments.
        values: `stride` (default, the paper's) keeps evenly spaced channels. `pca` (ours) takes the principal
            axes of the values first, which keeps the most energy of all.
        rope: `kept` (default) leaves the model's frequencies. `aware` sets the paper's frequency-aware ones
            (Eq. 11, its second branch as in the code): they leave out the highest quarter and sample the
            lowest twice as densely. Channels then rotate at other frequencies than they were trained with, so
            the model is of no use until it is trained again. Ranks are chosen as if frequencies were kept,
            and are multiples of 4.
    """

    summary: ClassVar[str] = "a subset of rotary channel pairs and of value channels"
    paper: ClassVar[str] = "arXiv:2507.11273"
    allocator: ClassVar[str] = "uniform"
    plain_form: ClassVar[PlainForm | None] = "narrower heads"
    plain_options: ClassVar[Mapping[str, str]] = {"rope": "kept"}

    choose: Literal["stride", "data"] = "stride"
    values: Literal["stride", "pca"] = "stride"
    rope: Literal["kept", "aware"] = "kept"

    @property
    def has_finish(self) -> bool:
        """True for `rope=aware`."""
        return self.rope == "aware"

    def candidates(self, heads: int, head_dim: int, ranks: list[int]) -> list[int]:
        """Return the even ranks, or multiples of 4 for `rope=aware`, and the full rank."""
        multiple = 4 if self.rope == "aware" else 2
        return [r for r in ranks if r % multiple == 0 or r == head_dim]

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        """Return bases that pick channels."""
        keys, values = statistics.keys(probe.layout), head_blocks(statistics.values, statistics.heads)
        d, rotary = keys.shape[-1], probe.rotary_dim
        if self.choose == "data":
            key_basis = best_pairs(keys, statistics.queries(probe.layout), rotary)
        else:
            key_basis = strided_pairs(d, rotary, ranks)
        if self.values == "pca":
            return LayerBases(key_basis, principal_basis(values, "per_head"))
        return LayerBases(key_basis, strided_pairs(d, 0, ranks))

    def finish(self, factors: dict[int, Factors], context: CalibrationContext) -> dict[int, Factors]:
        """Set the frequency-aware rotation of the kept channels. A layer of full rank keeps its own."""
        parameters = families.rope_parameters(context.model.config)
        base, kind = parameters.get("rope_theta"), parameters.get("rope_type", "default")
        if base is None or kind != "default" or parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise LowkeyError(
                "option rope=aware of method 'kv-latent': needs a plain rotary embedding of whole heads, not "
                f"{kind!r}; use rope=kept"
            )
        return {
            i: _frequency_aware(f, base) if f.ranks[0] < f.k_up.shape[-1] else f for i, f in factors.items()
        }


def _frequency_aware(f: Factors, base: float) -> Factors:
    """Return factors whose kept key channels rotate at frequency-aware frequencies.

    Kept pairs are sorted by their frequency, with the first members of all pairs before the second ones, as
    the half-split layout has them.
    """
    half = f.k_down.shape[1] // 2  # channels j and j + half are a pair
    channel = f.k_down.argmax(1)  # (h|1, r): which channel each column picks
    # Sorted by (pair, member), members of a pair are neighbours; the transpose moves the members apart.
    order = (channel % half * 2 + channel // half).argsort(-1).unflatten(-1, (-1, 2)).mT.flatten(-2)
    down = f.k_down.gather(2, order.unsqueeze(1).expand_as(f.k_down))
    return replace(f, k_down=down, k_up=down.mT.contiguous(), frequencies=aware_frequencies(f.ranks[0], base))


def aware_frequencies(rank: int, base: float) -> Tensor:
    """Return the frequency-aware frequencies (rank / 2) of Eq. 11, on one continuous grid.

    They are base^(-a / r) for a = r/4, r/4 + 2, ..., 3r/4 - 2, then 3r/4, 3r/4 + 1, ..., r - 1.
    """
    grid = torch.cat([torch.arange(rank // 4, 3 * rank // 4, 2), torch.arange(3 * rank // 4, rank)])
    return base ** (-grid.float() / rank)


def strided_pairs(d: int, rotary: int, ranks: list[int]) -> Basis:
    """Return the basis of evenly spaced channels, the same for all heads.

    One order of all channels serves every rank, and holds every stride that is a power of two. Other `ranks`
    get channels of their own where those differ.

    Args:
        d: head dim.
        rotary: how many channels, from the first one on, form rotary pairs; 0 for values.
        ranks: the ranks that may be chosen.
    """
    order = nested_channels(d, rotary)
    # an odd rank has no whole pairs, so it takes the first channels of the nested order
    strided = {r: strided_channels(d, rotary, r) for r in ranks if r < d and not (rotary and r % 2)}
    exact = tuple(
        (r, selection(channels, d))
        for r, channels in strided.items()
        if set(channels.tolist()) != set(order[:r].tolist())
    )
    return Basis(selection(order, d), exact=exact)


def strided_channels(d: int, rotary: int, rank: int) -> Tensor:
    """Return the indices (rank) of evenly spaced channels.

    They are pairs among the first `rotary` channels and single channels among the others, in proportion.
    """
    pairs = pairs_at_rank(d, rotary, rank)
    first_members = evenly_spaced(rotary // 2, pairs)
    singles = rotary + evenly_spaced(d - rotary, rank - 2 * pairs)
    return torch.cat([first_members, first_members + rotary // 2, singles])


def pairs_at_rank(d: int, rotary: int, rank: int) -> int:
    """Return how many rotary pairs an even rank keeps.

    It is the share of the rotary channels, rounded, and more where the single channels run out.
    """
    # (x + d) // 2d is x / 2d rounded; -(-x // 2) is x / 2 rounded up
    return max((rank * rotary + d) // (2 * d), -(-(rank - d + rotary) // 2))


def evenly_spaced(n: int, count: int) -> Tensor:
    """Return `count` of n indices: every s-th if count = n / s."""
    return torch.arange(count) * n // max(count, 1)


def nested_channels(d: int, rotary: int) -> Tensor:
    """Return all channels (d) in the order in which growing ranks take them.

    Rotary pairs alternate with two single channels each, in proportion. Within either kind the order is
    bit-reversed, so that every power-of-two stride is a leading part of it.
    """
    half = rotary // 2
    pairs = iter([(j, j + half) for j in bit_reversed(half)])
    singles = iter([rotary + j for j in bit_reversed(d - rotary)])
    order: list[int] = []
    for rank in range(2, d + 1, 2):
        takes_pair = pairs_at_rank(d, rotary, rank) > pairs_at_rank(d, rotary, rank - 2)
        order += next(pairs) if takes_pair else (next(singles), next(singles))
    return torch.tensor([*order, *singles])  # a head of an odd width has one single channel left


def bit_reversed(n: int) -> list[int]:
    """Return all n indices in the order of their reversed bits: the multiples of 2^i before all others."""
    # with n = 8: 0, 4, 2, 6, 1, 5, 3, 7
    bits = (n - 1).bit_length()
    return sorted(range(n), key=lambda j: sum((j >> i & 1) << (bits - 1 - i) for i in range(bits)))


def best_pairs(keys: Tensor, queries: Tensor, rotary: int) -> Basis:
    """Return the basis that takes, per head, the pairs of highest rms(q) rms(k) first.

    Channels that are not rotated compete two at a time.

    Args:
        keys: second moments of keys (h, d, d).
        queries: second moments of queries (h, d, d).
        rotary: channels of a head that are rotated.
    """
    k, q = (m.diagonal(dim1=1, dim2=2) for m in (keys, queries))
    pairs = _pair_energies(k[:, :rotary]) * _pair_energies(q[:, :rotary])
    singles = k[:, rotary:] * q[:, rotary:]
    orders = [_by_score(*scores) for scores in zip(pairs, singles, strict=True)]
    return Basis(torch.cat([selection(order, keys.shape[-1]) for order in orders]))


def _pair_energies(energy: Tensor) -> Tensor:
    """Sum the energies (h, p) of the rotary channels over the two members of each pair: (h, p/2)."""
    return energy.unflatten(1, (2, -1)).sum(1)


def _by_score(pairs: Tensor, singles: Tensor) -> Tensor:
    """Return the channels (d) of one head in descending order of score.

    Args:
        pairs: squared scores of the rotary pairs (p/2).
        singles: squared scores of the other channels (d - p); two of them count together.
    """
    half = len(pairs)
    units = [(score, [j, j + half]) for j, score in enumerate(pairs.tolist())]
    for two in singles.argsort(descending=True, stable=True).split(2):
        # an odd channel goes last
        score = float(singles[two].sum()) if len(two) == 2 else -1.0
        units.append((score, (2 * half + two).tolist()))
    ranked = sorted(units, key=lambda unit: -unit[0])  # stable: of equal scores the first
    return torch.tensor([channel for _, channels in ranked for channel in channels])


def selection(channels: Tensor, d: int) -> Tensor:
    """Return the map (1, d, n) whose column i picks channel channels[i]."""
    return torch.eye(d)[:, channels].unsqueeze(0)
