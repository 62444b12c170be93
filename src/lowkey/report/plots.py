"""Figures of a result. They use matplotlib's object API only, so that nothing global changes; the caller
chooses PNG or SVG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from lowkey.core.row_names import LAST
from lowkey.report.columns import format_bytes
from lowkey.report.drawing import (
    FIGURE_WIDTH,
    INK,
    LAYER_COLOURS,
    MARKERS,
    MUTED,
    SERIES,
    SURFACE,
    colour_bar,
    is_wide,
    plain_log,
    quality_scale,
    style,
)
from lowkey.report.labels import Label, place_labels
from lowkey.report.results import Row, full_row, is_full, marks_of, measured

PLOT_PANELS = [  # (key, title, the better end)
    ("perplexity", "Perplexity", "lower is better"),
    ("kl", "KL divergence from the full model (nats)", "lower is better"),
    ("kl_decode", "KL divergence of decoded tokens (nats)", "lower is better"),
    ("exact_match", "Exact match (share of answers)", "higher is better"),
    ("perplexity_decode", "Perplexity of decoded tokens", "lower is better"),
]


def quality_panels(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """The qualities that are drawn: the first two that some row with known bytes was measured on, apart from
    the full cache.

    Returns:
        (key, title, the better direction) of each.
    """
    return [p for p in PLOT_PANELS if any(_point(row, p[0]) for row in rows if not is_full(row))][:2]


def quality_figure(rows: Sequence[Row]) -> Figure:
    """Quality against cache bytes per token, one point per row."""
    figure = Figure(figsize=(FIGURE_WIDTH, 5.0), facecolor="white")
    panels, right = (
        quality_panels(rows),
        max([1.0, *(measured(row, "bytes_per_token") or 0.0 for row in rows)]),
    )
    figure.subplots_adjust(left=0.065, right=0.985, top=0.9, bottom=0.125, wspace=0.17)
    for place, (key, title, better) in enumerate(panels, start=1):
        ax = figure.add_subplot(1, len(panels), place)
        style(ax, title=f"{title}, {better}", x="Cache bytes per token")
        _bytes_scale(ax, right)
        _quality_panel(ax, [row for row in rows if _point(row, key)], key)
    return figure


def _quality_panel(ax: Axes, rows: list[Row], key: str) -> None:
    """Draw one quality: lines of rows that differ in their budget only, and labels."""
    is_log = _wants_log(rows, key)
    # The full cache's divergence of 0 has no place on a log scale.
    rows = [row for row in rows if not is_log or measured(row, key)]
    series = _series(rows)
    points = [(_point(row, key) or (0.0, 0.0), *series[_series_key(row)], row) for row in rows]
    full = full_row(rows)
    quality_scale(ax, [y for (_, y), *_ in points], is_log)
    if full:
        ax.axhline(measured(full, key) or 0.0, color=INK, lw=1.0, ls=(0, (4, 3)), alpha=0.7, zorder=2)
    for colour, marker in dict.fromkeys(series.values()):
        line = sorted(point for point, c, m, _ in points if (c, m) == (colour, marker))
        ax.plot(
            *zip(*line, strict=True),
            color=colour,
            marker=marker,
            ms=6.5,
            lw=1.0,
            mec=SURFACE,
            mew=0.8,
            zorder=3,
        )
    place_labels(
        ax, [Label(x, y, str(row.get("label", row["name"])), colour) for (x, y), colour, _, row in points]
    )


def _point(row: Row, key: str) -> tuple[float, float] | None:
    """(bytes per token, quality) of a row, or None if one of them is unknown."""
    x, y = measured(row, "bytes_per_token"), measured(row, key)
    return None if x is None or y is None else (x, y)


def _series_key(row: Row) -> tuple[str, ...]:
    """What rows of one line have in common: everything but their budget."""
    if is_full(row):
        return ("full",)
    marks = [f"{key}={word}" for key, word in marks_of(row).items() if key not in LAST]
    return (
        *(str(row.get(part)) for part in ("method", "policy", "bits", "packing", "layout", "run")),
        *marks,
    )


def _series(rows: list[Row]) -> dict[tuple[str, ...], tuple[str, str]]:
    """Colour and marker of each line."""
    keys = dict.fromkeys(_series_key(row) for row in rows if not is_full(row))
    styles = [(SERIES[i % len(SERIES)], MARKERS[i // len(SERIES) % len(MARKERS)]) for i in range(len(keys))]
    full: dict[tuple[str, ...], tuple[str, str]] = {("full",): (INK, "o")} if any(map(is_full, rows)) else {}
    return {**dict(zip(keys, styles, strict=True)), **full}


def _wants_log(rows: list[Row], key: str) -> bool:
    """Whether a quality is drawn on a log scale: otherwise one bad row would flatten all others."""
    values = [measured(row, key) or 0.0 for row in rows if not is_full(row) or measured(row, key)]
    return is_wide(values, 2)


def _bytes_scale(ax: Axes, right: float) -> None:
    """Scale from zero to `right`, with steps that are powers of two."""
    ax.set_xlim(0, 1.12 * right)
    ax.xaxis.set_major_locator(MultipleLocator(2.0 ** math.floor(math.log2(right / 3))))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))


def error_surface_figure(profile: dict) -> Figure:
    """Heat maps of the relative output error over pairs of ranks, one per layer, on one colour scale; the
    chosen pair is marked.

    Args:
        profile: the profile of a row.
    """
    surface = np.array(profile["surface"], dtype=float)
    columns = min(len(surface), 4 if len(surface) <= 8 else 6)
    lines = math.ceil(len(surface) / columns)
    figure = Figure(
        figsize=(FIGURE_WIDTH, 0.8 + (FIGURE_WIDTH - 1.6) / max(columns, 3) * lines),
        facecolor="white",
        layout="constrained",
    )
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    norm = _error_norm(surface)
    for place, ax in enumerate(axes.flat):
        ax.set_visible(place < len(surface))
        if place < len(surface):
            _surface_panel(ax, profile, place, surface[place], norm)
    figure.supxlabel("Rank kept for values", color=INK, fontsize=9.5)
    figure.supylabel("Rank kept for keys", color=INK, fontsize=9.5)
    colour_bar(figure, axes, ScalarMappable(norm, "viridis"), "Relative error of the layer output")
    return figure


def _error_norm(surface: np.ndarray) -> LogNorm:
    """Logarithmic colours over at most three decades. Zero, which full rank may reach, gets the lowest
    colour.
    """
    positive = surface[np.isfinite(surface) & (surface > 0)]
    high = float(positive.max()) if positive.size else 1.0
    low = max(float(positive.min()), high / 1000) if positive.size else high / 10
    return LogNorm(low if low < high else high / 10, high, clip=True)


def _surface_panel(ax: Axes, profile: dict, place: int, errors: np.ndarray, norm: LogNorm) -> None:
    """Draw the map of one layer."""
    ranks = profile["ranks"]
    # Full rank may have error 0, which has no logarithm.
    shown = np.where(errors <= 0, norm.vmin or 0.0, errors)
    ax.imshow(
        np.ma.masked_invalid(shown),
        origin="lower",
        norm=norm,
        cmap="viridis",
        interpolation="nearest",
        aspect="auto",
    )
    style(ax, title=f"Layer {profile['layers'][place]}", grid=False)
    step = math.ceil(len(ranks) / (8 if len(profile["layers"]) <= 8 else 4))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(range(0, len(ranks), step), [str(rank) for rank in ranks[::step]])
    key, value = (profile.get("chosen") or [(None, None)] * (place + 1))[place]
    if key is not None and value is not None:
        # A chosen rank may lie between measured ones.
        x, y = np.interp([value, key], ranks, range(len(ranks)))
        ax.plot(
            x,
            y,
            marker="o",
            ms=8,
            mfc="#ffffff",
            mec="#000000",
            mew=1.6,
            ls="",
            gid=f"chosen-{place}",
            zorder=4,
            clip_on=False,
        )


def ranks_figure(profile: dict) -> Figure:
    """The chosen ranks of keys and values, layer by layer.

    Args:
        profile: the profile of a row.
    """
    chosen = np.array(profile["chosen"], dtype=float)
    figure = Figure(figsize=(FIGURE_WIDTH, 3.2), facecolor="white", layout="constrained")
    ax = figure.subplots()
    style(ax, x="Layer", y="Rank kept")
    places = np.arange(len(chosen))
    for side, name in enumerate(("keys", "values")):
        ax.bar(
            places + 0.2 * (2 * side - 1),
            np.nan_to_num(chosen[:, side]),
            0.38,
            color=SERIES[side],
            label=name,
            zorder=2,
        )
        if len(chosen) <= 16:
            _bar_numbers(ax, chosen[:, side], places + 0.2 * (2 * side - 1))
    ax.set_xticks(places, [str(layer) for layer in profile["layers"]])
    ax.margins(x=0.02, y=0.12)
    ax.legend(
        frameon=False,
        labelcolor=INK,
        fontsize=9,
        ncols=2,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0,
    )
    ax.grid(visible=False, axis="x")
    return figure


def _bar_numbers(ax: Axes, heights: np.ndarray, places: np.ndarray) -> None:
    """Write each bar's number above it."""
    for x, height in zip(places, heights, strict=True):
        if np.isfinite(height):
            ax.annotate(
                f"{height:g}",
                (x, height),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=MUTED,
            )


