"""What `lowkey plan` compared: quality against bytes, single axes beside combinations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from lowkey.report.columns import format_bytes
from lowkey.report.drawing import (
    FIGURE_WIDTH,
    INK,
    MARKERS,
    MUTED,
    SERIES,
    SURFACE,
    is_wide,
    quality_scale,
    style,
)
from lowkey.report.labels import Label, place_labels
from lowkey.report.results import Row, measured

MOST_AXES = 3
COMPARED_QUALITIES = [  # (key, title)
    ("kl_decode", "KL divergence of decoded tokens (nats), lower is better"),
    ("exact_match", "Recall, exact match, higher is better"),
]


def axes_of(row: Row) -> tuple[str, ...]:
    """The axes on which a row of `lowkey plan` is smaller than the full cache; none for other rows."""
    axes = row.get("axes")
    if not isinstance(axes, list) or not all(isinstance(axis, str) for axis in axes):
        return ()
    return tuple(axes[:MOST_AXES])


def is_candidate(row: Row) -> bool:
    """Whether a row is one that `lowkey plan` compared, with its bytes."""
    return bool(axes_of(row)) and measured(row, "bytes_planned") is not None


def frontier_qualities(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The qualities that some candidate was measured on: (key, title)."""
    return [
        q
        for q in COMPARED_QUALITIES
        if any(measured(row, q[0]) is not None for row in filter(is_candidate, rows))
    ]


def frontier_figure(rows: Sequence[Row]) -> Figure:
    """Quality against the bytes per token at the length that was planned for, one point per candidate.

    A candidate on a single axis is hollow.
    """
    candidates = [row for row in rows if is_candidate(row)]
    groups = sorted({axes_of(row) for row in candidates}, key=lambda axes: (len(axes), axes))
    styles = {axes: _style(i, len(axes)) for i, axes in enumerate(groups)}
    qualities = frontier_qualities(rows)
    figure = Figure(figsize=(FIGURE_WIDTH, 5.2), facecolor="white")
    figure.subplots_adjust(left=0.065, right=0.985, top=0.93, bottom=0.2, wspace=0.17)
    for place, (key, title) in enumerate(qualities, start=1):
        ax = figure.add_subplot(1, len(qualities), place)
        style(ax, title=title, x="Planned cache bytes per token")
        _panel(ax, [row for row in candidates if measured(row, key) is not None], key, styles)
    handles = [Line2D([], [], ls="", **styles[axes]) for axes in groups]
    names = [" + ".join(axes) + (" (single axis)" if len(axes) == 1 else "") for axes in groups]
    legend = figure.legend(
        *(handles, ["axes"] * len(handles)),
        loc="lower left",
        bbox_to_anchor=(0.04, 0),
        ncols=min(4, len(groups)),
        frameon=False,
        fontsize=9,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(parse_math=False, text=name, color=INK)
    return figure


def _style(number: int, axes: int) -> dict[str, Any]:
    """Colour and marker of the candidates on the same axes."""
    colour = SERIES[number % len(SERIES)]
    face = SURFACE if axes == 1 else colour
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)], "ms": 7, "mfc": face, "mec": colour}


def _panel(ax: Axes, rows: list[Row], key: str, styles: dict[tuple[str, ...], dict]) -> None:
    """Draw one quality."""
    if not rows:
        return
    values = [measured(row, key) or 0.0 for row in rows]
    is_log = key != "exact_match" and is_wide(values, 2)
    quality_scale(ax, values, is_log)
    sizes = [measured(row, "bytes_planned") or 0.0 for row in rows]
    room = 0.15 * (max(sizes) - min(sizes) or max(sizes) or 1)
    ax.set_xlim(min(sizes) - room, max(sizes) + 2 * room)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    for row, x, y in zip(rows, sizes, values, strict=True):
        ax.plot(x, y, ls="", zorder=3, mew=1.4, **styles[axes_of(row)])
    labels = [
        Label(x, y, str(row.get("label", row["name"])), MUTED)
        for row, x, y in zip(rows, sizes, values, strict=True)
    ]
    place_labels(ax, labels)


def frontier_summary(rows: Sequence[Row]) -> str | None:
    """The plan's row beside the best choice on a single axis; None if one of them was not measured.

    Results of earlier versions do not say which row the plan is: then it is the combination of least loss.
    """
    found = [row for row in rows if is_candidate(row) and measured(row, "kl_decode") is not None]
    single = [row for row in found if len(axes_of(row)) == 1]
    joint = [row for row in found if len(axes_of(row)) > 1]
    if not single or not joint:
        return None
    best, alone = (min(some, key=lambda row: measured(row, "kl_decode") or 0.0) for some in (joint, single))
    for row in found:
        if row.get("chosen") is True:
            return f"The plan, {_told(row)}; the best choice on a single axis, {_told(alone)}."
    return f"The best combination, {_told(best)}; the best choice on a single axis, {_told(alone)}."


def _told(row: Row) -> str:
    """A candidate in words."""
    size, loss = measured(row, "bytes_planned") or 0.0, measured(row, "kl_decode") or 0.0
    recall = measured(row, "exact_match")
    asked = "" if recall is None else f" and recalls {100 * recall:.1f}%"
    name, axes = row.get("label", row["name"]), " + ".join(axes_of(row))
    return f"{name} ({axes}, {format_bytes(size)} per token), loses {loss:.3g} nats{asked}"
