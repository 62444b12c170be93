"""KV-Latent (arXiv:2507.11273): a subset of every head's channels, in whole rotary pairs, so that plain
rotation stays exact on them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowkey.core.types import Basis, Factors, LayerBases, LayerStatistics, LowkeyError, head_blocks
from lowkey.methods.base import CalibrationContext, Method
from lowkey.models import families
from lowkey.ops.bases import principal_basis
from lowkey.probes.layer_probe import LayerProbe


@dataclass(frozen=True)
class KVLatent(Method):
    """Keys and queries keep the same channels of a head, values keep channels of their own; the rest is
    dropped, nothing is mixed.

    In the half-split layout channels j and j + p/2 of the p rotary ones turn together. A rank keeps whole
    pairs, which turn as before: both layouts give the same numbers, and scores still depend on relative
    positions alone. Channels that do not turn (partial rotary) are kept two by two, in proportion to their
    number.
    choose: `stride`, the paper's, evenly spaced pairs, the same in all heads: at rank d/s every s-th, whose
    frequencies are those of a rotary embedding of dimension d/s; `data` (ours) keeps in each KV head the
    pairs with the largest rms(q) rms(k), norms of a pair over the queries of all g heads and over the keys:
    the score of MHA2MLA (arXiv:2502.14837), whose code takes means of norms, from second moments. values:
    `stride`, the paper's, evenly spaced channels; `pca` (ours) turns values into their principal axes first,
    which keeps the most energy of all.

    Ranks are even. An odd one, asked of the bases by hand, splits a pair: what is kept is still what was
    rotated, but scores of half a pair depend on absolute positions. Scores keep the model's own scale; the
    paper's 1/sqrt(r) is for a model that is then trained.
    rope: `kept`, the model's own frequencies; `aware`, the paper's frequency-aware ones (Eq. 11, its second
    branch as in the published code), which leave out the highest quarter and sample the lowest twice as
    densely. These turn kept channels at other frequencies than they were trained with, so a model is of no
    use with them until it is trained again; ranks are chosen as if they were kept, and are multiples of 4.
    The paper trains in two stages, which is `lowkey.recover` with stages (("distill", n), ("ce", m)), or "kl"
    for "ce".
    """

    summary: ClassVar[str] = "a subset of rotary channel pairs and of value channels"
    paper: ClassVar[str] = "arXiv:2507.11273"
    allocator: ClassVar[str] = "uniform"

    choose: Literal["stride", "data"] = "stride"
    values: Literal["stride", "pca"] = "stride"
    rope: Literal["kept", "aware"] = "kept"

    @property
    def has_finish(self) -> bool:  # type: ignore[override]
        return self.rope == "aware"

    def candidates(self, heads: int, head_dim: int, ranks: list[int]) -> list[int]:
        multiple = 4 if self.rope == "aware" else 2
        return [r for r in ranks if r % multiple == 0 or r == head_dim]

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        keys, values = statistics.keys(probe.layout), head_blocks(statistics.values, statistics.heads)
        d, turning = keys.shape[-1], probe.rotary_dim
        chosen = strided_pairs(d, turning, ranks)
        if self.choose == "data":
            chosen = best_pairs(keys, statistics.queries(probe.layout), turning)
        return LayerBases(
            chosen,
            principal_basis(values, "per_head") if self.values == "pca" else strided_pairs(d, 0, ranks),
        )

    def finish(self, factors: dict[int, Factors], context: CalibrationContext) -> dict[int, Factors]:
        """Frequency-aware rotation of what is kept; a layer of full rank keeps its own."""
        parameters = families.rope_parameters(context.model.config)
        base, kind = parameters.get("rope_theta"), parameters.get("rope_type", "default")
        if base is None or kind != "default" or parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise LowkeyError(
                "rope=aware of method 'kv-latent': is for plain rotary embeddings of whole heads, not "
                f"{kind!r}; use kept"
            )
        return {i: _aware(f, base) if f.ranks[0] < f.k_up.shape[-1] else f for i, f in factors.items()}


def _aware(f: Factors, base: float) -> Factors:
    """Kept pairs in the order of their frequencies, first members first, turned by the new ones."""
    half = f.k_down.shape[1] // 2
    channel = f.k_down.argmax(1)  # (h|1, r): which channel each column picks
    # pairs ascending, members apart
    order = (channel % half * 2 + channel // half).argsort(-1).unflatten(-1, (-1, 2)).mT.flatten(-2)
    down = f.k_down.gather(2, order.unsqueeze(1).expand_as(f.k_down))
    return replace(f, k_down=down, k_up=down.mT.contiguous(), frequencies=aware_frequencies(f.ranks[0], base))


def aware_frequencies(rank: int, base: float) -> Tensor:
    """Eq. 11 on one continuous grid (rank / 2): base^(-a / rank), a = r/4, r/4 + 2, ..., 3r/4 - 2, then 3r/4,
    3r/4 + 1, ..., r - 1.
    """
    grid = torch.cat([torch.arange(rank // 4, 3 * rank // 4, 2), torch.arange(3 * rank // 4, rank)])
    return base ** (-grid.float() / rank)


def strided_pairs(d: int, turning: int, ranks: list[int]) -> Basis:
    """Evenly spaced channels, of which the first `turning` are paired: the same for all heads. One order of
    all channels serves every rank and holds all strides that are powers of two; other `ranks` get channels of
    their own where those differ."""
    order = nested(d, turning)
    own = {r: spaced(d, turning, r) for r in ranks if r < d and not (turning and r % 2)}
    exact = tuple((r, selection(c, d)) for r, c in own.items() if set(c.tolist()) != set(order[:r].tolist()))
    return Basis(selection(order, d), exact=exact)


def spaced(d: int, turning: int, rank: int) -> Tensor:
    """Ascending indices (rank) of evenly spaced channels: pairs among the first `turning`, single ones among
    the others, in proportion.
    """
    pairs = pairs_at(d, turning, rank)
    low = evenly(turning // 2, pairs)
    return torch.cat([low, low + turning // 2, turning + evenly(d - turning, rank - 2 * pairs)])


def pairs_at(d: int, turning: int, rank: int) -> int:
    """How many rotary pairs an even rank holds: their share of the channels, rounded, and enough when the
    others run out.
    """
    return max((rank * turning + d) // (2 * d), -(-(rank - d + turning) // 2))


def evenly(n: int, count: int) -> Tensor:
    """`count` of n indices: every s-th when count = n / s."""
    return torch.arange(count) * n // max(count, 1)


def nested(d: int, turning: int) -> Tensor:
    """All channels (d), pair after pair, in proportion with two single ones after two; each kind in
    bit-reversed order.
    """
    half = turning // 2
    pairs = iter([(j, j + half) for j in halving(half)])
    singles = iter([turning + j for j in halving(d - turning)])
    order: list[int] = []
    for rank in range(2, d + 1, 2):
        more = pairs_at(d, turning, rank) > pairs_at(d, turning, rank - 2)
        order += next(pairs) if more else (next(singles), next(singles))
    return torch.tensor([*order, *singles])  # a head of an odd width has one left


def halving(n: int) -> list[int]:
    """All n indices, the multiples of 2^i before the others, for every i."""
    bits = (n - 1).bit_length()
    return sorted(range(n), key=lambda j: sum((j >> i & 1) << (bits - 1 - i) for i in range(bits)))


def best_pairs(keys: Tensor, queries: Tensor, turning: int) -> Basis:
    """Per head the pairs of highest rms(q) rms(k) first, from moments (h, d, d); of channels that do not
    turn, two at a time.
    """
    k, q = (m.diagonal(dim1=1, dim2=2) for m in (keys, queries))
    pairs, singles = _in_pairs(k[:, :turning]) * _in_pairs(q[:, :turning]), k[:, turning:] * q[:, turning:]
    orders = [_by_score(*scores) for scores in zip(pairs, singles, strict=True)]
    return Basis(torch.cat([selection(order, keys.shape[-1]) for order in orders]))


def _in_pairs(energy: Tensor) -> Tensor:
    """(h, p) of the rotary channels -> (h, p/2)"""
    return energy.unflatten(1, (2, -1)).sum(1)


def _by_score(pairs: Tensor, singles: Tensor) -> Tensor:
    """Channels of one head from squared scores of its pairs (p/2) and of its single channels (d - p), of
    which two weigh together.
    """
    half = len(pairs)
    units = [(score, [j, j + half]) for j, score in enumerate(pairs.tolist())]
    for two in singles.argsort(descending=True, stable=True).split(2):
        # an odd one goes last
        units.append((float(singles[two].sum()) if len(two) == 2 else -1.0, (2 * half + two).tolist()))
    ranked = sorted(units, key=lambda unit: -unit[0])  # stable: of equal ones the first
    return torch.tensor([channel for _, channels in ranked for channel in channels])


def selection(channels: Tensor, d: int) -> Tensor:
    """(1, d, n): column i picks channel channels[i]."""
    return torch.eye(d)[:, channels].unsqueeze(0)
