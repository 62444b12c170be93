"""The figure of a comparison: quality against bytes, and the frontier of settings that no other one beats."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from lowkey.report.columns import format_percent
from lowkey.report.drawing import (
    FIGURE_WIDTH,
    INK,
    MARKERS,
    RULE,
    SERIES,
    SURFACE,
    is_wide,
    quality_scale,
    style,
)
from lowkey.report.labels import Label, place_labels, shortened
from lowkey.report.measures import ComparedQuality, frontier
from lowkey.report.policies import without_budget
from lowkey.report.results import Row, is_full

MOST_PANELS = 8
MOST_LABELS = 14  # points of a panel beyond which those off the frontier have no label
MOST_NAMES = 12  # of the legend


def comparison_figure(rows: Sequence[Row], found: Sequence[ComparedQuality]) -> Figure:
    """One panel for each of the first measures, two beside one another.

    Args:
        rows: the rows, with labels.
        found: the measures, with scores by those labels.
    """
    shown = [m for m in found if any(s.kept is not None for s in m.scores.values())][:MOST_PANELS]
    lines, names = math.ceil(len(shown) / 2), {row["label"]: without_budget(row) for row in rows}
    fulls = {row["label"] for row in rows if is_full(row)}
    groups = sorted({name for label, name in names.items() if label not in fulls})
    looks = {
        name: (SERIES[i % len(SERIES)], MARKERS[i // len(SERIES) % len(MARKERS)])
        for i, name in enumerate(groups)
    }
    columns = min(2, len(shown))
    height = 4.3 * lines + 0.24 * math.ceil(min(len(groups), MOST_NAMES) / 4) + 0.1
    figure = Figure(figsize=(FIGURE_WIDTH, height), facecolor="white")
    figure.subplots_adjust(
        left=0.065,
        right=0.985,
        top=1 - 0.35 / height,
        bottom=(height - 4.3 * lines + 0.5) / height,
        wspace=0.17,
        hspace=0.32,
    )
    for place, measure in enumerate(shown, start=1):
        ax = figure.add_subplot(lines, columns, place)
        better = "higher is better" if measure.higher else "lower is better"
        style(ax, title=shortened(f"{measure.title} ({better})", 62), x="Bytes held, of the full cache's")
        _panel(ax, measure, names, {**looks, **dict.fromkeys(fulls, (INK, "o"))}, fulls)
    handles = [
        Line2D([], [], ls="", color=looks[n][0], marker=looks[n][1], ms=6) for n in groups[:MOST_NAMES]
    ]
    legend = figure.legend(
        *(handles, ["settings"] * len(handles)),
        loc="lower left",
        bbox_to_anchor=(0.04, 0),
        ncols=4,
        frameon=False,
        fontsize=8.5,
    )
    for text, name in zip(legend.get_texts(), groups, strict=False):
        text.set(parse_math=False, text=shortened(name, 32), color=INK)
    return figure


def _panel(
    ax: Axes,
    measure: ComparedQuality,
    names: dict[str, str],
    looks: dict[str, tuple[str, str]],
    fulls: set[str],
) -> None:
    """Draw one measure.

    Args:
        ax: the axes.
        measure: the measure.
        names: the names of the groups that share a colour, by label.
        looks: colour and marker, by name of the group or label of a full cache.
        fulls: labels of full caches.
    """
    points = {x: (s.kept, s.value) for x, s in measure.scores.items() if s.kept is not None}
    values = [value for x, (_, value) in points.items() if x not in fulls]
    is_log = not measure.higher and is_wide(values or [0.0], 2)
    points = {x: point for x, point in points.items() if not is_log or point[1] > 0}  # a log scale has no 0
    quality_scale(ax, [value for _, value in points.values()], is_log)
    ax.set_xlim(0, 1.12 * max(share for share, _ in points.values()) or 1)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    if measure.write is format_percent:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    if measure.full in points:
        ax.axhline(points[measure.full][1], color=INK, lw=1.0, ls=(0, (4, 3)), alpha=0.7, zorder=2)
    best = [label for label in frontier(measure) if label in points]
    ax.plot(
        *zip(*(points[x] for x in best), strict=True),
        color=RULE,
        lw=6,
        solid_capstyle="round",
        solid_joinstyle="round",
        zorder=1.5,
    )
    for label, (share, value) in points.items():
        colour, marker = looks[label if label in fulls else names[label]]
        ax.plot(share, value, color=colour, marker=marker, ms=6.5, mec=SURFACE, mew=0.8, zorder=3)
    labelled = points if len(points) <= MOST_LABELS else best
    place_labels(ax, [Label(*points[x], x, looks[x if x in fulls else names[x]][0]) for x in labelled])
