"""What the runs of `pretraining.py` say, as tables. Intervals are 95 %, Student's t over paired seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowkey.core import files
from lowkey.core.intervals import half_width

SMOOTH = 0.05  # of all steps, in a smoothed training loss
WHOLE = 2 * 128 * 6  # numbers that MHA stores per token
DECAY = 0.2  # of all steps, as the runs of stage b have it


def runs(out: Path, stage: str | None = None) -> list[dict]:
    """Everything measured, in the order of names."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(out.glob("runs/*/measured.json"))]
    return [r for r in found if stage in (None, r["stage"])]


def validation(row: dict) -> float:
    """The last validation loss; infinite for a run that broke."""
    found = row["result"]["validation"][-1]["validation_loss"] if row["result"]["validation"] else None
    return math.inf if found is None or row["result"]["diverged"] else found


def chosen(sweep: list[dict]) -> dict[str, float]:
    """For every arm the learning rate with the lowest validation loss in its longest sweep: a short run wants
    another rate.
    """
    best: dict[str, tuple[int, float, float]] = {}
    for row in sweep:
        mine = (-row["tokens"], validation(row), row["lr"])
        best[row["arm"]] = min(best.get(row["arm"], mine), mine)
    return {arm: lr for arm, (*_, lr) in best.items()}


def report(out: Path, results: Path) -> None:
    """Write all numbers that the tables need and a figure, and print the tables."""
    rows = runs(out)
    lengths = sorted({r["tokens"] for r in rows})
    kept = [{k: v for k, v in r.items() if k != "result"} | {"result": _kept(r["result"])} for r in rows]
    files.write_json(results, {"rows": kept}, "benchmark", ours=True)
    draw(rows, results.with_suffix(".png"))
    kinds = {
        "learning rates": ("a", sweep_table),
        "comparison": ("b", comparison_table),
        "with MHA's parameters": ("w", comparison_table),
        "LRKV's rank": ("r", comparison_table),
        "range of learning rates": ("c", range_table),
        "converted": ("d", recovery_table),
    }
    for z, start in (("", "random start"), ("z", "output projections at zero")):
        tables = {
            f"{title}, {n:,} tokens": table([r for r in rows if r["tokens"] == n], z + kind)
            for title, (kind, table) in kinds.items()
            for n in lengths
        }
        for rate in sorted({r["lr"] for r in rows if r["stage"] == z + "e"}):
            same = [
                r | {"stage": z + "e"} for r in rows if r["stage"] in (z + "b", z + "e") and r["lr"] == rate
            ]
            of_length = {n: comparison_table([r for r in same if r["tokens"] == n], z + "e") for n in lengths}
            tables |= {f"all at {rate:g}, {n:,} tokens": table for n, table in of_length.items()}
        for title, table in tables.items():
            if table:
                print(f"\n## {start}: {title}\n\n" + "\n".join(table))


def draw(rows: list[dict], place: Path) -> None:
    """A row for each start: the sweep, training losses less MHA's of the same seed, and the range of learning
    rates.
    """
    figure = Figure(figsize=(15, 9), layout="constrained")
    panels = figure.subplots(2, 3)
    for z, start, (sweep, curves, wide) in zip(
        ("", "z"), ("random output projections", "output projections at zero"), panels, strict=True
    ):
        by_stage = {kind: longest([r for r in rows if r["stage"] == z + kind]) for kind in "abc"}
        _by_rate(sweep, by_stage["a"], validation, f"{start}: validation loss (selection)")
        _beside_mha(curves, by_stage["b"])
        _by_rate(wide, by_stage["c"], _end, "last training loss, constant rate")
    for axes in panels.flat:
        axes.set_visible(bool(axes.lines))  # what was not run yet
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    with files.replacing(place, ours=True) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def _beside_mha(axes: Axes, rows: list[dict]) -> None:
    reference = {r["seed"]: smoothed(r["result"]["losses"]) for r in rows if r["arm"] == "MHA"}
    for arm in sorted({r["arm"] for r in rows}):
        mine = [
            smoothed(r["result"]["losses"]) - reference[r["seed"]]
            for r in rows
            if r["arm"] == arm and r["seed"] in reference
        ]
        if mine:
            axes.plot(np.mean(mine, axis=0), label=arm)
    axes.set(
        xlabel="step",
        ylabel="smoothed training loss minus MHA's, nats",
        ylim=(-0.4, 0.6),
        title="equal tokens, mean over seeds",
    )


def longest(rows: list[dict]) -> list[dict]:
    most = max((r["tokens"] for r in rows), default=0)
    return [r for r in rows if r["tokens"] == most]


def _by_rate(axes: Axes, rows: list[dict], value: Callable[[dict], float], label: str) -> None:
    for arm in sorted({r["arm"] for r in rows}):
        rates = sorted({r["lr"] for r in rows if r["arm"] == arm})
        axes.plot(
            rates,
            [statistics.mean(value(r) for r in rows if r["arm"] == arm and r["lr"] == lr) for lr in rates],
            "o-",
            label=arm,
        )
    axes.set(xscale="log", xlabel="learning rate", ylabel="nats per token", title=label)
    shown = sorted({r["lr"] for r in rows})
    axes.set_xticks(shown, [f"{rate:g}" for rate in shown])
    axes.minorticks_off()


def _kept(result: dict) -> dict:
    """Losses smoothed and thinned: files in the repository stay small."""
    smooth = smoothed(result["losses"])
    names = ("steps", "tokens_per_second", "seconds", "diverged", "spikes", "max_grad_norm", "validation")
    return {k: result[k] for k in names} | {
        "curve": [round(float(x), 4) for x in smooth[:: max(1, len(smooth) // 50)]]
    }


def smoothed(losses: list) -> np.ndarray:
    """Mean of the last 5 % of all steps, at every step from the first such window on."""
    width = max(1, round(SMOOTH * len(losses)))
    known = np.array([np.nan if x is None else x for x in losses])
    return np.convolve(known, np.full(width, 1 / width), mode="valid")


def sweep_table(rows: list[dict], stage: str) -> list[str]:
    """Validation loss by arm and learning rate, the chosen one marked, an edge of the grid said."""
    rows = [r for r in rows if r["stage"] == stage]
    best = chosen(rows)
    rates = sorted({r["lr"] for r in rows})
    cells = {(r["arm"], r["lr"]): validation(r) for r in rows}
    lines = (
        [_line("arm", *(f"{lr:g}" for lr in rates), "chosen"), _line(*["---"] * (len(rates) + 2))]
        if rows
        else []
    )
    for arm in dict.fromkeys(r["arm"] for r in sorted(rows, key=lambda r: cells[r["arm"], best[r["arm"]]])):
        shown = [f"{cells[arm, lr]:.4f}" if (arm, lr) in cells else "-" for lr in rates]
        edge = " (edge)" if best[arm] in (rates[0], rates[-1]) else ""
        lines.append(_line(arm, *shown, f"{best[arm]:g}{edge}"))
    return lines


def comparison_table(rows: list[dict], stage: str) -> list[str]:
    """Test loss and its paired differences to MHA and GQA-4, sorted."""
    mine = [r for r in rows if r["stage"] == stage]
    paired = mine if stage[-1] != "r" else [r for r in rows if r["stage"] in (stage[:-1] + "b", stage)]
    by_arm: dict[str, dict[int, dict]] = defaultdict(dict)
    for row in paired:
        by_arm[row["arm"]][row["seed"]] = row
    head = (
        "arm",
        "cache",
        "parameters",
        "lr",
        "test loss",
        "minus MHA",
        "minus GQA-4",
        "steps to MHA's loss",
        "seeds",
    )
    lines = [_line(*head), _line(*["---"] * len(head))] if mine else []
    for arm in sorted(
        {r["arm"] for r in mine}, key=lambda a: statistics.mean(r["test_loss"] for r in by_arm[a].values())
    ):
        found = by_arm[arm]
        first = next(iter(found.values()))
        losses = [r["test_loss"] for r in found.values()]
        ratios = [
            x
            for s, r in found.items()
            if s in by_arm["MHA"]
            for x in [steps_ratio(r, by_arm["MHA"][s])]
            if x is not None
        ]
        lines.append(
            _line(
                *(
                    arm,
                    f"{100 * first['cache_numbers_per_token'] / WHOLE:.1f} %",
                    f"{first['parameters']:,}",
                    f"{first['lr']:g}",
                ),
                *(
                    _interval(losses),
                    *(_interval(_differences(found, by_arm[other])) for other in ("MHA", "GQA-4")),
                ),
                *(_interval(ratios, 2), len(found)),
            )
        )
    return lines


def _differences(mine: dict[int, dict], others: dict[int, dict]) -> list[float]:
    return [
        r["test_loss"] - others[s]["test_loss"] for s, r in mine.items() if s in others and others[s] is not r
    ]


def steps_ratio(row: dict, reference: dict) -> float | None:
    """Steps that the arm needs for the training loss that MHA has at the end of its plateau, over MHA's;
    where it does not get there, the inverse of what MHA needs for the arm's. Both saw the same rows in the
    same order. None when either is missing."""
    mine, its = (smoothed(r["result"]["losses"]) for r in (row, reference))
    plateau = round((1 - DECAY) * len(row["result"]["losses"])) - (len(row["result"]["losses"]) - len(mine))
    if row is reference or plateau < 1 or len(mine) != len(its):
        return None
    reached = np.flatnonzero(mine[:plateau] <= its[plateau - 1])
    if len(reached):
        return float((reached[0] + 1) / plateau)
    back = np.flatnonzero(its[:plateau] <= mine[plateau - 1])
    return float(plateau / (back[0] + 1)) if len(back) else None


def range_table(rows: list[dict], stage: str) -> list[str]:
    """Last smoothed training loss by learning rate (constant after warm-up), the largest one without
    divergence, and the sensitivity: mean over rates of (loss, clipped at the loss of the start, minus the
    best)."""
    mine = [r for r in rows if r["stage"] == stage]
    rates = sorted({r["lr"] for r in mine})
    head = (
        "arm",
        *(f"{lr:g}" for lr in rates),
        "largest stable",
        "sensitivity",
        "spikes",
        "largest gradient norm",
    )
    lines = [_line(*head), _line(*["---"] * len(head))] if mine else []
    for arm in dict.fromkeys(r["arm"] for r in mine):
        cells = {lr: [r for r in mine if r["arm"] == arm and r["lr"] == lr] for lr in rates}
        losses = {lr: statistics.mean(_end(r) for r in found) for lr, found in cells.items() if found}
        stable = [
            lr for lr, found in cells.items() if found and not any(r["result"]["diverged"] for r in found)
        ]
        sensitivity = statistics.mean(x - min(losses.values()) for x in losses.values())
        all_of = [r["result"] for found in cells.values() for r in found]
        shown = [
            (f"{losses[lr]:.3f}" + ("" if lr in stable else " (d)")) if lr in losses else "-" for lr in rates
        ]
        worst = max((r["max_grad_norm"] or math.inf) for r in all_of)
        lines.append(
            _line(
                arm,
                *shown,
                f"{max(stable, default=0):g}",
                f"{sensitivity:.3f}",
                sum(r["spikes"] for r in all_of),
                f"{worst:.1f}",
            )
        )
    return lines


def recovery_table(rows: list[dict], stage: str) -> list[str]:
    """Validation loss of MHA converted, before and after it was trained on, and its test loss beside MHA's
    after as many tokens.
    """
    mine = [r for r in rows if r["stage"] == stage]
    head = (
        "form",
        "cache",
        "MHA trained on",
        "and on",
        "before, validation",
        "after, validation",
        "after, test",
        "minus MHA",
        "seeds",
    )
    lines = [_line(*head), _line(*["---"] * len(head))] if mine else []
    groups: dict[tuple[int, int, str], dict[int, dict]] = defaultdict(dict)
    for row in mine:
        groups[row["source"], row["tokens"], row["arm"]][row["seed"]] = row
    for (source, more, arm), found in sorted(
        groups.items(), key=lambda g: (*g[0][:2], statistics.mean(r["test_loss"] for r in g[1].values()))
    ):
        before, after = (
            [r["result"]["validation"][i]["validation_loss"] for r in found.values()] for i in (0, -1)
        )
        cache = next(iter(found.values()))["cache_numbers_per_token"] / WHOLE
        losses = map(_interval, (before, after, [r["test_loss"] for r in found.values()]))
        beside = _interval(_differences(found, groups[source, more, "MHA"]))
        lines.append(
            _line(arm, f"{100 * cache:.1f} %", f"{source:,}", f"{more:,}", *losses, beside, len(found))
        )
    return lines


def _end(row: dict) -> float:
    """Clipped at the loss of the start, also for a run that broke."""
    losses = row["result"]["losses"]
    start, end = losses[0], smoothed(losses)[-1]
    return start if not math.isfinite(end) else min(start, float(end))


def _interval(values: list[float], digits: int = 4) -> str:
    if not values:
        return "-"
    mean = statistics.mean(values)
    off = half_width(values, least=2)
    return f"{mean:.{digits}f}" + ("" if off is None else f" ±{off:.{digits}f}")


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
