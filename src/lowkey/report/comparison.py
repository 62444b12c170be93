"""The page that compares settings, of one or of several result files: who is better, by how much, and whether
the samples can tell.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from itertools import count

from lowkey.core.errors import LowkeyError
from lowkey.report.columns import DASH, format_percent
from lowkey.report.measures import ComparedQuality, Duel, duels, frontier, measures
from lowkey.report.page import environments, figure_html
from lowkey.report.results import Row, Section, data_of, section_of
from lowkey.report.scatter import comparison_figure
from lowkey.report.template import COMPARISON_GUIDE, PAGE, SORTING, STYLE, TABLE

TIMES = ("prefill_ms", "step_ms", "task")  # of two measurements of the same setting they may differ
# The class of a cell and the mark in it, by the verdict of a duel.
VERDICTS = {
    1: ("better", "\N{BLACK UP-POINTING TRIANGLE}"),
    0: ("even", "="),
    -1: ("worse", "\N{BLACK DOWN-POINTING TRIANGLE}"),
}
FULL_CLASS, TEXT_CLASS = ' class="full"', ' class="text"'  # of the full cache's row, and of columns of text
NAMING = ("name", "sha256", "texts", "tasks")  # of the data; they say which text it is, in other words


def render_comparison(results: Sequence[dict], links: Sequence[str]) -> str:
    """The whole page. The same results give the same bytes.

    Args:
        results: the results.
        links: where each of them can be read, relative to the page.

    Raises:
        LowkeyError: there are no results, or nothing in them can be compared.
    """
    if not results:
        raise LowkeyError("results []: a comparison needs at least one; give a file that lowkey eval wrote")
    groups: dict[str, list[int]] = {}
    for number, result in enumerate(results):
        alike = json.dumps([result["model"], _measured_on(result)], sort_keys=True)
        groups.setdefault(alike, []).append(number)
    parts = [section_of(_without_repeats(results, numbers), numbers) for numbers in groups.values()]
    titles = _titles(results, [numbers[0] for numbers in groups.values()])
    compared = [(part, title, measures(part.rows)) for part, title in zip(parts, titles, strict=True)]
    if not any(found for *_, found in compared):
        raise LowkeyError(
            "results: hold no two settings that were measured on the same; give files with several rows"
        )
    numbers, names = count(1), [link.rsplit("/", 1)[-1] for link in links]
    policy = base64.b64encode(hashlib.sha256(SORTING.encode()).digest()).decode()
    return PAGE.substitute(
        title=escape("KV caches compared: " + ", ".join(dict.fromkeys(part.model for part in parts))),
        style=STYLE,
        scripts=f"; script-src 'sha256-{policy}'",
        summary=_lead(results, titles, links, names),
        sections="\n".join(
            _section(part, title, found, next(numbers), links, names) for part, title, found in compared
        ),
        environment=environments(results),
        guide=COMPARISON_GUIDE,
        end=f"<script>{SORTING}</script>\n",
    )


def _measured_on(result: dict) -> dict:
    """What rows must have in common to be compared: text, windows, cases, protocol and the like.

    Tasks of a harness are compared one by one, so which others a file holds does not matter.
    """
    data = data_of(result)
    harness = "tasks" in data
    return {
        key: value for key, value in data.items() if key not in NAMING or (key == "sha256" and not harness)
    }


def _without_repeats(results: Sequence[dict], numbers: Sequence[int]) -> list[dict]:
    """Results in which each row is left out that an earlier one of `numbers` has with the same numbers."""
    seen, found = set[str](), list(results)
    for number in numbers:
        rows = []
        for row in results[number]["rows"]:
            said = json.dumps({k: v for k, v in row.items() if k not in TIMES}, sort_keys=True)
            if said not in seen:
                rows.append(row)
            seen.add(said)
        found[number] = {**results[number], "rows": rows}
    return found


def _titles(results: Sequence[dict], firsts: Sequence[int]) -> list[str]:
    """The title of each section: its model and text, and what else distinguishes it from others."""
    data = [_measured_on(results[i]) for i in firsts]
    keys = [
        k for k in dict.fromkeys(k for d in data for k in d) if len({json.dumps(d.get(k)) for d in data}) > 1
    ]
    names = [f"{results[i]['model']} on {data_of(results[i]).get('name') or 'unnamed text'}" for i in firsts]
    if len(set(names)) == len(names):
        return names
    more = [", ".join(f"{k} {d.get(k)}" for k in keys if k != "sha256") for d in data]
    return [f"{name} ({words})" if words else name for name, words in zip(names, more, strict=True)]


def _lead(results: Sequence[dict], titles: Sequence[str], links: Sequence[str], names: Sequence[str]) -> str:
    """What is compared, with links to the files."""
    files = ", ".join(_link(links[i], names[i]) for i in range(len(results)))
    lines = [f'<p class="lead">Compared: {files}</p>']
    if len(titles) > 1:
        lines.append(
            '<p class="warning" role="note">These files were not all measured alike, so numbers are compared '
            f"within a section only: {escape('; '.join(titles))}.</p>"
        )
    return "\n".join(lines)


def _link(place: str, name: str) -> str:
    return f'<a href="{escape(place)}">{escape(name)}</a>'


def _section(
    part: Section,
    title: str,
    found: Sequence[ComparedQuality],
    number: int,
    links: Sequence[str],
    names: Sequence[str],
) -> str:
    """Rows that were measured alike: the figure, and each measure with its tables."""
    anchor = f"section-{number}"
    parts = [f'<section aria-labelledby="{anchor}">', f'<h2 id="{anchor}">{escape(title)}</h2>']
    if not found:
        parts.append("<p>Only one setting was measured, so there is nothing to compare.</p>")
    if any(score.kept is not None for measure in found for score in measure.scores.values()):
        parts.append(_figure(part.rows, found, f"figure{number}"))
    files = {row["label"]: row["run"] - 1 for row in part.rows}
    for measure in found:
        pairs = duels(measure)
        parts += [f"<h3>{escape(measure.title)}</h3>", f"<p>{escape(_verdict(measure, pairs))}</p>"]
        parts.append(_scores_table(measure, pairs, {k: _link(links[i], names[i]) for k, i in files.items()}))
        if pairs:
            parts.append(_pairs_table(measure, pairs))
    return "\n".join([*parts, "</section>"])


def _figure(rows: Sequence[Row], found: Sequence[ComparedQuality], prefix: str) -> str:
    """Quality against bytes, with the frontier."""
    spoken = []
    for measure in found:
        best = [(label, measure.scores[label]) for label in frontier(measure)]
        told = (f"{x} keeps {format_percent(s.kept or 0.0)}, {measure.write(s.value)}" for x, s in best)
        spoken.append(f"{measure.title}: {'; '.join(told)}")
    caption = (
        "Quality against the bytes held, as a share of the full cache's. The broad line joins the "
        "settings that no other one beats in both; settings that differ only in budget share a colour. The "
        "dashed line is the full cache."
    )
    label = "Quality against bytes held. On the frontier: " + ". ".join(spoken)
    return figure_html(comparison_figure(rows, found), prefix, label, caption)


def _verdict(measure: ComparedQuality, pairs: dict[tuple[str, str], Duel]) -> str:
    """The smallest cache that the samples cannot tell from the full one, in a sentence."""
    better = "Higher is better. " if measure.higher else "Lower is better. "
    full = measure.full
    known = [x for x in measure.scores if (x, full) in pairs]
    if full is None or not known:
        return better + "The files hold no outcomes of single samples to compare with the full cache."
    count = len(measure.scores[full].samples or ())
    fine = [x for x in known if pairs[x, full].verdict >= 0 and measure.scores[x].kept is not None]
    if not fine:
        return f"{better}On these {count} samples every other setting is worse than the full cache."
    best = min(fine, key=lambda x: measure.scores[x].kept or 0.0)
    share = format_percent(measure.scores[best].kept or 0.0)
    return (
        f"{better}The smallest cache that is not measurably worse than the full one on these {count} "
        f"samples: {best}, with {share} of the bytes."
    )


def _scores_table(measure: ComparedQuality, pairs: dict[tuple[str, str], Duel], files: dict[str, str]) -> str:
    """One row for each setting: its score, and how it differs from the full cache."""
    unit = "points" if measure.write is format_percent else "nats" if "erplexity" in measure.title else ""
    against = f"Against full{f', {unit}' if unit else ''}"
    head = _heads(["Setting", "Kept", "Score", "\N{PLUS-MINUS SIGN}", against, "95 % interval"], 1)
    head += _heads(["Better", "Worse", "Samples"]) + '<th scope="col" class="text">File</th>'
    body, on_frontier = [], set(frontier(measure))
    for label, score in measure.scores.items():
        duel = pairs.get((label, measure.full or ""))
        mark = VERDICTS[duel.verdict] if duel else ("", "")
        value = measure.write(score.value)
        star = " \N{BLACK STAR}" if label in on_frontier else ""
        cells = [
            f'<th scope="row">{escape(label)}{star}</th>',
            _cell(None if score.kept is None else format_percent(score.kept), score.kept),
            _cell(value if score.evidence else f"({value})", score.value),
            _cell(None if score.half is None else measure.write(score.half), score.half),
            _cell(duel and f"{mark[1]} {measure.difference(duel.mean)}", duel and duel.mean, mark[0]),
            _cell(
                duel and f"{measure.difference(duel.low)} to {measure.difference(duel.high)}",
                duel and duel.low,
            ),
            _cell(duel and str(duel.wins), duel and duel.wins),
            _cell(duel and str(duel.losses), duel and duel.losses),
            _cell(str(len(score.samples)) if score.samples else None, len(score.samples or ())),
            f'<td class="text">{files[label]}</td>',
        ]
        body.append(f"<tr{FULL_CLASS if label == measure.full else ''}>{''.join(cells)}</tr>")
    caption = f"{measure.title}: every setting, and its difference from the full cache over the same samples"
    return TABLE.substitute(caption=escape(caption), head=head, body="\n".join(body))


def _pairs_table(measure: ComparedQuality, pairs: dict[tuple[str, str], Duel]) -> str:
    """Every setting against every other: samples won and lost."""
    labels = [x for x in measure.scores if any(x == a for a, _ in pairs)]
    head = _heads(["Setting", *labels], 1)
    body = []
    for a in labels:
        cells = [f'<th scope="row">{escape(a)}</th>']
        for b in labels:
            duel = pairs.get((a, b))
            if duel is None:
                cells.append(_cell(None, None))
                continue
            name, mark = VERDICTS[duel.verdict]
            mean, low, high = map(measure.difference, (duel.mean, duel.low, duel.high))
            told = f"{mean} ({low} to {high})"
            cells.append(_cell(f"{mark} {duel.wins}:{duel.losses}", duel.wins - duel.losses, name, told))
        body.append(f"<tr{FULL_CLASS if a == measure.full else ''}>{''.join(cells)}</tr>")
    caption = (
        f"{measure.title}: samples that the setting of the row wins and loses against that of the column"
    )
    table = TABLE.substitute(caption=escape(caption), head=head, body="\n".join(body))
    return f"<details>\n<summary>Every setting against every other</summary>\n{table}</details>"


def _heads(titles: Sequence[str], texts: int = 0) -> str:
    """Headings of columns, of which the first `texts` are of text."""
    return "".join(
        f'<th scope="col"{TEXT_CLASS if i < texts else ""}>{escape(title)}</th>'
        for i, title in enumerate(titles)
    )


def _cell(text: str | None, value: float | None, kind: str = "", told: str = "") -> str:
    """One cell; `value` is what it is sorted by, and `told` appears under the pointer."""
    given = {"data-value": "" if value is None or text is None else repr(value), "class": kind, "title": told}
    words = "".join(f' {name}="{escape(x)}"' for name, x in given.items() if x or name == "data-value")
    return f"<td{words}>{DASH if text is None else escape(text)}</td>"
