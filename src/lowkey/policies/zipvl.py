"""ZipVL (arXiv:2410.08584): a layer keeps the tokens that hold most of what a few probe queries attend to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowkey.core.errors import LowkeyError
from lowkey.core.options import option
from lowkey.ops.hashing import OF_SEED, hashed
from lowkey.policies.base import EvictionContext, Policy, attention_sums
from lowkey.policies.sharing import TokenAllocator

Divisor = Literal["probes", "causal"]


@dataclass(frozen=True)
class ZipVL(Policy):
    """ZipVL: attention of probe queries, normalised; how many tokens a layer keeps depends on their mass.

    Let c_j be the attention that all probes of all query heads of the layer pay to token j. Score of token j:
    `c_j / n_j`, with n_j the number of probes that see j. All heads of a layer rank tokens alike. How many
    are kept follows from c: allocator `layer-mass` if there is a budget, else `mass-share`, whose option
    `tau` is the share of c that a layer keeps. Without a budget a token that was kept stays kept, so that an
    eviction chooses among the tokens that came since.

    Args:
        allocator: as in the base class; default `layer-mass`, or without a budget `mass-share`.
        newest_probes: share of the queries since the last eviction that are probes because they are the
            newest; one at least (default 0.05).
        random_probes: share of them that are drawn besides, without replacement (default 0.05).
        divisor: what n_j counts: the `probes` that see j, or, as ZipCache's code, all queries since the last
            eviction that do, `causal`, which divides late tokens by too much (default `probes`).
        seed: of the draw, which also depends on each query's position (default 0).
        sparse_prefill: in a prompt that comes in one call, only the tokens that a layer keeps attend, and
            only to one another; the others pass the layer without an update by attention (default False).
            This changes the hidden states of all later layers: it saves time and no memory. It needs an
            allocator that decides layer by layer, like `mass-share`, and recent tokens, since the last one
            must attend.

    Raises:
        LowkeyError: as the base class; sparse prefill with another allocator or without recent tokens.

    Source: arXiv:2410.08584, eq. 6 to 9; how many probes there are is ZipCache's code. The paper compresses
    every 100 steps (`every=100`) by the newest query alone; here by the probes among those of the steps. Its
    first version holds the other tokens in 2 bits and those that are kept in 4; its second drops them.
    """

    summary: ClassVar[str] = (
        "attention of probe queries per probe that sees the token, for all heads of a layer"
    )
    paper: ClassVar[str] = "arXiv:2410.08584"
    keeps_for_good: ClassVar[bool] = True

    allocator: str | TokenAllocator = ""  # replaced by `mass-share` or `layer-mass`, depending on the budget
    newest_probes: float = option(0.05, at_least=0, at_most=1)
    random_probes: float = option(0.05, at_least=0, at_most=1)
    divisor: Divisor = "probes"
    seed: int = option(0, at_least=0, at_most=2**31 - 1)
    sparse_prefill: bool = False

    def __post_init__(self) -> None:
        if self.allocator == "":
            object.__setattr__(self, "allocator", "mass-share" if self.budget is None else "layer-mass")
        super().__post_init__()
        if self.sparse_prefill and (self.resolved_allocator().scope != "layer" or not self.recent):
            raise LowkeyError(
                "sparse_prefill of ZipVL: a layer must choose before the next one begins, and the last token "
                "must be among what it keeps; use allocator mass-share or uniform, and recent of at least 1"
            )

    @property
    def is_sparse(self) -> bool:
        """See `sparse_prefill`."""
        return self.sparse_prefill

    def score(self, context: EvictionContext) -> Tensor:
        """Normalised attention of the probes (b, h, s); see `Policy.score`."""
        return self.score_and_mass(context)[0]

    def score_and_mass(self, context: EvictionContext) -> tuple[Tensor, Tensor]:
        """Scores, and c (b, h, s); see `Policy.score_and_mass`."""
        probes = self._probes(context)
        sums = attention_sums(probes).sum(2).masked_fill(~context.valid, 0.0)
        # Heads may hold different tokens, so their sums are brought together by position.
        slot = context.positions.masked_fill(~context.valid, 0).flatten(1)
        by_position = sums.new_zeros(len(sums), int(slot.max()) + 1).scatter_add_(1, slot, sums.flatten(1))
        mass = by_position.gather(1, slot).view_as(sums).masked_fill(~context.valid, 0.0)
        return mass / _viewers(probes if self.divisor == "probes" else context).clamp_min(1), mass

    def _probes(self, context: EvictionContext) -> EvictionContext:
        """The context with the probes as its only queries; rows that have fewer than others are padded."""
        at = context.query_positions
        if not at.shape[1]:
            return context
        real = at >= 0
        count = real.sum(1, keepdim=True)
        newest = (count.double() * self.newest_probes).round().long().clamp_min(1)
        is_newest = real & (at > at.amax(1, keepdim=True) - newest)
        # the lowest hashes among the others are the draw, whatever the other rows are
        drawn = (count.double() * self.random_probes).round().long()
        order = hashed(at + OF_SEED * self.seed).masked_fill(is_newest | ~real, torch.iinfo(torch.int64).max)
        is_probe = is_newest | (real & (order.argsort(1).argsort(1) < drawn))
        most = int(is_probe.sum(1).max())
        places = at.masked_fill(~is_probe, -1).argsort(dim=1, stable=True)[:, at.shape[1] - most :]
        b, h, g, _, d = context.queries.shape
        visible = context.visible
        if visible is not None:
            index = places.unsqueeze(2).expand(-1, -1, visible.shape[2])
            visible = visible.expand(b, -1, -1).gather(1, index)
        return replace(
            context,
            queries=context.queries.gather(3, places[:, None, None, :, None].expand(b, h, g, -1, d)),
            query_positions=at.masked_fill(~is_probe, -1).gather(1, places),
            visible=visible,
        )


def _viewers(context: EvictionContext) -> Tensor:
    """How many of the context's queries see each candidate (b, h, s)."""
    at = context.query_positions.sort(1).values
    before = torch.searchsorted(at, context.positions.flatten(1).contiguous())
    seen = (at.shape[1] - before).view_as(context.positions)
    if context.visible is not None:
        # attention is not causal within the newest tokens: count which queries really see them
        of_chunk = (context.visible & (context.query_positions >= 0).unsqueeze(2)).sum(1).unsqueeze(1)
        old = seen.shape[2] - of_chunk.shape[2]
        seen = torch.cat([seen[..., :old], of_chunk.expand(-1, seen.shape[1], -1)], 2)
    return seen
