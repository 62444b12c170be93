"""What all figures share: colours, axes, scales with readable numbers, the colour bar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# The light palette. In the page each of these becomes a CSS variable (svg.py), so none may be used for
# anything fixed.
INK, MUTED, RULE, SURFACE = "#1d2430", "#5b6573", "#d9dee5", "#fefefe"
SERIES = ("#2360b5", "#b05a08", "#2b7a4b", "#7749b3", "#b0334a", "#0f7482")
MARKERS = "osD^vP"
# Colours of middle lightness: layers stay apart on a white page and on a dark one.
LAYER_COLOURS = LinearSegmentedColormap.from_list("layers", ["#4a86e8", "#a765c0", "#e0703c"])
FIGURE_WIDTH = 11.0  # inches


def style(ax: Axes, title: str = "", x: str = "", y: str = "", grid: bool = True) -> None:
    """Give axes their title, labels and colours.

    Args:
        ax: the axes.
        title: title, at the left.
        x: label of the x axis.
        y: label of the y axis.
        grid: whether there are grid lines and spines.
    """
    ax.set_title(title, color=INK, fontsize=10, loc="left")
    ax.set_xlabel(x, color=INK, fontsize=9)
    ax.set_ylabel(y, color=INK, fontsize=9)
    ax.tick_params(which="both", colors=MUTED, labelsize=8.5, length=0)
    ax.set_axisbelow(True)
    for side, spine in ax.spines.items():
        spine.set_visible(grid and side in ("left", "bottom"))
        spine.set_color(RULE)
    if grid:
        ax.grid(color=RULE, lw=0.7)


def is_wide(values: Sequence[float], times: float) -> bool:
    """Whether a log scale suits: all values are positive, and they differ by more than `times`."""
    return min(values) > 0 and max(values) / min(values) > times


def quality_scale(ax: Axes, values: list[float], is_log: bool, side: str = "y") -> None:
    """Set limits that leave room for labels.

    Args:
        ax: the axes.
        values: the values that are drawn.
        is_log: whether the scale is logarithmic.
        side: `x` or `y`.
    """
    low, high = min(values), max(values)
    if is_log:
        ax.set(
            **{f"{side}scale": "log", f"{side}lim": (low / (high / low) ** 0.14, high * (high / low) ** 0.12)}
        )
        plain_log(getattr(ax, f"{side}axis"))
    else:
        room = 0.12 * (high - low or abs(high) or 1)
        ax.set(**{f"{side}lim": (low - room, high + 1.3 * room)})


def plain_log(axis: Any) -> None:
    """Plain numbers, such as 20 and 50, on a logarithmic axis."""
    low, high = axis.get_view_interval()
    # Over more than two and a half decades ticks at 2 and 5 would crowd.
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def colour_bar(figure: Figure, axes: Any, colours: ScalarMappable, label: str) -> Any:
    """Add a colour bar beside one or several axes."""
    bar = figure.colorbar(colours, ax=list(np.ravel(axes)), fraction=0.03, pad=0.015)
    bar.set_label(label, color=INK, fontsize=9, labelpad=7)
    bar.ax.tick_params(which="both", colors=MUTED, labelsize=8.5)
    bar.outline.set_visible(False)
    if isinstance(colours.norm, LogNorm):
        plain_log(bar.ax.yaxis)
    return bar
