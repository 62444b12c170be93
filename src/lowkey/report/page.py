"""From results to HTML. Everything that comes from a file is escaped on its way into the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import count
from typing import Any

from matplotlib.figure import Figure

from lowkey.core.errors import LowkeyError
from lowkey.report.columns import DASH, RESULT_COLUMNS, Column, show, shown_columns
from lowkey.report.curves import curve_qualities, curves_figure
from lowkey.report.frontier import frontier_figure, frontier_qualities, is_candidate
from lowkey.report.harness import harness_table
from lowkey.report.heads import heads_figure
from lowkey.report.plots import (
    error_surface_figure,
    quality_figure,
    quality_panels,
    ranks_figure,
    spectra_figure,
)
from lowkey.report.policies import by_budget, heads_words, is_policy, without_budget
from lowkey.report.results import Row, Section, is_full, sections
from lowkey.report.summary import held_differs, summary
from lowkey.report.svg import inline_svg
from lowkey.report.template import FIGURE, GUIDE, PAGE, STYLE, TABLE

TEXT_COLUMNS = {"Row", "Method", "Policy", "Allocator", "Budget", "Layout", "Task", "Plan", "Axes"}

REFEED = {
    True: "recall asks its question again over what a policy kept, so every token of the answer depends on "
    "that",
    False: "recall asks its question once, in the prompt; the first token of the answer saw all of it, "
    "whatever a policy kept",
}


def render(results: Sequence[dict]) -> str:
    """The whole page. The same results give the same bytes.

    Raises:
        LowkeyError: there are no results.
    """
    if not results:
        raise LowkeyError(
            "results []: a report needs at least one result; give a file that lowkey eval wrote"
        )
    # One counter numbers sections and figures through the whole page, so that ids are unique.
    parts, numbers = sections(results), count(1)
    return PAGE.substitute(
        title=escape("KV cache report: " + ", ".join(dict.fromkeys(part.model for part in parts))),
        style=STYLE,
        summary="\n".join(_lead(part, len(parts) > 1) for part in parts),
        sections="\n".join(_section(part, numbers) for part in parts),
        environment=environments(results),
        guide=_guide(parts),
        scripts="",
        end="",
    )


def environments(results: Sequence[dict]) -> str:
    """The environments of results, one after the other."""
    return "\n".join(_environment(result, n, len(results) > 1) for n, result in enumerate(results, start=1))


def _lead(part: Section, several: bool) -> str:
    """The sentence at the top about one section."""
    name = f"<strong>{escape(part.model)} on {escape(part.data)}.</strong> " if several else ""
    return f'<p class="lead">{name}{escape(summary(part.rows))}</p>'


def _section(part: Section, numbers: Iterator[int]) -> str:
    """One model on one text: figures, table, heat maps and calibration profiles."""
    differing = held_differs(part.rows)
    warning = f"Bytes held differ from bytes predicted in: {', '.join(differing)}."
    profiles = [row for row in part.rows if row.get("profile")]
    rest = part._replace(rows=[row for row in part.rows if not is_candidate(row)])
    anchor = f"section-{next(numbers)}"
    return "\n".join(
        [
            f'<section aria-labelledby="{anchor}">',
            f'<h2 id="{anchor}">{escape(part.model)} on {escape(part.data)}</h2>',
            f'<p class="warning" role="note">{escape(warning)}</p>' if differing else "",
            _frontier(part, numbers),
            _curves(rest, numbers),
            _quality(rest, numbers),
            _rows_table(part),
            harness_table(part.rows),
            *(
                _heads(budget, rows, numbers, place == 0)
                for place, (budget, rows) in enumerate(by_budget(part.rows).items())
            ),
            *(_profile(row, numbers, is_open=row is profiles[0]) for row in profiles),
            "</section>",
        ]
    )


def _frontier(part: Section, numbers: Iterator[int]) -> str:
    """Figure of what `lowkey plan` compared."""
    if not frontier_qualities(part.rows):
        return ""
    candidates = [row for row in part.rows if is_candidate(row)]
    columns = [
        c for c in RESULT_COLUMNS if c.title in ("Axes", "Planned bytes/token", "KL, decode", "Exact match")
    ]
    label = "What lowkey plan compared. " + "; ".join(_spoken(row, columns) for row in candidates)
    caption = (
        "What lowkey plan compared within one budget: quality against the bytes per token at the length that "
        "was planned for. Hollow points make a single axis smaller, full points several together."
    )
    return figure_html(frontier_figure(part.rows), f"figure{next(numbers)}", label, caption)


def _curves(part: Section, numbers: Iterator[int]) -> str:
    """Figure of the eviction policies. Their quality is judged against the share of bytes that they hold, so
    they have a figure of their own.
    """
    if not curve_qualities(part.rows):
        return ""
    columns = [c for c in RESULT_COLUMNS if c.title in ("Kept", "Exact match", "Perplexity", "KL")]
    label = "Quality of eviction policies against the share of the full cache that they hold. "
    caption = (
        "Eviction policies: quality against the bytes really held, as a share of the full cache's. The "
        "dashed line is the full cache."
    )
    spoken = "; ".join(_spoken(row, columns) for row in part.rows)
    return figure_html(curves_figure(part.rows), f"figure{next(numbers)}", label + spoken, caption)


def _quality(part: Section, numbers: Iterator[int]) -> str:
    """Figure of all other rows against bytes per token. It is left out where policies have a figure and no
    plan was measured: the full cache and packed integers stand in that figure too.
    """
    rows = [row for row in part.rows if not is_policy(row)]
    if not quality_panels(rows) or (
        curve_qualities(part.rows) and not any(row.get("method") for row in rows)
    ):
        return ""
    columns = [c for c in RESULT_COLUMNS if c.title in ("Bytes/token", "Perplexity", "KL", "Exact match")]
    label = "Quality against cache bytes per token. " + "; ".join(_spoken(row, columns) for row in rows)
    caption = (
        "Quality against cache bytes per token. The dashed line is the full cache; rows that differ only in "
        "budget share a line."
    )
    return figure_html(quality_figure(rows), f"figure{next(numbers)}", label, caption)


def _spoken(row: Row, columns: list[Column]) -> str:
    """A row's values in words, for readers who do not see the figure."""
    values = [f"{c.title} {show(c, row)}" for c in columns if c.read(row) is not None]
    return f"{row['label']}: {', '.join(values) or 'not measured'}"


