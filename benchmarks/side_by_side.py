"""Tables of what `benchmarks/kvpress/compare.py` wrote: kvpress and lowkey side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "kvpress.json"
SIDES = ("theirs", "ours", "alike")


def agreement_table() -> list[str]:
    """What both keep and write, and what that is worth."""
    lines = [
        "| method | kept in common | answers alike | right | nats per token |",
        "|---|---|---|---|---|",
    ]
    for row in rows():
        figures = (
            of(row, "kept", SIDES[1:], percent),
            of(row, "texts", SIDES[1:], percent),
            of(row, "right", SIDES, percent),
            of(row, "nats", SIDES, hundredths),
        )
        lines.append(f"| {row['method']} | {' | '.join(figures)} |")
    return lines


def cost_table() -> list[str]:
    """Bytes and times, as ratios to the full cache of the same library."""
    lines = [
        "| method | bytes: kvpress | lowkey | prefill: kvpress | lowkey | step: kvpress | lowkey |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows():
        own = row.get("ours") or row["alike"]
        outside = row["theirs"]["bytes_outside"]
        masks = f" + {percent(outside)}" if outside else ""
        times = [
            hundredths(side[name]) if name in side else "-"
            for name in ("prefill", "step")
            for side in (row["theirs"], own)
        ]
        held = [percent(row["theirs"]["bytes"]) + masks, percent(own["bytes"])]
        lines.append(f"| {row['method']} | {' | '.join(held + times)} |")
    return lines


def rows() -> list[dict[str, Any]]:
    """The rows of the result."""
    found: list[dict[str, Any]] = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    return found


def of(row: dict[str, Any], name: str, sides: tuple[str, ...], shown: Any) -> str:
    """A figure of each side, with a dash where a side was not measured or has no such figure."""
    return " / ".join(shown(row[side][name]) if name in row.get(side, {}) else "-" for side in sides)


def percent(share: float) -> str:
    """A share in percent; what is not quite everything is not shown as everything."""
    if share >= 1:
        return f"{100 * share:.0f}"
    return f"{100 * share:.1f}" if share < 0.999 else f"{min(100 * share, 99.99):.2f}"


def hundredths(x: float) -> str:
    """A number with two digits behind the point."""
    return f"{x:.2f}"
