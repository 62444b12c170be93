"""FastGen (arXiv:2310.01801): each head keeps the smallest set of tokens that recovers its attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowkey.core.budget import Budget
from lowkey.core.options import option
from lowkey.policies.base import EvictionContext, Policy, attention_sums
from lowkey.policies.sharing import TokenAllocator

ALL_TOKENS = 3  # the number of the last set


@dataclass(frozen=True)
class FastGen(Policy):
    """FastGen: an adaptive policy. Each head takes the smallest of four nested token sets that recovers its
    attention.

    The sets, each of which contains the one before: 0, the sinks and recent tokens; 1, also the newest
    tokens, a share `local` of all; 2, also those that get the most attention, a share `frequent`; 3, all
    tokens. A head takes the first set that holds at least `recovery` of the attention mass of its recent
    queries, in every query head.

    Score of token j: `m_j + [j is in the head's set]`, with m_j the mean attention (at most 1) that j gets
    from the recent queries and the query heads of the KV head. So a score of 1 or more says that the head
    needs the token.

    Without a budget, memory follows from `recovery`, as in the paper: each head keeps its set (allocator
    `at-least`). With a budget all heads compete (allocator `global`): heads whose set is large get what the
    others leave. If all sets together exceed the budget, the tokens of least attention go first.

    Args:
        recovery: share of the attention that a head's set must hold (default 0.95).
        local: share of the tokens that set 1 adds, the newest (default 0.3).
        frequent: share of the tokens that set 2 adds, those of most attention (default 0.3).
        first: which of `local` and `frequent` set 1 adds; the other is added by set 2 (default `local`).
        sample: number of recent queries whose attention is measured (default 64).

    Source: arXiv:2310.01801. Where we differ: there is no set for punctuation, since a cache layer never sees
    token ids. The paper adds frequent tokens before local ones, which is `first="frequent"`. It measures the
    whole attention matrix of the prompt; a sample of queries needs memory that is linear in the length.
    """

    summary: ClassVar[str] = "the fewest kinds of tokens that bring back a head's attention"
    paper: ClassVar[str] = "arXiv:2310.01801"

    budget: Budget | str | None = None
    allocator: str | TokenAllocator = ""  # replaced by `at-least` or `global`, depending on the budget

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
        """Mean attention, plus 1 for tokens of the set that the head takes (b, h, s); see `Policy.score`."""
        queries = (context.newest_query_positions(self.sample) >= 0).sum(1).clamp_min(1)
        mass = attention_sums(context, self.sample) / queries[:, None, None, None]  # (b, h, g, s)
        smallest_set = self._smallest_sets(context, mass.mean(2))
        # (3, b, h): attention mass that each set but the last recovers, in the query head that has least of
        # it.
        recovered = torch.stack(
            [(mass * (smallest_set <= i).unsqueeze(2)).sum(-1).amin(2) for i in range(ALL_TOKENS)]
        )
        # The number of sets, from the first on, that do not suffice is the number of the set that does.
        chosen = (recovered < self.recovery).long().cumprod(0).sum(0)
        return mass.mean(2) + (smallest_set <= chosen.unsqueeze(-1)).float()

    def _smallest_sets(self, context: EvictionContext, attention: Tensor) -> Tensor:
        """The number of the smallest set that holds each token (b, h, s).

        Args:
            context: the candidates.
            attention: mean attention (b, h, s) that each token gets.
        """
        number = context.valid.sum(-1, keepdim=True)
        local = number - context.valid.cumsum(-1) < (number.double() * self.local).round()
        rank_by_attention = (
            attention.masked_fill(~context.valid, -1.0)
            .argsort(dim=-1, descending=True, stable=True)
            .argsort(-1)
        )
        frequent = rank_by_attention < (number.double() * self.frequent).round()
        second, third = (local, frequent) if self.first == "local" else (frequent, local)
        sets = torch.full_like(rank_by_attention, ALL_TOKENS).masked_fill(third, 2).masked_fill(second, 1)
        newest = context.positions.masked_fill(~context.valid, -1).amax((1, 2))[:, None, None]
        always = (context.positions < self.sinks) | (context.positions > newest - self.recent)
        return sets.masked_fill(always, 0)
