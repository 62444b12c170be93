"""What a little training through the compressed cache brings back.

    python benchmarks/recovery.py MODEL OUT.json [--calibration FILE --data FILE --steps 200 --plans "a;b"]

Each plan: perplexity and recall before and after LoRA through the plan, for each schedule of objectives.
`full` is the model itself, given the same training without compression, so that what training on this text
does by itself can be told from recovery. Resumable: what is in OUT.json is not run again.
"""

from __future__ import annotations

import json
import time
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.calibration.calibrate import Sample, calibrate
from lowkey.calibration.recover import Recovery, recover
from lowkey.catalog import make_method
from lowkey.core import files, text
from lowkey.core.progress import bars
from lowkey.core.types import Layout
from lowkey.evaluate.result import Task, evaluate
from lowkey.evaluate.settings import full, planned
from lowkey.models.loading import load
from lowkey.plan.plan import Plan

PLANS: dict[str, tuple[str, dict[str, str], Layout, str]] = {  # label: method, options, layout, budget
    "full": ("pca", {}, "post_rope", "100%"),
    "kv-head-svd, half the heads": ("kv-head-svd", {}, "post_rope", "50%"),
    "kv-head-svd, half the heads, exportable": ("kv-head-svd", {"keys": "commuting"}, "post_rope", "50%"),
    "kv-head-svd, half the heads, weight SVD": (
        "kv-head-svd",
        {"keys": "grouped", "basis": "weights"},
        "post_rope",
        "50%",
    ),
    "kv-head-svd, half the heads, mean": (
        "kv-head-svd",
        {"keys": "grouped", "basis": "mean"},
        "post_rope",
        "50%",
    ),
    "mea, half the heads": ("mea", {"basis": "activations"}, "post_rope", "50%"),
    "mea (weights), half the heads": ("mea", {"basis": "weights"}, "post_rope", "50%"),
    "mea (aligned), half the heads": ("mea", {"basis": "aligned"}, "post_rope", "50%"),
    "kv-latent, 50%": ("kv-latent", {}, "post_rope", "50%"),
    "pca (K per head), 50%": ("pca", {"key_bases": "per_head"}, "post_rope", "50%"),
}
SHOWN = ("perplexity", "perplexity_decode", "exact_match")


def main(
    model: str,
    out: Path,
    calibration: Annotated[Path | None, typer.Option(help="text to calibrate and train on")] = None,
    data: Annotated[Path | None, typer.Option(help="text to judge on")] = None,
    plans: Annotated[str, typer.Option(help="labels, separated by semicolons; all when not given")] = "",
    schedules: str = "ce;kl;distill,ce",
    steps: int = 200,
    length: int = 256,
    lr: float = 1e-3,
    seeds: int = 1,
    context: int = 512,
    windows: int = 16,
    cases: int = 20,
) -> None:
    """Measure and print the table."""
    loaded, tokenizer = load(model, "auto", "cpu")
    corpus = text.read_text(calibration, "calibration") if calibration else text.embedded_text("calibration")
    judged = text.read_text(data, "data") if data else text.embedded_text("evaluation")
    task = Task({str(data or "embedded"): judged}, context, windows, cases)
    found = json.loads(out.read_text()) if out.exists() else {"rows": []}
    done = {(r["label"], r["schedule"], r["seed"]) for r in found["rows"]}
    for label, seed in product(plans.split(";") if plans else PLANS, range(seeds)):
        plan = plan_of(loaded, tokenizer, corpus, label, seed)
        for schedule in ["", *schedules.split(";")]:
            if (label, schedule, seed) not in done:
                settings = (
                    Recovery(stages(schedule, steps), length=length, lr=lr, seed=seed) if schedule else None
                )
                row = measured(loaded, tokenizer, corpus, plan, settings, task)
                found["rows"].append({"label": label, "schedule": schedule, "seed": seed, **row})
                files.write_json(out, found, "benchmark", ours=True)
    print(table(found["rows"]))


def stages(schedule: str, steps: int) -> tuple[tuple[str, int], ...]:
    """The objectives of a schedule share the steps."""
    names = schedule.split(",")
    return tuple((name, steps // len(names)) for name in names)


def plan_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: str, label: str, seed: int
) -> Plan:
    method, options, layout, budget = PLANS[label]
    chosen = make_method(method, options)
    sample = Sample(24, 512, seed)
    return calibrate(
        model,
        tokenizer,
        corpus,
        method=chosen,
        budget=budget,
        layout=layout,
        ranks=8,
        sample=sample,
        sinks=0,
        recent=0,
        progress=bars,
    )


def measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: str,
    plan: Plan,
    settings: Recovery | None,
    task: Task,
) -> dict:
    """Quality through the plan; after training when there are settings for it."""
    start, losses = time.perf_counter(), []
    if settings is not None:
        trained = recover(model, tokenizer, plan, corpus, settings=settings, progress=bars)
        model, plan, losses = trained.model, trained.plan, trained.losses
    seconds = time.perf_counter() - start
    row = evaluate(
        model,
        tokenizer,
        [full(model), planned(model, plan, "")],
        task,
        ["perplexity", "decode", "recall"],
        bars,
    )["rows"][1]
    kept = row["bytes_held"] / row["bytes_full"]
    return {
        **{name: row[name] for name in SHOWN},
        "kept": kept,
        "seconds": seconds,
        "losses": [r["loss"] for r in losses[:: max(1, len(losses) // 20)]],
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| plan | training | kept | " + " | ".join(SHOWN) + " | seconds |",
        "|---" * (len(SHOWN) + 4) + "|",
    ]
    for r in rows:
        numbers = [f"{100 * r['kept']:.1f}%", *(f"{r[name]:.2f}" for name in SHOWN), f"{r['seconds']:.0f}"]
        lines.append(f"| {r['label']} | {r['schedule'] or '-'} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
