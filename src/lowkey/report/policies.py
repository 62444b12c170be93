"""Rows of eviction policies: which of them belong on one line, what they keep per head, and their parameters
in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lowkey.report.results import Row, heads_fit, is_full, kept, measured

LONGEST_PARAMETER = 60  # characters of one parameter


class Line(NamedTuple):
    """One policy at every budget that it was measured with, the smallest first.

    Args:
        label: name of the policy, without its budget.
        rows: its rows.
    """

    label: str
    rows: list[Row]


def is_policy(row: Row) -> bool:
    """Whether a row is of an eviction policy."""
    return bool(row.get("policy")) and not is_full(row)


def share(row: Row) -> float | None:
    """The share of the full cache's bytes that a row holds; None if unknown or too extreme to draw."""
    value = kept(row)
    return value if value is not None and 1e-12 < value < 1e12 else None


def policy_lines(rows: Iterable[Row]) -> list[Line]:
    """Policy rows with a known share, grouped into lines of rows that differ in their budget only. Lines are
    sorted by name, so that a policy has the same colour in every section.
    """
    groups: dict[str, list[Row]] = {}
    for row in filter(is_policy, rows):
        if share(row) is not None:
            groups.setdefault(without_budget(row), []).append(row)
    return [
        Line(label, sorted(group, key=lambda row: share(row) or 0.0))
        for label, group in sorted(groups.items())
    ]


def without_budget(row: Row) -> str:
    """A row's label without its budget: `snapkv 6% on pca 50%` becomes `snapkv on pca 50%`."""
    label = str(row.get("label", row["name"]))
    before, budget, after = label.partition(f" {row.get('budget')}")
    # `6%` may also be the beginning of another word of the label.
    return before + after if before and budget and after[:1] in ("", " ") else label


def references(rows: Sequence[Row]) -> list[Row]:
    """Rows that policies are compared with: the full cache, packed integers, and plans that some policy
    evicts from.
    """
    plans = {str(row.get("plan")) for row in rows if is_policy(row) and row.get("plan")}
    others = [row for row in rows if not is_policy(row) and share(row) is not None]
    return [
        row
        for row in others
        if is_full(row) or (row.get("bits") and not row.get("method")) or str(row.get("plan")) in plans
    ]


def kept_heads(row: Row) -> np.ndarray | None:
    """Tokens kept after the prompt.

    Returns:
        (layers, KV heads), NaN where a layer has no such head or nothing was counted; None without any count.
    """
    value = row.get("kept_per_head")
    if not value or not heads_fit(value):
        return None
    heads = np.full((len(value), max(map(len, value))), math.nan)
    for layer, counts in enumerate(value):
        heads[layer, : len(counts)] = [math.nan if count is None else count for count in counts]
    heads[~np.isfinite(heads)] = math.nan
    return heads if np.isfinite(heads).any() else None


def by_budget(rows: Iterable[Row]) -> dict[str | None, list[Row]]:
    """Policy rows whose heads were counted, by the budget that was asked. Policies have the same order in
    each.
    """
    groups: dict[str | None, list[Row]] = {}
    for row in filter(is_policy, rows):
        if kept_heads(row) is not None:
            budget = row.get("budget")
            groups.setdefault(None if budget is None else str(budget), []).append(row)
    return {budget: sorted(group, key=without_budget) for budget, group in groups.items()}


def heads_words(row: Row) -> str:
    """Tokens kept, in words: `mean 15.3, max 31 of 512 tokens`. The length of the prompt is left out where it
    does not follow from the bytes.
    """
    heads, tokens = kept_heads(row), _prompt_tokens(row)
    if heads is None:
        return "not counted"
    most = float(np.nanmax(heads))
    total = f" of {tokens:,}" if tokens and tokens >= most else ""
    return f"mean {np.nanmean(heads):,.4g}, max {most:,.6g}{total} tokens"


def _prompt_tokens(row: Row) -> int | None:
    """Tokens of the prompt, if the row's bytes give a whole number."""
    held, each = measured(row, "bytes_held"), measured(row, "bytes_per_token")
    # Bytes per token are bytes held over the tokens of the prompt, in results that lowkey writes.
    tokens = held / each if held and each else math.inf
    return round(tokens) if 1 <= tokens < 1e9 and math.isclose(tokens, round(tokens), rel_tol=1e-6) else None


def score_words(row: Row) -> str | None:
    """A policy's score and its parameters: `snapkv (sinks=4, recent=8, window=8)`."""
    return _words(row.get("policy"))


def allocator_words(row: Row) -> str | None:
    """A policy's allocator and its parameters."""
    policy = row.get("policy")
    return _words(policy.get("allocator")) if isinstance(policy, dict) else None


def _words(chosen: Any) -> str | None:
    """A name with its parameters, or any other value as text."""
    if not isinstance(chosen, dict):
        return None if chosen is None else _short(chosen)
    name, parameters = _short(chosen.get("name")), chosen.get("parameters")
    if not isinstance(parameters, dict):
        return f"{name} ({_short(parameters)})" if parameters else name
    listed = ", ".join(f"{_short(key)}={_short(value)}" for key, value in parameters.items())
    return f"{name} ({listed})" if listed else name


def _short(value: Any) -> str:
    """A value on one line of at most `LONGEST_PARAMETER` characters; a long list is given by its length."""
    text = " ".join(str(value).split()) or "''"
    if len(text) > LONGEST_PARAMETER and isinstance(value, list | tuple):
        return f"[{len(value)} {'lists' if isinstance(value[0], list | tuple) else 'values'}]"
    return text if len(text) <= LONGEST_PARAMETER else text[: LONGEST_PARAMETER - 1] + "…"
