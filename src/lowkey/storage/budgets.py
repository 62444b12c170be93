"""How many tokens a budget of bytes pays for, and which budgets are too small for what is always kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowkey.core.budget import too_few_tokens
from lowkey.core.types import Budget, LowkeyError
from lowkey.policies.base import Policy
from lowkey.storage.exact import NO_EXACT_TOKENS, Exact

BYTE_ROUNDING = 1e-6  # bytes; budgets are floats, and must not fail by a rounding error


def budget_of(policy: Policy) -> Budget:
    """The policy's budget; 100 %, which bounds nothing, if it has none."""
    return Budget.parse("100%" if policy.budget is None else policy.budget)


def protected_tokens(policy: Policy, exact: Exact) -> tuple[int, int]:
    """(sinks, recent tokens) of a sequence that are kept whatever they score, at most."""
    own, held = policy.sinks, exact.sinks
    # sinks that a rule recognises need not be the first tokens, which the policy keeps
    return own + held if exact.rule else max(own, held), max(policy.recent, exact.recent)


def check_window(policy: Policy, exact: Exact) -> None:
    """Check that a budget of tokens holds the tokens that are always kept.

    A budget of bytes is checked when the cache evicts.

    Args:
        policy: whose budget, sinks and recent tokens count.
        exact: sinks and recent tokens that are held exactly.

    Raises:
        LowkeyError: if they do not fit.
    """
    budget, (sinks, recent) = budget_of(policy), protected_tokens(policy, exact)
    if budget.unit == "tokens" and budget.amount < sinks + recent:
        raise too_few_tokens(budget, budget.amount, sinks, recent)


def check_question(policy: Policy, tokens: int, question: int, exact: Exact = NO_EXACT_TOKENS) -> None:
    """Check that a budget of tokens holds a question beside the tokens that are always kept.

    A budget of bytes is checked when the cache evicts.

    Args:
        policy: whose budget, sinks and recent tokens count.
        tokens: length of a sequence, the question included.
        question: length of the question, 0 for none.
        exact: sinks and recent tokens that are held exactly.

    Raises:
        LowkeyError: if the question, the sinks and the recent tokens do not fit.
    """
    budget, (sinks, recent) = budget_of(policy), protected_tokens(policy, exact)
    held = {"%": budget.amount / 100 * tokens, "tokens": budget.amount}.get(budget.unit, math.inf)
    if question and held < question + sinks + recent:
        raise LowkeyError(
            f"budget {budget}: {held:g} tokens per head do not hold a question of {question} tokens, "
            f"{sinks} sinks and {recent} recent tokens; raise the budget or lower sinks or recent"
        )


@dataclass(frozen=True)
class EvictionCosts:
    """The bytes that a cache with a policy takes for one sequence of the batch.

    An *entry* is one kept token of one row: of a KV head, or of the heads that share a latent.

    Args:
        heads: rows of one sequence over all layers that evict.
        sequences: the batch size.
        entry_bytes: of one entry.
        fixed_bytes: what is held whatever is kept: indices, and the layers that slide.
        protected: (sinks, recent tokens) that are always kept.
        sink_slots: sinks that are held exactly. Their slots are held even while they are empty.
        exact_recent: recent tokens that are held exactly.
        exact_extra_bytes: how much more than an entry an exact token takes, in each row.
        slots_stay_empty: whether a sequence may have fewer sinks than slots, however long it is.
        expected_tokens: tokens that will be given again and then stay. A budget counts them as seen.
        expected_bytes: what they will take.
    """

    heads: int
    sequences: int
    entry_bytes: float
    fixed_bytes: float
    protected: tuple[int, int]
    sink_slots: int = 0
    exact_recent: int = 0
    exact_extra_bytes: float = 0
    slots_stay_empty: bool = False
    expected_tokens: int = 0
    expected_bytes: float = 0

    def bytes_left(self, policy: Policy, tokens: int) -> float:
        """The bytes that a budget leaves for the entries of a sequence that has seen so many tokens."""
        budget = budget_of(policy)
        if budget.unit == "bytes":
            granted = budget.amount / self.sequences
        else:
            granted = budget.amount * (tokens + self.expected_tokens)
        filled = 0 if self.slots_stay_empty else min(tokens, self.sink_slots)
        exact = min(tokens, filled + self.exact_recent) * self.exact_extra_bytes
        empty = (self.sink_slots - filled) * (self.entry_bytes + self.exact_extra_bytes)
        return granted - self.fixed_bytes - self.expected_bytes - self.heads * (exact + empty)

    def protected_bytes(self, tokens: int) -> float:
        """The bytes of the sinks and recent tokens of such a sequence, which are always kept."""
        return self.heads * min(tokens, sum(self.protected)) * self.entry_bytes

    def tokens_per_head(self, policy: Policy, tokens: int) -> float:
        """How many tokens each head of such a sequence may keep, on average over heads.

        Over all heads together it is a whole number.
        """
        return (self.bytes_left(policy, tokens) + BYTE_ROUNDING) // self.entry_bytes / self.heads

    def check(self, policy: Policy, tokens_seen: Sequence[int]) -> None:
        """Refuse a budget of bytes that is too small for the tokens that are always kept.

        Args:
            policy: whose budget counts.
            tokens_seen: of each sequence; those without tokens do not count.

        Raises:
            LowkeyError: with the smallest budget that works.
        """
        budget, lengths = budget_of(policy), [n for n in tokens_seen if n]
        if budget.unit not in ("bytes", "bytes/token"):
            return
        lacking = [self.protected_bytes(n) - self.bytes_left(policy, n) for n in lengths]
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
            f"{question}{self.protected[0]} sinks and {self.protected[1]} recent tokens, indices and sliding "
            "layers; give that, or lower sinks or recent"
        )


def _batch_in_words(count: int, lengths: Sequence[int]) -> str:
    short, long = min(lengths), max(lengths)
    tokens = f"{long} tokens" if short == long else f"{short} to {long} tokens"
    return f"{tokens} in one row" if count == 1 else f"{count} rows of {tokens}"
