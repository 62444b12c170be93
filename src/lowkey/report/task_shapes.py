"""What the tasks of lm-eval in a row must look like."""

from __future__ import annotations


def harness_fits(tasks: object) -> bool:
    """Whether a row's tasks are null or have the shape that is drawn; a file may hold anything."""
    if tasks is None:
        return True
    if not isinstance(tasks, dict):
        return False
    return all(
        isinstance(task, dict)
        and isinstance(task.get("metrics"), dict)
        and all(_score_fits(score) for score in task["metrics"].values())
        and all(_number(task.get(name)) for name in (*_TOOK, "over_length"))
        for task in tasks.values()
    )


_TOOK = (
    "documents",
    "context_tokens",
    "question_tokens",
    "output_tokens",
    "kept_bytes",
    "kept_bytes_per_token",
)


def _score_fits(score: object) -> bool:
    return (
        isinstance(score, dict)
        and score.get("value") is not None
        and _number(score["value"])
        and _number(score.get("half_95"))
        and _numbers(score.get("difference"), 3)
        and _numbers(score.get("values"))
    )


def _number(value: object) -> bool:
    """Whether a value is null or a number that is not too large to draw; an infinite float is one, too."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return value is None
    return isinstance(value, float) or abs(value) < 1e100


def _numbers(values: object, count: int | None = None) -> bool:
    return values is None or (
        isinstance(values, list)
        and (count is None or len(values) == count)
        and all(value is not None and _number(value) for value in values)
    )
