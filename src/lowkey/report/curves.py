"""Quality of eviction policies against the bytes that they really hold: a line per policy, or dots if each
policy was measured at one budget only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from lowkey.report.columns import format_percent
from lowkey.report.drawing import (
    FIGURE_WIDTH,
    INK,
    MARKERS,
    MUTED,
    SERIES,
    SURFACE,
    is_wide,
    plain_log,
    quality_scale,
    style,
)
from lowkey.report.labels import Label, place_labels, shortened
from lowkey.report.policies import Line, policy_lines, references, share
from lowkey.report.results import Row, full_row, is_full, measured

QUALITIES = [  # (key, title, whether more is better)
    ("exact_match", "Recall, exact match", True),
    ("perplexity", "Perplexity", False),
    ("kl", "KL divergence (nats)", False),
    ("kl_decode", "KL divergence of decoded tokens (nats)", False),
]
LONGEST_CURVE_NAME = 44  # characters of a name in the legend or beside dots
Quality = tuple[str, str, bool]
DASHED = (0, (4, 3))


def curve_qualities(rows: Sequence[Row]) -> list[Quality]:
    """The qualities that some policy row with a known share was measured on."""
    lines = policy_lines(rows)
    return [
        q for q in QUALITIES if any(measured(row, q[0]) is not None for line in lines for row in line.rows)
    ]


def curves_figure(rows: Sequence[Row]) -> Figure:
    """One panel per quality.

    Args:
        rows: rows of one model on one text.

    Returns:
        Lines if some policy has several budgets. Otherwise dots, row below row, since on a line plot they
        would all stand at one place.
    """
    lines, qualities = policy_lines(rows), curve_qualities(rows)
    draw = _curves if any(len(line.rows) > 1 for line in lines) else _dots
    return draw(lines, references(rows), qualities)


def _line_styles(count: int) -> list[dict[str, Any]]:
    """Colour and marker of each line. Neighbours differ in both, and 36 lines all differ."""
    size = len(SERIES)
    # Each round through the colours shifts the markers by one, so that no pair occurs twice.
    styles = [(SERIES[i % size], MARKERS[(i + i // size) % len(MARKERS)]) for i in range(count)]
    return [
        {"color": colour, "marker": marker, "ms": 7, "mec": SURFACE, "mew": 0.8} for colour, marker in styles
    ]


def _reference_style(row: Row) -> dict[str, Any]:
    """Colour and marker of a row that policies are compared with."""
    return {
        "color": INK if is_full(row) else MUTED,
        "marker": "o" if is_full(row) else "X",
        "ms": 7,
        "mec": SURFACE,
        "mew": 0.8,
        "ls": "",
    }


def _curves(lines: list[Line], others: list[Row], qualities: list[Quality]) -> Figure:
    """Lines over the share of the full cache's bytes, with a legend below."""
    columns, styles = _legend_columns(lines), _line_styles(len(lines))
    shares = [share(row) or 0.0 for row in [*others, *(row for line in lines for row in line.rows)]]
    below = 0.25 * math.ceil(len(lines) / columns) + 0.6  # inches for the axis title and the legend
    height = 3.6 + below
    figure = Figure(figsize=(FIGURE_WIDTH, height), facecolor="white")
    figure.subplots_adjust(left=0.05, right=0.99, top=1 - 0.35 / height, bottom=below / height, wspace=0.17)
    for place, quality in enumerate(qualities, start=1):
        ax = figure.add_subplot(1, len(qualities), place)
        style(ax, title=_title(quality, ", "), x="Share of the full cache's bytes")
        _share_scale(ax, shares)
        _curve_panel(ax, lines, others, quality[0], styles)
    _legend(figure, [line.label for line in lines], styles, columns)
    return figure


def _title(quality: Quality, between: str) -> str:
    """Title of a panel; `between` separates the name from the better direction."""
    return f"{quality[1]}{between}{'higher' if quality[2] else 'lower'} is better"


def _curve_panel(ax: Axes, lines: list[Line], others: list[Row], key: str, styles: list[dict]) -> None:
    """Draw the lines of one quality, the rows they are compared with, and labels of these."""
    curves = [[point for row in line.rows if (point := _point(row, key))] for line in lines]
    # Several runs have the same full cache: equal points of one name are drawn once, as the first of them.
    marks_by_place: dict[tuple, tuple[Row, tuple[float, float]]] = {}
    for row in others:
        if point := _point(row, key):
            marks_by_place.setdefault((row["name"], point), (row, point))
    marks = list(marks_by_place.values())
    drawn = [point for curve in curves for point in curve]
    is_log = key != "exact_match" and is_wide([y for _, y in drawn], 2)
    # The full cache's KL of 0 has no place on a log scale.
    marks = [(row, point) for row, point in marks if not is_log or point[1] > 0]
    _value_scale(ax, [y for _, y in drawn] + [y for _, (_, y) in marks], key, is_log)
    _full_line(ax.axhline, [row for row, _ in marks], key)
    for curve, line_style in zip(curves, styles, strict=True):
        ax.plot(*zip(*curve, strict=True) if curve else ([], []), lw=1.3, zorder=3, **line_style)
    for row, point in marks:
        ax.plot(*point, zorder=4, **_reference_style(row))
    place_labels(
        ax,
        [
            Label(*point, str(row.get("label", row["name"])), INK if is_full(row) else MUTED)
            for row, point in marks
        ],
    )


