"""Tasks of lm-eval in a result: a line for each task, metric and row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from lowkey.report.columns import DASH, format_bytes, format_percent
from lowkey.report.template import TABLE

RowFields = Mapping[str, Any]


class TaskScore(NamedTuple):
    """A metric of one task and row.

    Args:
        task: name of the task.
        row: name of the row.
        metric: name of the metric.
        value: the metric.
        half: half of its 95 % interval, or None.
        difference: the difference from the full cache with the ends of its paired 95 % interval, or None.
        better: documents that do better than with the full cache, and worse; None if nobody can say.
        took: what the requests took.
    """

    task: str
    row: str
    metric: str
    value: float
    half: float | None
    difference: tuple[float, float, float] | None
    better: tuple[int, int] | None
    took: Mapping[str, Any]


def task_scores(rows: Sequence[RowFields]) -> list[TaskScore]:
    """The scores of all rows, task by task; the first row is the one that others are compared with.

    Args:
        rows: of a result.
    """
    found = [(row, tasks) for row in rows if isinstance(tasks := row.get("harness"), dict)]
    names = dict.fromkeys(task for _, tasks in found for task in tasks)
    first = found[0][1] if found else {}
    return [
        score
        for task in names
        for row, tasks in found
        if task in tasks
        for score in _scores(task, row, tasks[task], first.get(task, {}))
    ]


def _scores(
    task: str, row: RowFields, own: Mapping[str, Any], first: Mapping[str, Any]
) -> Iterator[TaskScore]:
    """The scores of one task and row."""
    for metric, score in own["metrics"].items():
        difference, values = score.get("difference"), score.get("values")
        others = first.get("metrics", {}).get(metric, {}).get("values")
        better = None
        if own is not first and values and others and len(values) == len(others):
            sign = -1 if score.get("higher_is_better") is False else 1
            apart = [sign * (a - b) for a, b in zip(values, others, strict=True)]
            better = (sum(d > 0 for d in apart), sum(d < 0 for d in apart))
        yield TaskScore(
            task,
            str(row.get("label") or row["name"]),
            metric,
            score["value"],
            score.get("half_95"),
            None if own is first or difference is None else tuple(difference),
            better,
            own,
        )


def write_value(value: float | None) -> str:
    """A number with four digits; a dash for None."""
    return DASH if value is None else f"{value:.4g}" if math.isfinite(value) else str(value)


def write_difference(score: TaskScore) -> str:
    """The difference from the full cache with its interval; a dash for the full cache itself."""
    if score.difference is None:
        return DASH
    mean, low, high = score.difference
    return f"{mean:+.4g} [{low:+.4g}, {high:+.4g}]"


def _took(name: str, write: Callable[[float], str]) -> Callable[[TaskScore], str]:
    def show(score: TaskScore) -> str:
        value = score.took.get(name)
        return DASH if value is None else write(value)

    return show


def _whole(value: float) -> str:
    return f"{value:,.0f}"


# heading: (what a cell says, what it means)
TASK_COLUMNS: dict[str, tuple[Callable[[TaskScore], str], str]] = {
    "Task": (lambda s: s.task, "The task of lm-eval."),
    "RowFields": (lambda s: s.row, "What was measured; “full” is the uncompressed cache."),
    "Metric": (lambda s: s.metric, "The task's own metric, with lm-eval's filter if it has one."),
    "Value": (
        lambda s: write_value(s.value) + ("" if s.half is None else f" ± {s.half:.2g}"),
        "Behind ±: half of the 95 % interval over documents.",
    ),
    "Difference": (
        write_difference,
        "The mean difference from the full cache over the same documents, with its 95 % interval by a paired "
        "bootstrap.",
    ),
    "Better / worse": (
        lambda s: DASH if s.better is None else f"{s.better[0]} / {s.better[1]}",
        "Documents that do better, and worse, than over the full cache.",
    ),
    "Documents": (_took("documents", _whole), "Documents of the task that were measured."),
    "Context": (_took("context_tokens", _whole), "Tokens that were compressed, in the mean over requests."),
    "Question": (_took("question_tokens", _whole), "Tokens that were read over the compressed context."),
    "Written": (_took("output_tokens", _whole), "Tokens of the answer or of the scored continuation."),
    "Kept bytes": (_took("kept_bytes", format_bytes), "Bytes of the compressed context."),
    "Kept bytes/token": (_took("kept_bytes_per_token", format_bytes), "The same for each token of it."),
    "Over length": (
        _took("over_length", format_percent),
        "Requests of which tokens were cut off, since the model has not so many positions.",
    ),
    "Protocol": (
        lambda s: str(s.took.get("protocol", DASH)),
        "When the question was known. ask-after: the context was compressed first. ask-with: it was "
        "compressed with the question. decoding: nothing stood before the question. rolling: a text was "
        "scored whole.",
    ),
}
TEXT = ("Task", "RowFields", "Metric", "Protocol")


def harness_table(rows: Sequence[RowFields]) -> str:
    """The table of all tasks as HTML; empty if no row has any."""
    scores = task_scores(rows)
    if not scores:
        return ""
    head = "".join(
        f'<th scope="col"{_class(name)} title="{escape(meaning)}">{name}</th>'
        for name, (_, meaning) in TASK_COLUMNS.items()
    )
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{_class(name)}>{escape(show(s))}</td>" for name, (show, _) in TASK_COLUMNS.items())
        + "</tr>"
        for s in scores
    )
    return TABLE.substitute(
        caption="Tasks of lm-eval, each with its difference from the full cache", head=head, body=body
    )


def _class(name: str) -> str:
    return ' class="text"' if name in TEXT else ""