def figure_html(figure: Figure, prefix: str, label: str, caption: str) -> str:
    """A figure as HTML.

    Args:
        figure: the figure.
        prefix: begins the ids inside its SVG.
        label: its content in words, for readers who do not see it.
        caption: the caption.
    """
    return FIGURE.substitute(
        svg=inline_svg(figure, prefix, label), caption=escape(caption), name=escape(caption)
    )


def _rows_table(part: Section) -> str:
    """The table of all rows of a section."""
    columns = shown_columns(part.rows, part.several)
    head = "".join(
        f'<th scope="col"{_class(c)} title="{escape(c.meaning)}">{escape(c.title)}</th>' for c in columns
    )
    body = "\n".join(
        f"<tr{_row_class(row)}>{''.join(_cell(c, row) for c in columns)}</tr>" for row in part.rows
    )
    caption = f"All rows of {part.model} on {part.data}: the full cache first, then by bytes per token"
    return TABLE.substitute(caption=escape(caption), head=head, body=body)


def _class(column: Column) -> str:
    """The HTML class of a column that holds text."""
    return ' class="text"' if column.title in TEXT_COLUMNS else ""


def _row_class(row: Row) -> str:
    """The HTML class of the full cache's row."""
    return ' class="full"' if is_full(row) else ""


def _cell(column: Column, row: Row) -> str:
    """One cell; a number that is written rounded has its exact value as title."""
    text, value = escape(show(column, row)), column.read(row)
    if column.title == "Row":
        return f'<th scope="row">{text}</th>'
    # The table rounds; the exact number appears under the pointer.
    exact = f' title="{escape(str(value))}"' if isinstance(value, int | float) else ""
    return f"<td{_class(column)}{exact}>{text}</td>"


