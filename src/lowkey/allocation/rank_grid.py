"""Which ranks there are to choose from, and at which of them bases are fitted and errors measured."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lowkey.core.types import LowkeyError

Asked = int | str | Sequence[int | float]
SYNTAX = "give a count like 8, ranks of one head like 16,32,64, shares of the head dim like 50%,75%, or all"


def multiples(head_dim: int, multiple: int) -> list[int]:
    """Every rank up to the head dim that is a multiple of `multiple`, and the head dim itself."""
    if not 1 <= multiple <= head_dim:
        raise LowkeyError(f"rank multiple {multiple}: must lie between 1 and the head dim {head_dim}")
    return sorted({*range(multiple, head_dim, multiple), head_dim})


def grid(asked: Asked, choices: Sequence[int]) -> list[int]:
    """The ranks among `choices` (ascending, the last one the head dim) that are asked for, always with the
    head dim.

    asked: a count n of evenly spaced ranks, each moved to the nearest choice; ranks, as integers, which must
    be choices; shares of the head dim above 0 and up to 1, as floats, each moved to the nearest choice; or
    the text of one of these, or `all`.
    Errors: LowkeyError for anything else, and for ranks that are no choices.
    """
    wanted, d = _read(asked), choices[-1]
    if wanted is None:
        return list(choices)
    if isinstance(wanted, int):
        if len(choices) <= wanted:
            return list(choices)
        wanted = [(i + 1) / wanted for i in range(wanted)]
    for rank in wanted:
        if isinstance(rank, int) and rank not in choices:
            raise LowkeyError(
                f"ranks {_told(asked)}: {rank} is not one of {_short(choices)}, which this method and rank "
                "multiple allow"
            )
    return sorted(
        {d, *(r if isinstance(r, int) else min(choices, key=lambda c: (abs(c - r * d), c)) for r in wanted)}
    )


def _read(asked: Asked) -> int | list[int | float] | None:
    """A count, ranks and shares, or None for all. Errors: LowkeyError."""
    if isinstance(asked, str):
        return _parsed(asked)
    refusal = LowkeyError(f"ranks {_told(asked)}: {SYNTAX}")
    if isinstance(asked, int):
        if isinstance(asked, bool) or asked < 1:
            raise refusal
        return asked
    found = list(asked)
    if not found or not all(_fits(x) for x in found):
        raise refusal
    return found


def _fits(wanted: object) -> bool:
    if isinstance(wanted, float):
        return 0 < wanted <= 1
    return isinstance(wanted, int) and not isinstance(wanted, bool) and wanted >= 1


def _parsed(text: str) -> int | list[int | float] | None:
    words = [w.strip() for w in text.split(",")]
    if words == ["all"]:
        return None
    if not all(re.fullmatch(r"[0-9]{1,9}|[0-9]{1,3}(\.[0-9]{1,9})?%", w) for w in words):
        raise LowkeyError(f"ranks {text[:60]!r}: {SYNTAX}")
    found: list[int | float] = [float(w[:-1]) / 100 if w.endswith("%") else int(w) for w in words]
    if not all(_fits(x) for x in found):
        raise LowkeyError(f"ranks {text[:60]!r}: {SYNTAX}")
    return found[0] if len(found) == 1 and isinstance(found[0], int) else found


def _told(asked: Asked) -> str:
    return ",".join(map(str, asked)) if isinstance(asked, list | tuple) else repr(asked)


def _short(choices: Sequence[int]) -> str:
    if len(choices) <= 8:
        return ", ".join(map(str, choices))
    return f"{choices[0]}, {choices[1]}, {choices[2]}, ... {choices[-1]}"
