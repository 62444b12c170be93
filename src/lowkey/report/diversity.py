"""Figures of a head diversity measurement (`lowkey diversity`): effective ranks and divergence by layer, and
cosines between the heads of a few layers.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lowkey.report.drawing import FIGURE_WIDTH, INK, SERIES, colour_bar, style

DIVERSITY_PANELS = (  # (title, lines): name of a number, its label
    ("Queries and keys", (("qk_uncentred", "of H heads"), ("qk_centred", "around the mean, of H - 1"))),
    ("Values and output", (("vo_uncentred", "of H heads"), ("vo_centred", "around the mean, of H - 1"))),
    ("Divergence of attention maps", (("js", "mean over pairs of heads"),)),
)
LAYERS_SHOWN = 4  # layers with maps of cosines


def diversity_figure(measurement: dict) -> Figure:
    """Effective ranks of Q-K and V-O operators, and divergence of attention maps, over layers.

    Args:
        measurement: what `lowkey.heads.diversity.diversity` returned.

    Returns:
        Three panels. Bands span random initialisations, and dashed lines are their means.
    """
    figure = Figure(figsize=(FIGURE_WIDTH, 3.6), facecolor="white", layout="constrained")
    axes = figure.subplots(1, len(DIVERSITY_PANELS))
    for ax, (title, lines) in zip(axes, DIVERSITY_PANELS, strict=True):
        style(
            ax,
            title=title,
            x="Layer",
            y="Bits" if title == DIVERSITY_PANELS[-1][0] else "Effective rank, share of the most",
        )
        for (name, label), colour in zip(lines, SERIES, strict=False):
            _line(ax, measurement["layers"], name, label, colour)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.legend(frameon=False, labelcolor=INK, fontsize=8.5)
    return figure


def _line(ax: Axes, layers: list[dict], name: str, label: str, colour: str) -> None:
    """Draw one number over layers, with the band of random initialisations if there are any."""
    kind, _, measure = name.partition("_")
    values = _array([layer[kind][measure] if measure else layer[kind] for layer in layers])
    ax.plot(range(len(layers)), values, color=colour, marker="o", ms=5, lw=1.4, label=label, zorder=3)
    bands = [(layer["init"] or {}).get(name) or {} for layer in layers]
    if any(bands):
        mean, low, high = (_array([band.get(end) for band in bands]) for end in ("mean", "low", "high"))
        ax.plot(range(len(layers)), mean, color=colour, lw=1.0, ls=(0, (4, 3)), label="at random", zorder=2)
        ax.fill_between(range(len(layers)), low, high, color=colour, alpha=0.2, lw=0, zorder=1)


def _array(values: list) -> np.ndarray:
    """Values as an array, NaN for None."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def cosines_figure(measurement: dict) -> Figure:
    """Cosines between the heads of a few layers, from the first to the last: Q-K above V-O, on one scale from
    -1 to 1.

    Args:
        measurement: what `lowkey.heads.diversity.diversity` returned.
    """
    layers = measurement["layers"]
    # Evenly spread from the first to the last.
    places = np.linspace(0, len(layers) - 1, min(LAYERS_SHOWN, len(layers))).round().astype(int).tolist()
    chosen = [layers[i] for i in dict.fromkeys(places)]
    figure = Figure(figsize=(1.2 + 2.5 * max(len(chosen), 2), 5.2), facecolor="white", layout="constrained")
    axes = figure.subplots(2, len(chosen), squeeze=False)
    norm = Normalize(-1, 1)
    for line, (kind, name) in zip(axes, (("qk", "Q-K"), ("vo", "V-O")), strict=True):
        for ax, layer in zip(line, chosen, strict=True):
            ax.imshow(
                np.array(layer[kind]["cosines"], dtype=float),
                norm=norm,
                cmap="RdBu_r",
                interpolation="nearest",
            )
            style(ax, title=f"{name}, layer {layer['layer']}", grid=False)
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    figure.supxlabel("Query head", color=INK, fontsize=9.5)
    figure.supylabel("Query head", color=INK, fontsize=9.5)
    colour_bar(figure, axes, ScalarMappable(norm, "RdBu_r"), "Cosine")
    return figure
