"""How many tokens a budget of bytes pays for, and which budgets are too small for what is kept in any case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowkey.core.types import Budget, LowkeyError
from lowkey.policies.base import Policy


def budget_of(policy: Policy) -> Budget:
    """The policy's budget; 100%, which bounds nothing, where it has none."""
    return Budget.parse("100%" if policy.budget is None else policy.budget)


def check_question(policy: Policy, tokens: int, question: int) -> None:
    """Errors: LowkeyError where a budget of tokens, of a row of so many with its question, does not hold the
    question, sinks and recent tokens. One of bytes is checked when it evicts."""
    budget = budget_of(policy)
    held = {"%": budget.amount / 100 * tokens, "tokens": budget.amount}.get(budget.unit, math.inf)
    if question and held < question + policy.sinks + policy.recent:
        raise LowkeyError(
            f"budget {budget}: {held:g} tokens per head do not hold a question of {question} tokens, "
            f"{policy.sinks} sinks and "
            f"{policy.recent} recent tokens; raise the budget or lower sinks or recent"
        )


@dataclass(frozen=True)
class EvictionCosts:
    """Bytes that a cache with a policy takes for one row of the batch.

    heads: over all layers that evict. rows: of the batch. entry: a kept token of one head. whole: how much
    more a head's recent tokens take, each. fixed: what no kept token pays for: indices, and the layers that
    slide. expected_tokens: tokens that will be given again and stay, which a budget counts as seen; coming: what they
    will take.
    """

    heads: int
    rows: int
    entry: int
    fixed: float
    whole: int = 0
    expected_tokens: int = 0
    coming: float = 0

    def left(self, policy: Policy, tokens: int) -> float:
        """Bytes that a budget leaves for the kept tokens of one row that has seen `tokens` tokens."""
        budget = budget_of(policy)
        recent = self.heads * min(tokens, policy.recent) * self.whole
        paid = (
            budget.amount / self.rows
            if budget.unit == "bytes"
            else budget.amount * (tokens + self.expected_tokens)
        )
        return paid - self.fixed - self.coming - recent

    def least(self, policy: Policy, tokens: int) -> float:
        """Bytes of the sinks and recent tokens of such a row, which are kept in any case."""
        return self.heads * min(tokens, policy.sinks + policy.recent) * self.entry

    def pay(self, policy: Policy, tokens: int) -> float:
        """How many tokens each head of such a row may keep, on average over heads; in all heads together a
        whole number.
        """
        return (self.left(policy, tokens) + 1e-6) // self.entry / self.heads

    def check(self, policy: Policy, seen: Sequence[int]) -> None:
        """Refuse a budget of bytes that is too small for rows that have seen so many tokens, with the
        smallest that is not.
        """
        budget, rows = budget_of(policy), [n for n in seen if n]
        if budget.unit not in ("bytes", "bytes/token"):
            return
        lacking = [self.least(policy, n) - self.left(policy, n) for n in rows]
        if max(lacking, default=0) <= 1e-6:
            return
        each = zip(lacking, rows, strict=True)
        more = (
            max(lacking) * self.rows
            if budget.unit == "bytes"
            else max(x / (n + self.expected_tokens) for x, n in each)
        )
        least = budget.amount + more - 1e-6
        smallest = f"{math.ceil(least)} B" if least < 10 * 1024 else f"{math.ceil(least / 102.4) / 10:g} KiB"
        asked = f"a question of {self.expected_tokens} tokens, " if self.expected_tokens else ""
        raise LowkeyError(
            f"budget {budget}: {_described(self.rows, rows)} take "
            f"{smallest}{budget.unit.removeprefix('bytes')} for "
            f"{asked}{policy.sinks} sinks and {policy.recent} recent tokens, indices and sliding layers; "
            "give that, or lower sinks or recent"
        )


def _described(count: int, lengths: Sequence[int]) -> str:
    """A batch in words."""
    short, long = min(lengths), max(lengths)
    tokens = f"{long} tokens" if short == long else f"{short} to {long} tokens"
    return f"{tokens} in one row" if count == 1 else f"{count} rows of {tokens}"
