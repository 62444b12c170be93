"""Every basis under the same allocator at equal stored bytes, over several calibration seeds.

    python benchmarks/equal_bytes.py MODEL OUT.json [--calibration FILE --data FILE --dtype float32 ...]

Writes the measured rows as JSON and prints a Markdown table: mean and 95 % interval (Student's t over seeds). Resumable:
a (method, seed) whose rows are in OUT.json is not run again.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey import files, text
from lowkey.calibrate import Sample, calibrate
from lowkey.evaluate.result import Task, evaluate
from lowkey.evaluate.settings import full, packed, planned
from lowkey.loading import load, make_method
from lowkey.progress import bars
from lowkey.types import Layout

METHODS = {
    "pca": ("pca", {}),
    "pca (K per head)": ("pca", {"key_bases": "per_head"}),
    "eigenattention": ("eigenattention", {}),
    "eigenattention (code form)": ("eigenattention", {"form": "code"}),
    "stiefattention": ("stiefattention", {}),
    "stiefattention (K per head)": ("stiefattention", {"key_bases": "per_head"}),
}
BUDGETS = ("75%", "50%", "37.5%")
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # two-sided 95 % quantiles of Student's t for n samples
SHOWN = ("layer_error", "perplexity", "perplexity_decode", "kl", "top1_agreement", "exact_match")

app = typer.Typer(add_completion=False)


@app.command()
def run(
    model: str,
    out: Path,
    calibration: Annotated[Path | None, typer.Option()] = None,
    data: Annotated[Path | None, typer.Option()] = None,
    seeds: int = 3,
    context: int = 512,
    length: int = 512,
    calibration_windows: int = 24,
    windows: int = 16,
    cases: int = 20,
    dtype: str = "auto",
    layout: str = "post_rope",
    allocator: str = "greedy",
    tasks: str = "perplexity,layers,recall",
) -> None:
    """Measure and print the table."""
    names = tasks.split(",")
    loaded, tokenizer = load(model, dtype, "cpu")
    corpus = text.read_text(calibration, "calibration") if calibration else text.embedded("calibration")
    judged = text.read_text(data, "data") if data else text.embedded("evaluation")
    task = Task(judged, str(data or "embedded"), context, windows, cases)
    found = json.loads(out.read_text()) if out.exists() else {"rows": []}
    done = {(row["label"], row["seed"]) for row in found["rows"]}
    reference = [full(loaded), packed(loaded, 8), packed(loaded, 4)]
    if ("full", 0) not in done:
        result = evaluate(loaded, tokenizer, reference, task, names, bars)
        found["environment"] = result["environment"]
        _append(found, out, [r | {"label": r["name"], "seed": 0, "fit_seconds": 0.0} for r in result["rows"]])
    for label, (name, options) in METHODS.items():
        for seed in range(seeds):
            if (label, seed) not in done:
                sample = Sample(calibration_windows, length, seed)
                rows = _method(loaded, tokenizer, corpus, (name, options), sample, task, names, layout, allocator)
                _append(found, out, [r | {"label": label, "seed": seed} for r in rows])
    print(table(found["rows"]))


def _append(found: dict, out: Path, rows: list[dict]) -> None:
    found["rows"] += [{k: v for k, v in r.items() if k != "profile"} | {"chosen": (r.get("profile") or {}).get("chosen")} for r in rows]
    files.write_json(out, found)


def _method(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: str,
    method: tuple,
    sample: Sample,
    task: Task,
    names: list[str],
    layout: Layout,
    allocator: str,
) -> list[dict]:
    """Rows of one fitted basis at every budget; the basis is fitted once and its fitting time is the first budget's."""
    with tempfile.TemporaryDirectory() as work:
        plans, seconds = [], []
        for budget in BUDGETS:
            start = time.perf_counter()
            chosen = make_method(*method)
            plans.append(
                calibrate(
                    *(model, tokenizer, corpus),
                    method=chosen,
                    budget=budget,
                    sample=sample,
                    layout=layout,
                    allocator=allocator,
                    work=Path(work),
                    progress=bars,
                )
            )
            seconds.append(time.perf_counter() - start)
        settings = [planned(model, p, "") for p in plans]
        rows = evaluate(model, tokenizer, [full(model), *settings], task, names, bars)["rows"][1:]
    return [r | {"fit_seconds": seconds[0]} for r in rows]


def table(rows: list[dict]) -> str:
    """Markdown, references first, then by budget and layer error."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["budget"] or row["label"], row["label"]), []).append(row)
    lines = ["| kept | setting | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 2) + "|"]
    for (_, label), group in sorted(groups.items(), key=_order):
        kept = statistics.mean(r["bytes_held"] / r["bytes_full"] for r in group)
        lines.append(f"| {100 * kept:.1f}% | {label} | " + " | ".join(_cell([r[c] for r in group]) for c in SHOWN) + " |")
    return "\n".join(lines)


def _order(item: tuple) -> tuple:
    group = item[1]
    return group[0]["method"] is not None, -group[0]["bytes_held"], statistics.mean(r["layer_error"] for r in group)


def _cell(values: list) -> str:
    if any(v is None for v in values):
        return "-"
    mean = statistics.mean(values)
    digits = 2 if mean >= 10 else 3 if mean >= 1 else 4
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ±{T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


if __name__ == "__main__":
    app()
