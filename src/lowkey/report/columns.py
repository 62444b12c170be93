"""Columns of the table: where each number comes from, how it is written, and what it means."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from lowkey.report.policies import allocator_words, score_words
from lowkey.report.results import Row, kept, measured

DASH = "—"  # no number was measured
# The field with half of the interval of a column's numbers.
HALVES = {"Perplexity": "perplexity_95", "KL": "kl_95", "KL, decode": "kl_decode_95"}


class Column(NamedTuple):
    """One column of the table.

    Args:
        title: its heading.
        read: its value in a row; None if it was not measured.
        write: the value as text.
        meaning: one sentence for readers.
    """

    title: str
    read: Callable[[Row], Any]
    write: Callable[[Any], str]
    meaning: str


def _number(write: Callable[[float], str]) -> Callable[[Any], str]:
    """A writer that uses `write` for finite numbers and shows any other value as it is, so that nothing is
    hidden.
    """

    def show(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return str(value)
        return write(value) if math.isfinite(value) else str(value).replace("inf", "∞")

    return show


def format_bytes(value: float) -> str:
    """Bytes with a binary unit: `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"


def format_perplexity(value: float) -> str:
    """A perplexity: two decimals below 1000, then whole, then in powers of ten."""
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"


def format_percent(value: float) -> str:
    """A share as a percentage: `12.5%`."""
    return f"{100 * value:.1f}%"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _four_places(value: float) -> str:
    return f"{value:.4f}"


def _column(key: str, title: str, write: Callable[[float], str] | None, meaning: str) -> Column:
    """A column of the values under `key`; `write` is None for text."""
    return Column(title, lambda row: row.get(key), _number(write) if write else str, meaning)


RESULT_COLUMNS = [
    Column(
        "Row",
        lambda row: row.get("label", row["name"]),
        str,
        "What was measured; “full” is the uncompressed cache that every other row is compared with.",
    ),
    _column(
        "run",
        "Run",
        None,
        "Which result file the row comes from; the Environment section lists it under the same number.",
    ),
    Column(
        "Kept",
        kept,
        _number(format_percent),
        "Bytes held as a share of what the full cache holds for the same tokens.",
    ),
    _column(
        "bytes_per_token",
        "Bytes/token",
        format_bytes,
        "Cache bytes that each further token costs, summed over all layers.",
    ),
    _column(
        "bytes_planned",
        "Planned bytes/token",
        format_bytes,
        "What lowkey plan counted for the length that it planned for, in the layers that can be compressed.",
    ),
    _column(
        "perplexity",
        "Perplexity",
        format_perplexity,
        "Exponential of the mean loss per token of the text; lower is better. Behind ±: half of the 95 % "
        "interval over windows of text.",
    ),
    _column(
        "perplexity_decode",
        "Perplexity, decode",
        format_perplexity,
        "The same over decoded tokens only, whose every predecessor is read back from the compressed cache.",
    ),
    _column(
        "kl",
        "KL",
        _three_digits,
        "Mean Kullback-Leibler divergence of this row's next-token distribution from the full model's, in "
        "nats; 0 is identical.",
    ),
    _column(
        "kl_decode",
        "KL, decode",
        _three_digits,
        "The same over decoded tokens only, whose every predecessor is read back from the compressed cache.",
    ),
    _column(
        "top1_agreement",
        "Top-1",
        format_percent,
        "How often the most likely next token is the one the full model finds most likely.",
    ),
    _column(
        "layer_error",
        "Layer error",
        _three_digits,
        "Relative error of the decoder layer outputs against the full cache, in the mean over tokens and "
        "layers; 0 is identical.",
    ),
    _column(
        "layer_cosine",
        "Layer cosine",
        _four_places,
        "Cosine between those outputs and the full cache's; 1 is identical.",
    ),
    _column(
        "exact_match",
        "Exact match",
        format_percent,
        "Share of 1-hop recall questions whose answer is reproduced exactly; in brackets where the full "
        "cache fails itself.",
    ),
    _column(
        "recall_kept",
        "Recall kept",
        format_percent,
        "Bytes held, question included, when those answers were begun.",
    ),
    Column(
        "Questions",
        lambda row: None if row.get("questions") is None else row,
        lambda row: f"{row.get('questions_right')} of {row.get('questions_of')}",
        "Of the questions that the full cache answers, those answered here too; in brackets where these are "
        "too few.",
    ),
    _column(
        "questions_kept",
        "Questions kept",
        format_percent,
        "Bytes held, question included, when those answers were begun.",
    ),
    _column(
        "behaviour",
        "Behaviour",
        format_percent,
        "Share of instructions that are followed: several in one prompt, a system prompt, facts of earlier "
        "turns, a secret. The row of the full cache is the ceiling.",
    ),
    _column(
        "behaviour_same",
        "Behaviour, same",
        format_percent,
        "Of the instructions that the full cache follows, those followed here too.",
    ),
    _column(
        "behaviour_kept",
        "Behaviour kept",
        format_percent,
        "Bytes held, question included, when those answers were begun.",
    ),
    _column(
        "prefill_ms",
        "Prefill ms",
        _three_digits,
        "Milliseconds to read the prompt; timings are only comparable inside one run.",
    ),
    _column(
        "step_ms",
        "Step ms",
        _three_digits,
        "Milliseconds per decoded token; timings are only comparable inside one run.",
    ),
    _column(
        "bytes_held",
        "Bytes held",
        format_bytes,
        "Bytes really allocated: every distinct tensor storage in the cache, counted once.",
    ),
    _column(
        "bytes_predicted",
        "Bytes predicted",
        format_bytes,
        "What the plan said it would hold; it should equal the bytes held.",
    ),
    _column("bytes_full", "Bytes full", format_bytes, "What the full cache holds for the same tokens."),
    _column("method", "Method", None, "The conversion that chose the low-rank bases."),
    Column(
        "Policy", score_words, str, "The eviction rule that scored which tokens stay, with its parameters."
    ),
    Column(
        "Allocator",
        allocator_words,
        str,
        "How the policy's budget was split over layers and heads, with its parameters.",
    ),
    Column(
        "Axes",
        lambda row: " + ".join(map(str, axes)) if isinstance(axes := row.get("axes"), list) else None,
        str,
        "What is smaller than in the full cache: rank, bits or tokens.",
    ),
    _column("budget", "Budget", None, "What was asked to be kept; “kept” is what was really held."),
    _column(
        "bits", "Bits", _three_digits, "Bits per stored number; a dash means the model's own number format."
    ),
    _column(
        "sinks", "Sinks", _three_digits, "First tokens of the text that are kept exact, counted in the bytes."
    ),
    _column("recent", "Recent", _three_digits, "Last tokens that are kept exact, counted in the bytes."),
    _column("layout", "Layout", None, "How the cache layers store what is kept."),
    _column("task", "Task", None, "The tasks that the row was measured on."),
    _column("plan", "Plan", None, "Where the plan was read from."),
]


def shown_columns(rows: list[Row], several: bool) -> list[Column]:
    """Columns in which some row has a value; the run only if there are `several`."""
    return [
        c
        for c in RESULT_COLUMNS
        if any(c.read(row) is not None for row in rows) and (several or c.title != "Run")
    ]


# The field that says whether a column's number is evidence; if it is not, the number stands in brackets.
EVIDENCE = {"Exact match": "recall_evidence", "Questions": "questions_evidence"}


def show(column: Column, row: Row) -> str:
    """The text of one cell: the value with its interval, in brackets where it is no evidence, or a dash."""
    value, half = column.read(row), measured(row, HALVES.get(column.title, ""))
    if value is None:
        return DASH
    text = column.write(value) + ("" if half is None else f" ± {column.write(half)}")
    return f"({text})" if row.get(EVIDENCE.get(column.title, "")) is False else text
