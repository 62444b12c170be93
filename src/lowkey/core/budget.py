"""How much of a cache is kept, as text and as a number of tokens or bytes.

Imports no torch: the command line checks budgets before it loads torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from lowkey.core.errors import LowkeyError
from lowkey.core.options import RANGE, Checked, Range, shown

LARGEST_BUDGET = 2**50  # tokens or bytes; more than a PiB is a slip of the keyboard
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Budget(Checked):
    """How much is kept: `50%`, `512 tokens`, `64 KiB/token` or `1.5 GiB`.

    For a policy, `%` and `tokens` count tokens: those that a head holds of a sequence, on average over all
    heads. Sinks and recent tokens stay even if a percentage is less. Bytes count everything that the cache
    holds (`nbytes`): every sequence of the batch, every layer, sliding ones too, and all indices. The bound
    holds after a prompt, after a later chunk and after every eviction of decoding (the policy's `every`); a
    budget that is too small is refused with the smallest that works. Between evictions, decoding adds its
    tokens. A frozen cache evicts nothing. The sequences of a batch share a total equally. A rate (`/token`)
    gives each sequence so much for each of its tokens, without padding.

    For a plan, bytes (a share of the uncompressed ones, a rate, or a total) are what the compressed layers
    hold of one sequence of a given length (`at` of `calibrate`), exact tokens and indices included. Sliding
    layers come on top.

    Args:
        amount: in the unit.
        unit: `%`, `tokens`, `bytes/token` or `bytes`.
    """

    amount: float = field(metadata={RANGE: Range(above=0, at_most=LARGEST_BUDGET)})
    unit: Literal["%", "tokens", "bytes/token", "bytes"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit == "%" and self.amount > 100:
            raise LowkeyError(
                f"budget {self}: the share that is kept lies above 0% and up to 100%; try '50%'"
            )

    @classmethod
    def parse(cls, text: str | float | Budget) -> Budget:
        """Read a budget from text.

        Raises:
            LowkeyError: for anything else. A plain number is refused because it could mean what is kept or
                what is removed.
        """
        if isinstance(text, Budget):
            return text
        match = re.fullmatch(
            r"\s*(\d+(?:\.\d+)?)\s*(%|tokens?|(?:[KMG]i)?B(?:/token)?)\s*", str(text), re.ASCII
        )
        if not match:
            raise LowkeyError(
                f"budget {shown(text)}: say what is kept as '50%', '512 tokens', '64 KiB/token' or '1.5 GiB'"
            )
        amount, unit = float(match[1]) * UNITS.get(match[2].removesuffix("/token"), 1), match[2]
        if not amount:
            raise LowkeyError(f"budget {shown(text)}: something must be kept; try '50%'")
        if unit == "%" and amount > 100:
            raise LowkeyError(
                f"budget {shown(text)}: the share that is kept lies above 0% and up to 100%; try '50%'"
            )
        if amount > LARGEST_BUDGET:
            raise LowkeyError(
                f"budget {shown(text)}: no cache takes more than 2^50 tokens or bytes; give what may be "
                "kept, like '50%'"
            )
        if unit == "%":
            return cls(amount, "%")
        if unit.startswith("token"):
            return cls(amount, "tokens")
        return cls(amount, "bytes/token" if unit.endswith("/token") else "bytes")

    def bytes_per_token(self, full: int) -> float:
        """The budget in bytes per token.

        Args:
            full: bytes per token of the uncompressed layers.

        Raises:
            LowkeyError: for a budget of tokens or of total bytes.
        """
        if self.unit == "%":
            return self.amount * full / 100
        if self.unit == "bytes/token":
            return self.amount
        raise LowkeyError(f"budget {self}: ranks cost bytes per token; say it as '50%' or '64 KiB/token'")

    def share(self, full: int, tokens: int) -> float:
        """The budget as a share of an uncompressed cache.

        Args:
            full: bytes per token of the uncompressed cache.
            tokens: length of the cache.

        Raises:
            LowkeyError: for a budget of tokens.
        """
        return self.amount / tokens / full if self.unit == "bytes" else self.bytes_per_token(full) / full

    def _fits_unit(self, unit: str) -> bool:
        """Whether bytes are at least one of this unit, and a whole number of the unit below."""
        return self.amount >= UNITS[unit] and self.amount % (UNITS[unit] / 2**10) == 0

    def __str__(self) -> str:
        if self.unit in ("%", "tokens"):
            return f"{self.amount:.12g}" + ("%" if self.unit == "%" else " tokens")
        # the largest unit in which the number is short
        size = next((u for u in ("GiB", "MiB", "KiB") if self._fits_unit(u)), "B")
        return f"{self.amount / UNITS[size]:.12g} {size}{self.unit.removeprefix('bytes')}"


def too_few_tokens(budget: Budget, tokens: float, sinks: int, recent: int) -> LowkeyError:
    """The error for a policy's budget that does not hold the tokens which are always kept.

    Args:
        budget: what was asked for.
        tokens: tokens per head that this gives.
        sinks, recent: how many first and last tokens are always kept.
    """
    return LowkeyError(
        f"budget {budget}: {tokens:g} tokens per head do not hold the {sinks} sinks and {recent} recent "
        "tokens that are always kept; raise the budget or lower sinks or recent"
    )
