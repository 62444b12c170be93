"""A matplotlib figure as SVG inside an HTML page, in the page's colours."""

from __future__ import annotations

import html
import re
import warnings
from io import StringIO

import matplotlib
from matplotlib.figure import Figure

from lowkey.report.drawing import INK, MUTED, RULE, SERIES, SURFACE

VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", SURFACE: "--surface"} | {
    c: f"--series-{i}" for i, c in enumerate(SERIES)
}


def inline_svg(figure: Figure, prefix: str, label: str) -> str:
    """A figure as one <svg> element.

    Args:
        figure: the figure.
        prefix: begins its ids, so that they differ from those of the page's other figures.
        label: its content in words, for readers who do not see it.
    """
    raw = _draw(figure, prefix)
    body = raw[raw.index("<svg") :]
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", body, flags=re.DOTALL)
    # Only inside tags: a row's name is text, and may well contain something that looks like an id or a
    # colour.
    body = re.sub(r"<[^>]+>", lambda tag: _adapt(tag[0], prefix), body)
    head = f'<svg role="img" aria-label="{html.escape(label)}" viewBox="{_view_box(raw)}"'
    return re.sub(r"<svg\b[^>]*", lambda _: head, body, count=1)


def _draw(figure: Figure, prefix: str) -> str:
    """The figure as matplotlib writes it."""
    text = StringIO()
    # Text stays text (searchable, in the page's font). The salt makes the same results give the same page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}), warnings.catch_warnings():
        # The browser has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()


def _view_box(svg: str) -> str:
    """The view box of an SVG."""
    match = re.search(r'viewBox="([-0-9. ]+)"', svg)
    return match[1] if match else "0 0 720 480"


def _adapt(tag: str, prefix: str) -> str:
    """One tag with ids, references and colours as the page needs them."""
    # An image's id is made of its content, so equal heat maps would share it; nothing refers to it.
    tag = (
        re.sub(r'\bid="[^"]*"', "", tag)
        if tag.startswith("<image")
        else re.sub(r'\bid="', f'id="{prefix}-', tag)
    )
    tag = (
        tag.replace('href="#', f'href="#{prefix}-')
        .replace("url(#", f"url(#{prefix}-")
        .replace("xlink:href", "href")
    )
    for colour, variable in VARIABLES.items():
        tag = tag.replace(colour, f"var({variable})")
    return tag
