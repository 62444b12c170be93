"""What settings are compared by: measures with the scores of all rows and their outcomes sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from lowkey.core.intervals import bootstrap_means, half_width, percentiles
from lowkey.report.columns import format_percent, format_perplexity
from lowkey.report.results import Row, is_full, kept, measured


class Reached(NamedTuple):
    """What one row reached.

    Args:
        value: the score.
        half: half of its 95 % interval, or None.
        samples: its outcomes, one for each sample; None if the file has none.
        kept: bytes held as a share of the full cache's, or None.
        evidence: whether the full cache solves the task itself.
    """

    value: float
    half: float | None
    samples: tuple[float, ...] | None
    kept: float | None
    evidence: bool = True


class ComparedQuality(NamedTuple):
    """One quality that rows were measured on.

    Args:
        title: its name.
        higher: whether more is better.
        write: a score as text.
        difference: a difference of outcomes as text.
        scores: by the label of the row, in the order of the rows.
        full: label of the row of the full cache, or None.
    """

    title: str
    higher: bool
    write: Callable[[float], str]
    difference: Callable[[float], str]
    scores: dict[str, Reached]
    full: str | None


class Duel(NamedTuple):
    """Two rows on the same samples.

    Args:
        mean: the mean difference, the first minus the second.
        low: the lower end of its 95 % interval.
        high: the upper end.
        wins: samples on which the first is better.
        losses: samples on which the second is better.
        verdict: 1 if the first is better, -1 if the second is, 0 if the interval holds 0.
    """

    mean: float
    low: float
    high: float
    wins: int
    losses: int
    verdict: int


class QualityKind(NamedTuple):
    """Where the scores of a measure of `lowkey eval` stand in a row.

    Args:
        key: field of the score.
        title: name of the measure.
        higher: whether more is better.
        samples: field of the outcomes, and the name of the sum that it holds, if it holds sums.
        kept: field of the bytes held, as a share; None for those after the prompt.
        evidence: field that says whether the full cache solves the task.
    """

    key: str
    title: str
    higher: bool
    samples: tuple[str, ...]
    kept: str | None = None
    evidence: str | None = None


# fmt: off
QUALITY_KINDS = (
    QualityKind("perplexity", "Perplexity", False, ("per_window", "nll")),
    QualityKind("kl", "KL divergence, nats per token", False, ("per_window", "kl")),
    QualityKind("perplexity_decode", "Perplexity of decoded tokens", False, ("per_window_decode", "nll")),
    QualityKind(
        "kl_decode", "KL divergence of decoded tokens, nats", False, ("per_window_decode", "kl"),
    ),
    QualityKind(
        "exact_match", "Recall, share of right answers", True, ("per_case",), "recall_kept",
        "recall_evidence",
    ),
    QualityKind(
        "questions", "Questions, share of right answers", True, ("per_question",), "questions_kept",
        "questions_evidence",
    ),
    QualityKind(
        "behaviour", "Behaviour, share of instructions followed", True, ("per_conversation",),
        "behaviour_kept", "behaviour_evidence",
    ),
)
# fmt: on


def measures(rows: Sequence[Row]) -> list[ComparedQuality]:
    """The measures that at least two rows have, with their scores.

    Args:
        rows: rows of one model that were measured alike, with labels that distinguish them.
    """
    found = [*(_of_kind(rows, kind) for kind in QUALITY_KINDS), *_of_tasks(rows)]
    return [measure for measure in found if len(measure.scores) > 1]


def _of_kind(rows: Sequence[Row], kind: QualityKind) -> ComparedQuality:
    """The scores of a measure of `lowkey eval`."""
    scores = {}
    for row in rows:
        if (value := measured(row, kind.key)) is None:
            continue
        samples = _samples(row, kind.samples)
        half = measured(row, f"{kind.key}_95")
        if half is None and samples and kind.higher:
            half = half_width(samples)
        share = kept(row) if kind.kept is None else measured(row, kind.kept)
        evidence = kind.evidence is None or row.get(kind.evidence) is not False
        scores[row["label"]] = Reached(value, half, samples, share, evidence)
    if kind.higher:
        return ComparedQuality(kind.title, True, format_percent, format_points, scores, _full(rows, scores))
    write = format_perplexity if kind.key.startswith("perplexity") else format_plain
    return ComparedQuality(kind.title, False, write, format_nats, scores, _full(rows, scores))


def _samples(row: Row, where: tuple[str, ...]) -> tuple[float, ...] | None:
    """The outcomes of single samples: numbers of a list, or sums of windows divided by their tokens."""
    field = row.get(where[0])
    if field is None:
        return None
    if len(where) == 1:
        return _finite(field)
    sums, tokens = field.get(where[1]), field.get("tokens")
    return (
        _finite(x and (x / n if n else None) for x, n in zip(sums, tokens, strict=True))
        if sums and tokens
        else None
    )


def _finite(values: Any) -> tuple[float, ...] | None:
    """Values as numbers; None if one of them is missing or not finite."""
    numbers = [np.nan if value is None else float(value) for value in values]
    return tuple(numbers) if numbers and np.isfinite(numbers).all() else None


def _of_tasks(rows: Sequence[Row]) -> Iterator[ComparedQuality]:
    """The scores of each metric of each task of a harness. Tasks with other documents are other tasks."""
    tasks = _distinct_tasks(rows)
    names = dict.fromkeys((name, metric) for _, name, task in tasks for metric in task["metrics"])
    fulls = {(row["run"], name): measured(task, "kept_bytes") for row, name, task in tasks if is_full(row)}
    for name, metric in names:
        own = [(row, task) for row, n, task in tasks if n == name and metric in task["metrics"]]
        scores = {}
        for row, task in own:
            score, held, whole = (
                task["metrics"][metric],
                measured(task, "kept_bytes"),
                fulls.get((row["run"], name)),
            )
            if (value := measured(score, "value")) is None:
                continue
            share = held / whole if held is not None and whole else None
            samples = _finite(score.get("values") or ())
            scores[row["label"]] = Reached(value, measured(score, "half_95"), samples, share)
        higher = all(task["metrics"][metric].get("higher_is_better") is not False for _, task in own)
        shares = higher and all(0 <= score.value <= 1 for score in scores.values())
        write, difference = (format_percent, format_points) if shares else (format_plain, format_nats)
        yield ComparedQuality(f"{name}, {metric}", higher, write, difference, scores, _full(rows, scores))


def _distinct_tasks(rows: Sequence[Row]) -> list[tuple[Row, str, dict]]:
    """The tasks of rows. Where tasks of one name have other documents, the name says which."""
    tasks = [(row, name, task) for row in rows for name, task in (row.get("harness") or {}).items()]
    known: dict[str, list[str]] = {}
    for _, name, task in tasks:
        digests, digest = known.setdefault(name, []), str(task.get("documents_sha256"))
        if digest not in digests:
            digests.append(digest)

    def named(name: str, task: dict) -> str:
        number, of = known[name].index(str(task.get("documents_sha256"))) + 1, len(known[name])
        return name if of == 1 else f"{name} (documents {number} of {of})"

    return [(row, named(name, task), task) for row, name, task in tasks]


def _full(rows: Sequence[Row], scores: dict[str, Reached]) -> str | None:
    """The label of the first full cache among scores, or None."""
    return next((row["label"] for row in rows if is_full(row) and row["label"] in scores), None)


def format_plain(value: float) -> str:
    """A number with three digits."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def format_nats(value: float) -> str:
    """A signed difference with three digits."""
    return "0" if value == 0 else f"{value:+.3g}".replace("-", "\N{MINUS SIGN}")


