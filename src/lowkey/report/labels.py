"""Labels beside points, placed one after the other so that none covers a point or another label."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

SIZE = 8.5  # points
LONGEST_LABEL = 34  # characters


class Label(NamedTuple):
    """A label.

    Args:
        x: x of its point.
        y: y of its point.
        text: the text.
        colour: its colour.
    """

    x: float
    y: float
    text: str
    colour: str


# Offsets in points, the near ones first: right, left, above, below, then the same further out.
OFFSETS = [
    (dx * reach, dy * reach)
    for reach in (1.0, 1.6, 2.4, 3.4, 4.8, 6.5)
    for dx, dy in ((8, 0), (-8, 0), (8, 8), (8, -8), (-8, 8), (-8, -8), (0, 10), (0, -10), (4, 12), (4, -12))
]


def place_labels(ax: Axes, labels: Sequence[Label]) -> None:
    """Write all labels. The limits and lines of `ax` must be final, because free places are looked for on the
    drawing.
    """
    scale = ax.figure.dpi / 72
    points = [tuple(ax.transData.transform((label.x, label.y))) for label in labels]
    taken = [Bbox.from_bounds(x - 4 * scale, y - 4 * scale, 8 * scale, 8 * scale) for x, y in points]
    lines = _lines(ax)
    for label, point in zip(labels, points, strict=True):
        text = shortened(label.text)
        offset = _free_offset(point, text, (taken, lines), ax.bbox, scale)
        taken.append(_box(point, offset, text, scale))
        _annotate(ax, label, text, offset)


def _lines(ax: Axes) -> list[Bbox]:
    """Small boxes along every line of `ax`, in pixels."""
    corners = [line.get_transform().transform(line.get_xydata()) for line in ax.lines]
    pairs = [pair for path in corners for pair in pairwise(path)]
    specks = [point for start, end in pairs for point in np.linspace(start, end, 80)]
    return [Bbox.from_bounds(x - 1, y - 1, 2, 2) for x, y in specks]


def shortened(text: str, longest: int = LONGEST_LABEL) -> str:
    """A text on one line, cut with `…` if it is longer than `longest` characters."""
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _free_offset(
    point: tuple[float, ...], text: str, obstacles: tuple[list[Bbox], list[Bbox]], frame: Any, scale: float
) -> tuple[float, float]:
    """The offset at which a label is put.

    Args:
        point: its point, in pixels.
        text: its text.
        obstacles: boxes of points and earlier labels, and boxes of lines.
        frame: the box of the axes.
        scale: pixels per point.

    Returns:
        The first offset that is free of points, labels and lines; else the first free of points and labels;
        else the first of all.
    """
    boxes = {offset: _box(point, offset, text, scale) for offset in OFFSETS}
    inside = {
        o: b
        for o, b in boxes.items()
        if frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1
    }
    taken, lines = obstacles
    free = [offset for offset, box in inside.items() if not box.count_overlaps(taken)]
    clear = [offset for offset in free if not boxes[offset].count_overlaps(lines)]
    return next(iter([*clear, *free, OFFSETS[0]]))


def _box(point: tuple[float, ...], offset: tuple[float, float], text: str, scale: float) -> Bbox:
    """The box of a label in pixels, with an estimated width."""
    # Measuring text would need a drawing; 0.58 of the font size is the mean width of a character.
    width, height = 0.58 * SIZE * len(text) * scale, 1.25 * SIZE * scale
    x, y = point[0] + offset[0] * scale, point[1] + offset[1] * scale
    left = {"left": x, "right": x - width, "center": x - width / 2}[_side(offset)]
    return Bbox.from_bounds(left, y - height / 2, width, height)


def _side(offset: tuple[float, float]) -> str:
    """The horizontal alignment of a label with this offset."""
    return "center" if offset[0] == 0 else "left" if offset[0] > 0 else "right"


def _annotate(ax: Axes, label: Label, text: str, offset: tuple[float, float]) -> None:
    """Write one label, with a line to its point if that is far."""
    far = abs(offset[0]) + abs(offset[1]) > 17
    arrow = (
        {"arrowstyle": "-", "color": label.colour, "lw": 0.7, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
        if far
        else None
    )
    ax.annotate(
        text,
        (label.x, label.y),
        offset,
        textcoords="offset points",
        ha=_side(offset),
        va="center",
        fontsize=SIZE,
        color=label.colour,
        arrowprops=arrow,
        parse_math=False,
        annotation_clip=False,
    )
