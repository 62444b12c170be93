"""How many tokens a budget of bytes pays for, and which budgets are too small for what is always kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowkey.core.types import Budget, LowkeyError
from lowkey.policies.base import Policy

BYTE_ROUNDING = 1e-6  # bytes; budgets are floats, and must not fail by a rounding error


def budget_of(policy: Policy) -> Budget:
    """The policy's budget; 100 %, which bounds nothing, if it has none."""
    return Budget.parse("100%" if policy.budget is None else policy.budget)


def check_question(policy: Policy, tokens: int, question: int) -> None:
    """Check that a budget of tokens holds a question beside the tokens that are always kept.

    A budget of bytes is checked when the cache evicts.

    Args:
        policy: whose budget, sinks and recent tokens count.
        tokens: length of a sequence, the question included.
        question: length of the question, 0 for none.

    Raises:
        LowkeyError: if the question, the sinks and the recent tokens do not fit.
    """
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
    """The bytes that a cache with a policy takes for one sequence of the batch.

    An *entry* is one kept token of one head.

    Args:
        heads: KV heads over all layers that evict.
        sequences: the batch size.
        entry_bytes: of one entry.
        fixed_bytes: what is held whatever is kept: indices, and the layers that slide.
        recent_extra_bytes: how much more each entry of a recent token takes.
        expected_tokens: tokens that will be given again and then stay. A budget counts them as seen.
        expected_bytes: what they will take.
    """

    heads: int
    sequences: int
    entry_bytes: int
    fixed_bytes: float
    recent_extra_bytes: int = 0
    expected_tokens: int = 0
    expected_bytes: float = 0

    def bytes_left(self, policy: Policy, tokens: int) -> float:
        """The bytes that a budget leaves for the entries of a sequence that has seen so many tokens."""
        budget = budget_of(policy)
        if budget.unit == "bytes":
            granted = budget.amount / self.sequences
        else:
            granted = budget.amount * (tokens + self.expected_tokens)
        # where old tokens are pruned, recent ones are whole and take more
        recent_extra = self.heads * min(tokens, policy.recent) * self.recent_extra_bytes
        return granted - self.fixed_bytes - self.expected_bytes - recent_extra

    def protected_bytes(self, policy: Policy, tokens: int) -> float:
        """The bytes of the sinks and recent tokens of such a sequence, which are always kept."""
        return self.heads * min(tokens, policy.sinks + policy.recent) * self.entry_bytes

    def tokens_per_head(self, policy: Policy, tokens: int) -> float:
        """How many tokens each head of such a sequence may keep, on average over heads.

        Over all heads together it is a whole number.
        """
        return (self.bytes_left(policy, tokens) + BYTE_ROUNDING) // self.entry_bytes / self.heads

    def check(self, policy: Policy, tokens_seen: Sequence[int]) -> None:
        """Refuse a budget of bytes that is too small for the tokens that are always kept.

        Args:
            policy: whose budget, sinks and recent tokens count.
            tokens_seen: of each sequence; those without tokens do not count.

        Raises:
            LowkeyError: with the smallest budget that works.
        """
        budget, lengths = budget_of(policy), [n for n in tokens_seen if n]
        if budget.unit not in ("bytes", "bytes/token"):
            return
        lacking = [self.protected_bytes(policy, n) - self.bytes_left(policy, n) for n in lengths]
        if max(lacking, default=0) <= BYTE_ROUNDING:
            return
        if budget.unit == "bytes":  # the sequences share it equally
            more = max(lacking) * self.sequences
        else:  # each sequence gets it for each of its tokens
            more = max(x / (n + self.expected_tokens) for x, n in zip(lacking, lengths, strict=True))
        least = budget.amount + more - BYTE_ROUNDING
        # above 10 KiB rounded up to a tenth of a KiB, so that the number can be typed
        smallest = f"{math.ceil(least)} B" if least < 10 * 1024 else f"{math.ceil(least / 102.4) / 10:g} KiB"
        question = f"a question of {self.expected_tokens} tokens, " if self.expected_tokens else ""
        raise LowkeyError(
            f"budget {budget}: {_batch_in_words(self.sequences, lengths)} take "
            f"{smallest}{budget.unit.removeprefix('bytes')} for "
            f"{question}{policy.sinks} sinks and {policy.recent} recent tokens, indices and sliding layers; "
            "give that, or lower sinks or recent"
        )


def _batch_in_words(count: int, lengths: Sequence[int]) -> str:
    short, long = min(lengths), max(lengths)
    tokens = f"{long} tokens" if short == long else f"{short} to {long} tokens"
    return f"{tokens} in one row" if count == 1 else f"{count} rows of {tokens}"
