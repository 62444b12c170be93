"""The ranks there are to choose from, and those among them at which bases are fitted and errors measured."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lowkey.core.errors import LowkeyError

RankRequest = int | str | Sequence[int | float]
SYNTAX = "give a count like 8, ranks of one head like 16,32,64, shares of the head dim like 50%,75%, or all"
LISTED_RANKS = 8  # as many ranks are listed in full in a message


def multiples(head_dim: int, multiple: int) -> list[int]:
    """Return every rank up to the head dim that is a multiple of `multiple`, and the head dim itself.

    Raises:
        LowkeyError: if `multiple` is not between 1 and the head dim.
    """
    if not 1 <= multiple <= head_dim:
        raise LowkeyError(f"rank multiple {multiple}: must lie between 1 and the head dim {head_dim}")
    return sorted({*range(multiple, head_dim, multiple), head_dim})


def grid(request: RankRequest, choices: Sequence[int]) -> list[int]:
    """Return the requested ranks, in ascending order and always with the head dim.

    Args:
        request: a count of evenly spaced ranks, each moved to the nearest choice; or a list of ranks (int),
            which must be choices, and of shares of the head dim (float, above 0 and up to 1), each moved to
            the nearest choice; or one of these as text; or `all`.
        choices: the ranks that may be chosen, in ascending order; the last one is the head dim.

    Raises:
        LowkeyError: if the request is none of these, or names a rank that is not among `choices`.
    """
    wanted, d = read_request(request), choices[-1]
    if wanted is None:
        return list(choices)
    if isinstance(wanted, int):
        # With so few choices every one of them is a candidate.
        if len(choices) <= wanted:
            return list(choices)
        wanted = [(i + 1) / wanted for i in range(wanted)]
    for rank in wanted:
        if isinstance(rank, int) and rank not in choices:
            raise LowkeyError(
                f"ranks {_as_text(request)}: {rank} is not one of {_listed(choices)}, which this method and "
                "rank multiple allow"
            )
    # Of two choices equally near to a share, the smaller one.
    nearest = (r if isinstance(r, int) else min(choices, key=lambda c: (abs(c - r * d), c)) for r in wanted)
    return sorted({d, *nearest})


def read_request(request: RankRequest) -> int | list[int | float] | None:
    """Return a count, or a list of ranks and shares, or None for all ranks.

    Raises:
        LowkeyError: if the request is none of these.
    """
    if isinstance(request, str):
        return _parse(request)
    refusal = LowkeyError(f"ranks {_as_text(request)}: {SYNTAX}")
    if isinstance(request, int):
        # True and False are ints in Python.
        if isinstance(request, bool) or request < 1:
            raise refusal
        return request
    numbers = list(request)
    if not numbers or not all(_is_rank_or_share(x) for x in numbers):
        raise refusal
    return numbers


def _is_rank_or_share(number: object) -> bool:
    if isinstance(number, float):
        return 0 < number <= 1
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def _parse(text: str) -> int | list[int | float] | None:
    """Read a request that was given as text; a single whole number is a count."""
    words = [w.strip() for w in text.split(",")]
    if words == ["all"]:
        return None
    # The digits are limited, so that no text makes a number that `int` or `float` refuses.
    if not all(re.fullmatch(r"[0-9]{1,9}|[0-9]{1,3}(\.[0-9]{1,9})?%", w) for w in words):
        raise LowkeyError(f"ranks {text[:60]!r}: {SYNTAX}")
    numbers: list[int | float] = [float(w[:-1]) / 100 if w.endswith("%") else int(w) for w in words]
    if not all(_is_rank_or_share(x) for x in numbers):
        raise LowkeyError(f"ranks {text[:60]!r}: {SYNTAX}")
    return numbers[0] if len(numbers) == 1 and isinstance(numbers[0], int) else numbers


def _as_text(request: RankRequest) -> str:
    return ",".join(map(str, request)) if isinstance(request, list | tuple) else repr(request)


def _listed(choices: Sequence[int]) -> str:
    if len(choices) <= LISTED_RANKS:
        return ", ".join(map(str, choices))
    return f"{choices[0]}, {choices[1]}, {choices[2]}, ... {choices[-1]}"
