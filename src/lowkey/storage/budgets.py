"""How many tokens a budget of bytes pays for, and which budgets are too small for what is always kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowkey.core.budget import too_few_tokens
from lowkey.core.types import Budget, LowkeyError
from lowkey.policies.base import Policy
from lowkey.policies.sharing import KnownBefore
from lowkey.storage.exact import NO_EXACT_TOKENS, Exact

BYTE_ROUNDING = 1e-6  # bytes; budgets are floats, and must not fail by a rounding error
LEAST_INCREMENT = 1e-6  # bytes by which a kept token takes more than one of the rest, at least; a divisor
TRIALS = 12  # of numbers of entries, until the bytes of layers that are not alike fill a budget


def budget_of(policy: Policy) -> Budget:
    """The policy's budget; 100 %, which bounds nothing, if it has none."""
    return Budget.parse("100%" if policy.budget is None else policy.budget)


def tokens_of_budget(policy: Policy, tokens: int, prompt: int, expected: int) -> float | None:
    """The budget of a sequence, unless it counts bytes.

    Args:
        policy: whose budget counts.
        tokens: that the sequence has seen.
        prompt: how many of them are a protected prompt.
        expected: tokens that will be given again and then stay.

    Returns:
        Tokens per head, on average over heads, without those that are expected; None for a budget of bytes.
    """
    if policy.budget is None:
        return tokens
    budget = budget_of(policy)
    if budget.unit == "%":
        return prompt + max(0.0, budget.amount / 100 * (tokens - prompt + expected) - expected)
    return prompt + max(0.0, budget.amount - expected) if budget.unit == "tokens" else None


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
    if question and not policy.protect_prompt and held < question + sinks + recent:
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
        entry_bytes: of one entry, in each layer that evicts.
        fixed_bytes: what is held whatever is kept: indices, and the layers that slide.
        protected: (sinks, recent tokens) that are always kept.
        exact: sinks and recent tokens that are held exactly. A sink's slot is held even while it is empty.
        whole_recent: so many recent tokens take as much as exact ones, wherever they lie.
        exact_extra_bytes: how much more than an entry an exact token takes, in each row, on average over
            layers.
        slot_bytes: of a sink's slot, in each row.
        copy_bytes: what a sink in a slot takes that is also among the stored tokens, in the same way.
        expected_tokens: tokens that will be given again and then stay. A budget counts them as seen.
        expected_bytes: what they will take.
        rows_of_heads: for each layer, the row of each KV head; None if every head has a row of its own.
        rest_bytes: what a token that is not kept takes in each row, on average over layers. Entries and exact
            tokens take so much besides what is said of them.
    """

    heads: int
    sequences: int
    entry_bytes: tuple[float, ...]
    fixed_bytes: float
    protected: tuple[int, int]
    exact: Exact = NO_EXACT_TOKENS
    whole_recent: int = 0
    exact_extra_bytes: float = 0
    slot_bytes: float = 0
    copy_bytes: float = 0
    expected_tokens: int = 0
    expected_bytes: float = 0
    rows_of_heads: tuple[tuple[int, ...], ...] | None = None
    rest_bytes: float = 0

    @property
    def mean_entry_bytes(self) -> float:
        """The bytes of one entry, on average over layers."""
        return sum(self.entry_bytes) / len(self.entry_bytes)

    @property
    def layers_are_alike(self) -> bool:
        """Whether an entry takes the same bytes in every layer."""
        return len(set(self.entry_bytes)) == 1

    def bytes_left(self, policy: Policy, tokens: int) -> float:
        """The bytes that a budget leaves for the entries of a sequence that has seen so many tokens."""
        budget = budget_of(policy)
        if budget.unit == "bytes":
            granted = budget.amount / self.sequences
        else:
            granted = budget.amount * (tokens + self.expected_tokens)
        # a sequence may have fewer sinks than a rule has slots for, however long it is
        filled = 0 if self.exact.rule else min(tokens, self.exact.sinks)
        recent = max(self.whole_recent, self.exact.recent)
        exact = min(tokens, filled + recent) * self.exact_extra_bytes
        # slots that are empty, and those whose sink is also in the window
        slots = (self.exact.sinks - min(filled, self._sinks_behind_window(tokens))) * self.slot_bytes
        each = exact + slots + tokens * self.rest_bytes
        return granted - self.fixed_bytes - self.expected_bytes - self.heads * each

    def _sinks_behind_window(self, tokens: int) -> int:
        """How many sinks such a sequence has that have left the window, at most."""
        return min(self.exact.sinks, max(0, tokens - self.exact.recent))

    def protected_bytes(self, tokens: int) -> float:
        """The bytes of the sinks and recent tokens of such a sequence, which are always kept."""
        return self.heads * min(tokens, sum(self.protected)) * self.mean_entry_bytes

    def fits(self, policy: Policy, tokens: int) -> bool:
        """Whether a budget of bytes holds all tokens of such a sequence."""
        each = tokens * self.mean_entry_bytes + self._sinks_behind_window(tokens) * self.copy_bytes
        return self.bytes_left(policy, tokens) + BYTE_ROUNDING >= self.heads * each

    def tokens_per_head(self, policy: Policy, tokens: int) -> float:
        """How many tokens each head of such a sequence may keep, on average over heads.

        Over all heads together it is a whole number. Layers whose entries differ are weighed by what the
        allocator gives to each; where only scores tell, every entry counts as one of the dearest layer.
        """
        left = self.bytes_left(policy, tokens) + BYTE_ROUNDING
        if self.layers_are_alike:
            return left // self.entry_bytes[0] / self.heads
        if left >= self.heads * tokens * self.mean_entry_bytes:
            return left // self.mean_entry_bytes / self.heads
        allocator, layers = policy.resolved_allocator(), len(self.entry_bytes)

        def planned_bytes(mean: float) -> float:
            known = KnownBefore(
                mean,
                tokens,
                min(tokens, sum(self.protected)),
                layers,
                self.heads // layers,
                self.rows_of_heads,
            )
            counts = allocator.planned(known)
            return math.inf if counts is None else self.bytes_of(counts.sum(1).tolist())

        return self.most_tokens(left, planned_bytes)

    def bytes_of(self, entries: Sequence[int]) -> float:
        """The bytes of so many entries in each layer."""
        return sum(n * each for n, each in zip(entries, self.entry_bytes, strict=True))

    def most_tokens(self, left: float, bytes_at: Callable[[float], float]) -> float:
        """The most tokens per head, on average over heads, whose entries take at most some bytes.

        Args:
            left: these bytes.
            bytes_at: the bytes of all entries at a number of tokens per head. It grows with this number, but
                for the rounding of counts.
        """
        # as many entries of the dearest layer fit in any case, and of the cheapest no more fit
        low, high = (int(left // each(self.entry_bytes)) for each in (max, min))
        high += 1
        of_low, of_high = bytes_at(low / self.heads), bytes_at(high / self.heads)
        for trial in range(TRIALS):
            if high - low <= 1 or left - of_low < min(self.entry_bytes) or not math.isfinite(of_low):
                break
            # where the straight line between both meets what is left; every third time the middle
            part = (left - of_low) / (of_high - of_low) if of_high > of_low and trial % 3 < 2 else 0.5
            middle = min(max(low + int(part * (high - low)), low + 1), high - 1)
            size = bytes_at(middle / self.heads)
            if size <= left:
                low, of_low = middle, size
            else:
                high, of_high = middle, size
        return low / self.heads

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
