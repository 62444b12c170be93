"""What the rows say, in one sentence."""

from __future__ import annotations

from lowkey.report.columns import format_bytes, format_percent, format_perplexity
from lowkey.report.frontier import frontier_summary
from lowkey.report.results import Row, full_row, is_full, measured

NEAR_FULL = 0.05  # a perplexity this much above the full cache's still counts as near


def summary(rows: list[Row]) -> str:
    """The smallest cache that stays near the full cache's perplexity; else the closest; else why neither can
    be said. Recall decides if perplexity was not measured. Of what `lowkey plan` compared: the best of each
    kind.
    """
    if planned := frontier_summary(rows):
        return planned
    full = full_row(rows)
    if full is None or not measured(full, "bytes_per_token"):
        return f"{_count(rows)}, without a full cache to compare perplexity and bytes with."
    if not measured(full, "perplexity"):
        if _recalls(full):
            return _recall_summary(rows, full)
        return f"{_count(rows)}, without a full cache to compare perplexity and bytes with."
    others = [
        row
        for row in rows
        if not is_full(row) and measured(row, "perplexity") and measured(row, "bytes_per_token")
    ]
    if not others:
        return f"{_count(rows)}; no compressed row has both a perplexity and its bytes."
    limit = (1 + NEAR_FULL) * _value(full, "perplexity")
    near = [row for row in others if _value(row, "perplexity") <= limit]
    within = f"within {NEAR_FULL:.0%} of the full perplexity"
    if near:
        return f"The smallest cache {within} is {_compared(min(near, key=_size), full)}"
    return f"No row stays {within}; the closest is {_compared(min(others, key=_perplexity), full)}"


def _recall_summary(rows: list[Row], full: Row) -> str:
    """The same by recall."""
    others = [
        row
        for row in rows
        if not is_full(row) and measured(row, "exact_match") is not None and measured(row, "bytes_per_token")
    ]
    if not others:
        return f"{_count(rows)}; no compressed row has both its recall and its bytes."
    near = [row for row in others if _value(row, "exact_match") >= _value(full, "exact_match") - NEAR_FULL]
    best = (
        min(near, key=_size)
        if near
        else max(others, key=lambda row: (_value(row, "exact_match"), -_size(row)))
    )
    points = f"within {100 * NEAR_FULL:g} points of the full recall"
    said = f"The smallest cache {points} is" if near else f"No row stays {points}; the closest is"
    return f"{said} {_held(best, full)}{_recall(best, full)}."


def held_differs(rows: list[Row]) -> list[str]:
    """Labels of rows whose cache holds other bytes than predicted: their bytes cannot be trusted."""
    pairs = [(row, measured(row, "bytes_held"), measured(row, "bytes_predicted")) for row in rows]
    return [
        str(row["label"])
        for row, held, predicted in pairs
        if held is not None and predicted is not None and held != predicted
    ]


def _compared(row: Row, full: Row) -> str:
    """A row's bytes, perplexity and recall against those of the full cache."""
    own, full_value = _perplexity(row), _perplexity(full)
    perplexity = (
        f" at perplexity {format_perplexity(own)} against {format_perplexity(full_value)} "
        f"({own / full_value - 1:+.1%})"
    )
    # A cache may read on fluently and yet have lost what it is asked for, so recall is never left out.
    return f"{_held(row, full)}{perplexity}{_recall(row, full).replace(' at', ' and')}."


def _held(row: Row, full: Row) -> str:
    """A row's bytes against those of the full cache."""
    size, whole = _size(row), _size(full)
    return (
        f"{row['label']}: it keeps {format_bytes(size)} of {format_bytes(whole)} per token "
        f"({format_percent(size / whole)})"
    )


def _recall(row: Row, full: Row) -> str:
    """A row's recall against that of the full cache, or nothing."""
    own, full_value = measured(row, "exact_match"), _recalls(full)
    return (
        ""
        if own is None or full_value is None
        else f" at recall {format_percent(own)} against {format_percent(full_value)}"
    )


def _recalls(full: Row) -> float | None:
    """The full cache's recall, or None if it is no evidence."""
    return None if full.get("recall_evidence") is False else measured(full, "exact_match")


def _count(rows: list[Row]) -> str:
    """How many rows were measured, in words."""
    return f"{len(rows)} {'row' if len(rows) == 1 else 'rows'} measured"


def _value(row: Row, key: str) -> float:
    """A number of a row, 0 if it was not measured."""
    return measured(row, key) or 0.0


def _size(row: Row) -> float:
    """Bytes per token."""
    return _value(row, "bytes_per_token")


def _perplexity(row: Row) -> float:
    """Perplexity."""
    return _value(row, "perplexity")