def _heads(budget: str | None, rows: list[Row], numbers: Iterator[int], is_open: bool) -> str:
    """The heat maps of one budget. Those of the first budget are open, the others folded."""
    name = "Tokens kept per head" + (f" at {budget}" if budget else "")
    label = f"{name}. " + " ".join(f"{without_budget(row)}: {heads_words(row)}." for row in rows)
    caption = (
        "Tokens that each KV head holds after the prompt, on one colour scale; brighter is more, blank is no "
        "head."
    )
    figure = figure_html(heads_figure(rows), f"figure{next(numbers)}", label, caption)
    return f"<details{' open' if is_open else ''}>\n<summary>{escape(name)}</summary>\n{figure}</details>"


def _profile(row: Row, numbers: Iterator[int], is_open: bool) -> str:
    """Figures of one row's calibration. Those of the first row are open, the others folded."""
    profile, parts = row["profile"], []
    chosen = _chosen_label(profile)
    if profile.get("surface"):
        caption = (
            "Relative error of each layer's output for every pair of ranks, on one colour scale. The white "
            "dot is the chosen pair."
        )
        parts.append(
            figure_html(
                error_surface_figure(profile),
                f"figure{next(numbers)}",
                f"Heat maps of the error. {chosen}",
                caption,
            )
        )
    if profile.get("chosen"):
        caption = "Ranks that were chosen for keys and values, layer by layer."
        parts.append(
            figure_html(
                ranks_figure(profile),
                f"figure{next(numbers)}",
                f"Bars of the chosen ranks. {chosen}",
                caption,
            )
        )
    if any((profile.get("spectra") or {}).values()):
        caption = "How fast the energy of keys and values falls off; a steep curve needs few ranks."
        parts.append(
            figure_html(
                spectra_figure(profile),
                f"figure{next(numbers)}",
                "Energy spectra of keys and values by layer.",
                caption,
            )
        )
    head = f"<details{' open' if is_open else ''}>\n<summary>Ranks of {escape(str(row['label']))}</summary>\n"
    return head + "\n".join(parts) + "</details>" if parts else ""


def _chosen_label(profile: dict) -> str:
    """The chosen ranks in words."""
    pairs = zip(profile["layers"], profile.get("chosen") or [], strict=False)
    return " ".join(f"Layer {layer}: keys {_dash(k)}, values {_dash(v)}." for layer, (k, v) in pairs)


def _dash(value: Any) -> str:
    """A value as text, a dash for None."""
    return DASH if value is None else str(value)


def _environment(result: dict, number: int, several: bool) -> str:
    """The environment of one result as a list."""
    entries = _flat(result["environment"])
    head = f"<h3>Run {number}: {escape(str(result['model']))}</h3>\n" if several else ""
    lines = "\n".join(
        f"<dt>{escape(key)}</dt><dd>{escape(_dash(value) + _note(key, value))}</dd>" for key, value in entries
    )
    return f'{head}<dl class="environment">\n{lines}\n</dl>'


def _note(key: str, value: Any) -> str:
    """What a value of the environment means, where its name does not say so."""
    return f": {REFEED[value]}" if key.split()[-1:] == ["refeed"] and isinstance(value, bool) else ""


def _flat(entries: dict, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested objects as pairs with names such as `data sha256`."""
    pairs = [
        _flat(value, f"{prefix}{key} ") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
        for key, value in entries.items()
    ]
    return [pair for group in pairs for pair in group]


def _guide(parts: list[Section]) -> str:
    """A sentence about each column that some table of the page shows."""
    shown = {column.title for part in parts for column in shown_columns(part.rows, part.several)}
    lines = "\n".join(
        f"<dt>{escape(c.title)}</dt><dd>{escape(c.meaning)}</dd>" for c in RESULT_COLUMNS if c.title in shown
    )
    return f'<p class="guide">{escape(GUIDE)}</p>\n<dl>\n{lines}\n</dl>'