def format_points(value: float) -> str:
    """A signed difference of shares, in points."""
    points = round(100 * value, 1)
    return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}") if points else "0"


def duels(measure: ComparedQuality) -> dict[tuple[str, str], Duel]:
    """Every two rows that were measured on as many samples, in both orders, by a paired bootstrap."""
    groups: dict[int, list[str]] = {}
    for label, score in measure.scores.items():
        if score.samples is not None and len(score.samples) > 1:
            groups.setdefault(len(score.samples), []).append(label)
    found = {}
    for labels in groups.values():
        values = np.array([measure.scores[label].samples for label in labels]).T
        means = bootstrap_means(values)
        for i, j in combinations(range(len(labels)), 2):
            low, high = percentiles((means[:, i] - means[:, j]).tolist())
            difference = values[:, i] - values[:, j]
            more, less = int((difference > 0).sum()), int((difference < 0).sum())
            side = (int(low > 0) - int(high < 0)) * (1 if measure.higher else -1)
            wins, losses = (more, less) if measure.higher else (less, more)
            mean = float(difference.mean())
            found[labels[i], labels[j]] = Duel(mean, low, high, wins, losses, side)
            found[labels[j], labels[i]] = Duel(-mean, -high, -low, losses, wins, -side)
    return found


def frontier(measure: ComparedQuality) -> list[str]:
    """The labels of rows that no other row beats in both bytes and score, by their bytes."""
    known = [(s.kept, s.value, label) for label, s in measure.scores.items() if s.kept is not None]
    sign, best, found = (1 if measure.higher else -1), -np.inf, list[str]()
    for _, value, label in sorted(known, key=lambda point: (point[0], -sign * point[1])):
        if sign * value > best:
            best = sign * value
            found.append(label)
    return found