def _point(row: Row, key: str) -> tuple[float, float] | None:
    """(share, quality) of a row, or None if one of them is unknown."""
    x, y = share(row), measured(row, key)
    return None if x is None or y is None else (x, y)


def _full_line(draw: Callable, rows: list[Row], key: str) -> None:
    """Draw a dashed line at the full cache's value."""
    full = full_row(rows)
    value = measured(full, key) if full else None
    if value is not None:
        draw(value, color=INK, lw=1.0, ls=DASHED, alpha=0.7, zorder=2)


def _share_scale(ax: Axes, shares: list[float]) -> None:
    """Scale of shares: logarithmic where they differ by more than ten times; with room for a label on the
    right.
    """
    low, high = min(shares), max(shares)
    if is_wide(shares, 10):
        ax.set_xscale("log")
        ax.set_xlim(low / (high / low) ** 0.06, high * (high / low) ** 0.1)
        plain_log(ax.xaxis)
    else:
        ax.set_xlim(0, 1.14 * high)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))


def _value_scale(ax: Axes, values: list[float], key: str, is_log: bool, side: str = "y") -> None:
    """Scale of a quality: perplexity and KL over what was measured, a share of right answers always from 0 to
    1, because it has a meaning by itself.
    """
    if key == "exact_match":
        ax.set(**{f"{side}lim": (min(-0.04, 1.05 * min(values)), max(1.06, 1.05 * max(values)))})
        getattr(ax, f"{side}axis").set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    else:
        quality_scale(ax, values, is_log, side)


def _legend_columns(lines: list[Line]) -> int:
    """Number of columns of the legend, so that the longest name fits."""
    widest = 0.45 + 0.075 * max(len(shortened(line.label, LONGEST_CURVE_NAME)) for line in lines)  # inches
    return max(1, min(len(lines), int(0.94 * FIGURE_WIDTH / widest)))


def _legend(figure: Figure, labels: list[str], styles: list[dict], columns: int) -> None:
    """The legend below the panels."""
    handles = [Line2D([], [], lw=1.3, **line_style) for line_style in styles]
    legend = figure.legend(
        *(handles, ["line"] * len(handles)),
        loc="lower left",
        bbox_to_anchor=(0.04, 0),
        ncols=columns,
        frameon=False,
        fontsize=9,
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set(parse_math=False, text=shortened(label, LONGEST_CURVE_NAME), color=INK)


def _dots(lines: list[Line], others: list[Row], qualities: list[Quality]) -> Figure:
    """One line of dots per row, the best of the first quality on top, rows of comparison at the bottom."""
    styles = _line_styles(len(lines))
    entries = [(line.rows[0], line_style) for line, line_style in zip(lines, styles, strict=True)]
    entries = sorted(entries, key=lambda entry: _rank(entry[0], qualities[0])) + [
        (row, _reference_style(row)) for row in others
    ]
    figure = Figure(
        figsize=(FIGURE_WIDTH, 0.75 + 0.3 * len(entries)), facecolor="white", layout="constrained"
    )
    axes = figure.subplots(1, len(qualities), sharey=True, squeeze=False)[0]
    for ax, quality in zip(axes, qualities, strict=True):
        style(ax, title=_title(quality, "\n"))
        _dot_panel(ax, entries, quality[0])
    _names(axes[0], [row for row, _ in entries])
    return figure


def _rank(row: Row, quality: Quality) -> float:
    """Sorting key of a row: the better the quality, the lower; rows without it come last."""
    value = measured(row, quality[0])
    return math.inf if value is None else -value if quality[2] else value


def _dot_panel(ax: Axes, entries: list[tuple[Row, dict]], key: str) -> None:
    """Draw the dots of one quality."""
    dots = [
        (place, row, value, line_style)
        for place, (row, line_style) in enumerate(entries)
        if (value := measured(row, key)) is not None
    ]
    is_log = key != "exact_match" and is_wide([value for _, row, value, _ in dots if not is_full(row)], 2)
    dots = [dot for dot in dots if not is_log or dot[2] > 0]
    _value_scale(ax, [value for _, _, value, _ in dots], key, is_log, "x")
    _full_line(ax.axvline, [row for _, row, *_ in dots], key)
    for place, _, value, line_style in dots:
        ax.plot(value, place, zorder=3, **{**line_style, "ls": ""})


def _names(ax: Axes, rows: list[Row]) -> None:
    """Write names at the left of the first panel."""
    ax.set_yticks(range(len(rows)), [""] * len(rows))
    ax.set_ylim(len(rows) - 0.4, -0.6)
    for place, row in enumerate(rows):
        name = shortened(str(row.get("label", row["name"])), LONGEST_CURVE_NAME)
        text = f"{name} ({format_percent(share(row) or 0.0)} held)"
        ax.text(
            -0.02,
            place,
            text,
            transform=ax.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=9,
            color=INK,
            parse_math=False,
        )
