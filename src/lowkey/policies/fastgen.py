"""FastGen (arXiv:2310.01801): each head keeps the fewest kinds of tokens that bring back its attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowkey.core.options import option
from lowkey.core.types import Budget
from lowkey.policies.allocators import Allocator
from lowkey.policies.base import EvictionContext, Policy, attention_sums

KINDS = ("local", "frequent")
FULL = 3  # the last rung


@dataclass(frozen=True)
class FastGen(Policy):
    """A ladder of token sets, each holding the one before: what stays in any case (sinks and recent); and a
    `local` share, the newest; and a `frequent` share, the most looked at; all. A head takes the lowest rung
    whose tokens hold at least `recovery` of the attention of its newest `sample` queries, in each of its
    query heads. Tokens of that rung score 1 and their mean attention, the others their mean attention alone
    (at most 1).

    Without a budget `recovery` decides how much memory it becomes, as in the paper: each head keeps its rung
    (allocator `at-least`). With one, all heads compete for it (`global`): those that need much get it from
    those that do not, and when all together need more than there is, the least looked-at tokens of the widest
    heads go first.

    What differs from the paper: there is no rung for punctuation, since a cache layer never sees token ids.
    The paper's order is frequent before local: `first="frequent"`. It profiles with the whole attention
    matrix of the prompt; a sample of queries needs memory linear in its length.
    """

    summary: ClassVar[str] = "the fewest kinds of tokens that bring back a head's attention"
    paper: ClassVar[str] = "arXiv:2310.01801"

    budget: Budget | str | None = None
    allocator: str | Allocator = ""

    recovery: float = option(0.95, at_least=0, at_most=1)
    local: float = option(0.3, at_least=0, at_most=1)
    frequent: float = option(0.3, at_least=0, at_most=1)
    first: Literal["local", "frequent"] = "local"
    sample: int = option(64, at_least=1, at_most=2**24)

    def __post_init__(self) -> None:
        if self.allocator == "":
            object.__setattr__(self, "allocator", "at-least" if self.budget is None else "global")
        super().__post_init__()

    def score(self, context: EvictionContext) -> Tensor:
        queries = (context.newest_query_positions(self.sample) >= 0).sum(1).clamp_min(1)
        mass = attention_sums(context, self.sample) / queries[:, None, None, None]
        rung = self._rungs(context, mass.mean(2))
        # (3, b, h)
        held = torch.stack([(mass * (rung <= i).unsqueeze(2)).sum(-1).amin(2) for i in range(FULL)])
        chosen = (held < self.recovery).long().cumprod(0).sum(0)
        return mass.mean(2) + (rung <= chosen.unsqueeze(-1)).float()

    def _rungs(self, context: EvictionContext, attention: Tensor) -> Tensor:
        """(b, h, s): the lowest rung that holds each token."""
        number = context.valid.sum(-1, keepdim=True)
        local = number - context.valid.cumsum(-1) < _part(self.local, number)
        order = (
            attention.masked_fill(~context.valid, -1.0)
            .argsort(dim=-1, descending=True, stable=True)
            .argsort(-1)
        )
        frequent = order < _part(self.frequent, number)
        second, third = (local, frequent) if self.first == "local" else (frequent, local)
        rung = torch.full_like(order, FULL).masked_fill(third, 2).masked_fill(second, 1)
        newest = context.positions.masked_fill(~context.valid, -1).amax((1, 2))[:, None, None]
        return rung.masked_fill(
            (context.positions < self.sinks) | (context.positions > newest - self.recent), 0
        )


def _part(share: float, number: Tensor) -> Tensor:
    return (number.double() * share).round()
