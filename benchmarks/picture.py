"""The picture of README: what a cache of so many bytes costs on SmolLM2-135M-Instruct.

python benchmarks/picture.py

It reads docs/results/smollm2/bits.json and default.json and writes docs/images/bytes-kl.svg. The file says in
its description from which points it was drawn, so that a test can tell whether it is up to date.
"""

from __future__ import annotations

import hashlib
import json
import statistics

import matplotlib
from matplotlib.figure import Figure
from tables import EVIDENCE, ROOT, kept, rows_of

from lowkey.core import files
from lowkey.report.drawing import INK, MUTED, RULE, SERIES, style

PLACE = ROOT / "docs" / "images" / "bytes-kl.svg"
INTEGERS = {  # a line of the picture: its name and the labels of its points
    "integers per token": ("int8", "int4", "int2"),
    "integers after Hadamard": ("hadamard4", "hadamard2"),
    "integers per channel (KIVI)": ("kivi4", "kivi2"),
}
DEFAULT = "lowkey compress --budget"
TICKS = (8, 12.5, 25, 50)
KLS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)

Point = tuple[float, float]  # per cent of the bytes, KL in nats per token


def points() -> dict[str, list[Point]]:
    """By line, the mean over draws, from many bytes to few."""
    groups: dict[str, list[dict]] = {}
    for row in (*rows_of(f"{EVIDENCE}bits"), *rows_of(f"{EVIDENCE}default")):
        groups.setdefault(row["label"], []).append(row)
    means = {
        label: (
            round(statistics.mean(kept(row) for row in rows), 2),
            round(statistics.mean(row["kl"] for row in rows), 6),
        )
        for label, rows in groups.items()
    }
    lines = {name: [means[label] for label in labels] for name, labels in INTEGERS.items()}
    lines[DEFAULT] = [point for label, point in means.items() if label.startswith("default ")]
    return {name: sorted(found, reverse=True) for name, found in lines.items()}


def description(lines: dict[str, list[Point]]) -> str:
    """What the file says of the points that it was drawn from."""
    return "points " + hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()[:16]


def drawn(lines: dict[str, list[Point]]) -> Figure:
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    ax = figure.subplots()
    style(ax, "", "bytes of the cache, % of the full one", "KL to the full cache, nats per token")
    for name, colour, marker in zip(lines, (*SERIES[1:4], SERIES[0]), "s^Do", strict=True):
        x, y = zip(*lines[name], strict=True)
        mine = name == DEFAULT
        ax.plot(x, y, marker=marker, color=colour, lw=2.2 if mine else 1.2, ms=6 if mine else 5, label=name)
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(TICKS, [f"{tick:g} %" for tick in TICKS])
    ax.set_yticks(KLS, [f"{kl:g}" for kl in KLS])
    ax.minorticks_off()
    ax.legend(fontsize=8.5, labelcolor=INK, edgecolor=RULE)
    ax.text(
        *(0.0, -0.22, "SmolLM2-135M-Instruct, 12 windows of 1024 tokens; 4 first and 32 last tokens exact."),
        transform=ax.transAxes,
        color=MUTED,
        fontsize=8,
    )
    return figure


def main() -> None:
    lines = points()
    salt = {"svg.fonttype": "none", "svg.hashsalt": "lowkey"}  # the same points give the same file
    with matplotlib.rc_context(salt), files.replacing(PLACE, ours=True) as temporary:
        metadata = {"Date": None, "Description": description(lines)}
        drawn(lines).savefig(temporary, format="svg", facecolor="white", metadata=metadata)
    print(PLACE.relative_to(ROOT))


if __name__ == "__main__":
    main()