def spectra_figure(profile: dict) -> Figure:
    """Spectra of keys and values: each direction's share of its layer's energy, in descending order.

    Args:
        profile: the profile of a row.
    """
    figure = Figure(figsize=(FIGURE_WIDTH, 3.8), facecolor="white", layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    norm = Normalize(0, max(len(profile["layers"]) - 1, 1))
    for ax, side in zip(axes, ("keys", "values"), strict=True):
        style(ax, title=side.capitalize(), x="Direction", y="Share of energy" if side == "keys" else "")
        ax.set_yscale("log")
        for place, energies in enumerate(profile["spectra"][side]):
            _spectrum(ax, np.array(energies, dtype=float), LAYER_COLOURS(norm(place)))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        plain_log(ax.yaxis)
    bar = colour_bar(figure, axes, ScalarMappable(norm, LAYER_COLOURS), "Layer")
    ends = sorted({0, len(profile["layers"]) - 1})
    bar.set_ticks(ends, labels=[str(profile["layers"][place]) for place in ends])
    return figure


def _spectrum(ax: Axes, energies: np.ndarray, colour: Any) -> None:
    """Draw the spectrum of one layer."""
    total = np.nansum(energies)
    if total > 0:
        shares = np.where(energies > 0, energies, np.nan) / total
        ax.plot(range(1, len(energies) + 1), shares, color=colour, lw=1.3)
