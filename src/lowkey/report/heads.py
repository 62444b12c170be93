"""Heat maps of the tokens that each head kept. They show which heads a policy and its allocator find worth
the memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lowkey.report.drawing import FIGURE_WIDTH, INK, MUTED, colour_bar, style
from lowkey.report.labels import shortened
from lowkey.report.policies import heads_words, kept_heads, without_budget
from lowkey.report.results import Row

PANELS_PER_ROW, LONGEST_PANEL_NAME = 3, 44  # panels side by side; characters of a panel's name


def heads_figure(rows: Sequence[Row]) -> Figure:
    """One map per row, KV heads over layers, on one colour scale from zero to the largest count.

    Args:
        rows: rows with counts.
    """
    maps = [heads for row in rows if (heads := kept_heads(row)) is not None]
    columns = min(len(rows), PANELS_PER_ROW)
    lines = math.ceil(len(rows) / columns)
    # The dots per inch are those of the images inside the SVG: enough for a cell of two pixels to keep its
    # shape.
    figure = Figure(
        figsize=(FIGURE_WIDTH, 0.5 + 1.9 * lines), dpi=200, facecolor="white", layout="constrained"
    )
    axes = figure.subplots(lines, columns, squeeze=False)
    norm = Normalize(0, max([1.0, *(float(np.nanmax(heads)) for heads in maps)]), clip=True)
    for place, ax in enumerate(axes.flat):
        ax.set_visible(place < len(rows))
        if place < len(rows):
            _panel(ax, rows[place], maps[place], norm)
    figure.supxlabel("Layer, of those that are compressed", color=INK, fontsize=9.5)
    figure.supylabel("KV head", color=INK, fontsize=9.5)
    colour_bar(figure, axes[0], ScalarMappable(norm, "viridis"), "Tokens kept")
    return figure


def _panel(ax: Axes, row: Row, heads: np.ndarray, norm: Normalize) -> None:
    """Draw the map of one row."""
    ax.imshow(
        np.ma.masked_invalid(heads.T),
        origin="lower",
        norm=norm,
        cmap="viridis",
        interpolation="nearest",
        aspect="auto",
    )
    style(ax, grid=False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    for text, colour, above in (
        (shortened(without_budget(row), LONGEST_PANEL_NAME), INK, 16),
        (heads_words(row), MUTED, 4),
    ):
        ax.annotate(
            *(text, (0, 1), (0, above)),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=9,
            color=colour,
            parse_math=False,
        )
