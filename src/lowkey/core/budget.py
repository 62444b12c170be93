"""How much of a cache is kept, as text and as a number of tokens or bytes.

Imports no torch: the command line checks budgets before it loads torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from lowkey.core.errors import LowkeyError
from lowkey.core.options import RANGE, Checked, Range, shown

LARGEST_BUDGET = 2**50  # of a budget: more tokens, and more bytes than a PiB, are slips
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Budget(Checked):
    """What is kept: `50%`, `512 tokens`, `64 KiB/token` or `1.5 GiB`.

    Of a policy, `%` and `tokens` count tokens: what a head holds of a row, on average over all heads; sinks
    and recent tokens stay even where a `%` is less. Bytes count all that the cache holds (`nbytes`): every
    row of the batch, every layer, those that slide too, and all indices. That bound holds after a prompt, a
    later chunk and every eviction of decoding (the policy's `every`), or the call is refused with the
    smallest budget that works. Between evictions decoding adds its tokens, and a frozen cache evicts nothing.
    Rows share a total equally; a rate `/token` gives each row so much for each of its tokens, padding not
    counted.

    Of a plan, bytes (`%` of the full ones, a rate, or a total) are what the compressed layers hold of one row
    of a given length (`calibrate`'s `at`), tokens that are kept exact and indices included. Sliding layers
    come on top.
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
        """Read a budget; a plain number is refused because it could mean kept or removed."""
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
        """The budget in bytes per token, when the uncompressed layers hold `full` bytes per token."""
        if self.unit == "%":
            return self.amount * full / 100
        if self.unit == "bytes/token":
            return self.amount
        raise LowkeyError(f"budget {self}: ranks cost bytes per token; say it as '50%' or '64 KiB/token'")

    def share(self, full: int, tokens: int) -> float:
        """Of a cache of so many tokens with `full` bytes each, for a budget of bytes."""
        return self.amount / tokens / full if self.unit == "bytes" else self.bytes_per_token(full) / full

    def __str__(self) -> str:
        if self.unit in ("%", "tokens"):
            return f"{self.amount:.12g}" + ("%" if self.unit == "%" else " tokens")
        size = next(
            (
                u
                for u in ("GiB", "MiB", "KiB")
                if self.amount % (UNITS[u] / 2**10) == 0 and self.amount >= UNITS[u]
            ),
            "B",
        )
        return f"{self.amount / UNITS[size]:.12g} {size}{self.unit.removeprefix('bytes')}"
