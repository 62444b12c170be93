"""Every basis under the same allocator at equal stored bytes, over several calibration seeds.

    python benchmarks/equal_bytes.py MODEL OUT.json [--calibration FILE --data FILE --dtype float32 ...]

Writes the measured rows as JSON and prints a Markdown table: mean and 95 % interval (Student's t over seeds).
Resumable: a (method, seed) whose rows are in OUT.json is not run again.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.calibration.calibrate import Sample, calibrate
from lowkey.calibration.dynamic import make_dynamic_plan
from lowkey.catalog import make_method
from lowkey.core import files, text
from lowkey.core.intervals import half_width
from lowkey.core.progress import bars
from lowkey.core.types import Layout, LowkeyError
from lowkey.evaluate.result import Task, evaluate
from lowkey.evaluate.settings import full, packed, planned
from lowkey.methods.dynakv import GateTraining
from lowkey.models.loading import load
from lowkey.storage.exact import Exact
from lowkey.storage.packing import scheme

METHODS: dict[str, tuple[str, dict[str, str], Layout]] = {  # label: method, options, layout
    "pca": ("pca", {}, "post_rope"),
    "pca (pre-RoPE)": ("pca", {}, "pre_rope"),
    "pca (K per head)": ("pca", {"key_bases": "per_head"}, "post_rope"),
    "pca (K per head, pre-RoPE)": ("pca", {"key_bases": "per_head"}, "pre_rope"),
    "eigenattention": ("eigenattention", {}, "post_rope"),
    "eigenattention (pre-RoPE)": ("eigenattention", {}, "pre_rope"),
    "stiefattention": ("stiefattention", {"parametrisation": "free"}, "post_rope"),
    "stiefattention (pre-RoPE)": ("stiefattention", {"parametrisation": "free"}, "pre_rope"),
    "stiefattention (K per head)": (
        "stiefattention",
        {"parametrisation": "free", "key_bases": "per_head"},
        "post_rope",
    ),
    "stiefattention (K per head, pre-RoPE)": (
        "stiefattention",
        {"parametrisation": "free", "key_bases": "per_head"},
        "pre_rope",
    ),
    "kq-svd": ("kq-svd", {}, "post_rope"),
    "kq-svd (output-aware)": ("kq-svd", {"weighting": "outputs"}, "post_rope"),
    "kq-svd (joint)": ("kq-svd", {"group": "6"}, "post_rope"),
    "kq-svd (joint, pre-RoPE)": ("kq-svd", {"group": "6"}, "pre_rope"),
    "kq-svd (joint, pre-RoPE, output-aware)": ("kq-svd", {"group": "6", "weighting": "outputs"}, "pre_rope"),
    "palu": ("palu", {}, "pre_rope"),
    "recalkv": ("recalkv", {}, "pre_rope"),
    "lorc": ("lorc", {}, "pre_rope"),
    "lorc (whitened)": ("lorc", {"whiten": "true"}, "pre_rope"),
    "kv-head-svd": ("kv-head-svd", {"whole": "false"}, "post_rope"),
    "kv-head-svd (pre-RoPE)": ("kv-head-svd", {"whole": "false"}, "pre_rope"),
    "kv-head-svd (similar, pre-RoPE)": ("kv-head-svd", {"whole": "false", "heads": "similar"}, "pre_rope"),
    "kv-head-svd (grouped)": ("kv-head-svd", {"whole": "false", "keys": "grouped"}, "post_rope"),
    "kv-head-svd (commuting)": ("kv-head-svd", {"keys": "commuting"}, "post_rope"),
    "mea": ("mea", {"basis": "activations"}, "post_rope"),
    "mea (weights)": ("mea", {}, "post_rope"),
    "mea (aligned)": ("mea", {"basis": "aligned"}, "post_rope"),
    "kv-latent": ("kv-latent", {}, "post_rope"),
    "kv-latent (data, V by PCA)": ("kv-latent", {"choose": "data", "values": "pca"}, "post_rope"),
    "matryoshka": ("matryoshka", {}, "post_rope"),
}
# label: method label, allocator; the paper's schedule of LoRC and the straight line in depth that it was
# compared with
SCHEDULES = {
    f"{label}, {allocator}": (label, allocator)
    for label in ("lorc", "lorc (whitened)")
    for allocator in ("condition", "depth")
}
# label: options
DYNAMIC: dict[str, dict] = {"dynakv (K per head, pre-RoPE)": {"layout": "pre_rope", "key_bases": "per_head"}}
BUDGETS = ("75%", "50%", "37.5%", "25%")
PACKED = ("int8", "int4", "kivi4", "hadamard4", "int2", "kivi2", "hadamard2")  # alone
# of latents, by the budget of the plan
ON_TOP = {"75%": ("int4", "kivi4", "kivi2"), "50%": ("int4", "kivi4", "kivi2")}
GATE_STEPS, GATE_BUDGETS = 100, ("50%", "37.5%")  # of training the gates, which starts anew for every budget
SHOWN = (
    "perplexity",
    "kl",
    "exact_match",
    "perplexity_decode",
    "layer_error",
    "top1_agreement",
    "fit_seconds",
)

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
    allocator: str = "greedy",
    methods: Annotated[str, typer.Option(help="labels, separated by semicolons; all when not given")] = "",
    tasks: str = "perplexity,decode,layers,recall,speed",
    recent: Annotated[
        int,
        typer.Option(
            help="last tokens kept exact in every setting, in the place of KIVI's own; give another OUT.json"
        ),
    ] = 0,
) -> None:
    """Measure and print the table."""
    names = tasks.split(",")
    loaded, tokenizer = load(model, dtype, "cpu")
    corpus = text.read_text(calibration, "calibration") if calibration else text.embedded_text("calibration")
    judged = text.read_text(data, "data") if data else text.embedded_text("evaluation")
    task = Task({str(data or "embedded"): judged}, context, windows, cases)
    found = json.loads(out.read_text()) if out.exists() else {"rows": []}
    done = {(row["label"], row["seed"]) for row in found["rows"]}
    names_done = {label for label, _ in done}
    exact = Exact(recent=recent) if recent else None
    alone = (packed(loaded, b, exact or Exact(recent=scheme(b).recent)) for b in PACKED)
    reference = [s for s in (full(loaded), *alone) if s.name not in names_done]
    if reference:
        reference = [full(loaded), *(s for s in reference if s.name != "full")]
        result = evaluate(loaded, tokenizer, reference, task, names, bars)
        found["environment"] = result["environment"]
        rows = [r for r in result["rows"] if r["name"] not in names_done]
        _append(found, out, [r | {"label": r["name"], "seed": 0, "fit_seconds": 0.0} for r in rows])
    wanted = methods.split(";") if methods else [*METHODS, *SCHEDULES, *DYNAMIC]
    for seed, label in product(range(seeds), wanted):
        if (label, seed) in done:
            continue
        sample = Sample(calibration_windows, length, seed)
        try:
            if label in DYNAMIC:
                rows = _dynamic(loaded, tokenizer, corpus, DYNAMIC[label], sample, task, names)
            else:
                plain, split = SCHEDULES.get(label, (label, allocator))
                rows = _method(loaded, tokenizer, corpus, METHODS[plain], sample, task, names, split, exact)
        except LowkeyError as error:
            print(f"{label}: {error}", flush=True)
            continue
        _append(found, out, [r | {"label": label, "seed": seed} for r in rows])
    print(table(found["rows"]))


def _append(found: dict, out: Path, rows: list[dict]) -> None:
    found["rows"] += [
        {k: v for k, v in r.items() if k != "profile"} | {"chosen": (r.get("profile") or {}).get("chosen")}
        for r in rows
    ]
    files.write_json(out, found, "benchmark", ours=True)


def _method(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: str,
    method: tuple[str, dict[str, str], Layout],
    sample: Sample,
    task: Task,
    names: list[str],
    allocator: str,
    exact: Exact | None,
) -> list[dict]:
    """Rows of one fitted basis at every budget it can meet, and of its latents in integers; its fitting time
    is the first budget's.
    """
    name, options, layout = method
    settings, seconds = [full(model)], []
    with tempfile.TemporaryDirectory() as work:
        for budget in BUDGETS:
            start = time.perf_counter()
            try:
                plan = calibrate(
                    *(model, tokenizer, corpus),
                    method=make_method(name, options),
                    budget=budget,
                    ranks=8,  # the same candidates for all
                    sample=sample,
                    layout=layout,
                    allocator=allocator,
                    sinks=0,
                    recent=0,
                    work=Path(work),
                    progress=bars,
                )
            except LowkeyError as error:
                print(f"{name} {options} {budget}: {error}", flush=True)
                continue
            seconds.append(time.perf_counter() - start)
            settings += [planned(model, plan, "", bits, exact) for bits in (None, *ON_TOP.get(budget, ()))]
    if len(settings) == 1:
        raise LowkeyError("no budget is within reach")
    rows = evaluate(model, tokenizer, settings, task, names, bars)["rows"][1:]
    return [r | {"fit_seconds": seconds[0]} for r in rows]


def _dynamic(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: str,
    options: dict,
    sample: Sample,
    task: Task,
    names: list[str],
) -> list[dict]:
    """Rows of a rank for every token, its gates trained anew for every budget."""
    settings, seconds = [full(model)], []
    for budget in GATE_BUDGETS:
        start = time.perf_counter()
        training = GateTraining(target=float(budget[:-1]) / 100, steps=GATE_STEPS, seed=sample.seed)
        try:
            plan = make_dynamic_plan(
                model, tokenizer, corpus, sample=sample, training=training, progress=bars, **options
            )
        except LowkeyError as error:
            print(f"dynakv {budget}: {error}", flush=True)
            continue
        seconds.append(time.perf_counter() - start)
        settings.append(planned(model, plan, ""))
    rows = evaluate(model, tokenizer, settings, task, names, bars)["rows"][1:]
    return [r | {"fit_seconds": s} for r, s in zip(rows, seconds, strict=True)]


def table(rows: list[dict]) -> str:
    """Markdown, by bytes kept and, within them, by perplexity."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        label = row["label"] + (f" + {row['packing']}" if row["method"] and row.get("packing") else "")
        groups.setdefault((row["budget"] or row["label"], label), []).append(row)
    lines = ["| kept | setting | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 2) + "|"]
    for (_, label), group in sorted(groups.items(), key=_order):
        kept = statistics.mean(r["bytes_held"] / r["bytes_full"] for r in group)
        lines.append(
            f"| {100 * kept:.1f}% | {label} | "
            + " | ".join(_cell([r[c] for r in group]) for c in SHOWN)
            + " |"
        )
    return "\n".join(lines)


def _order(item: tuple) -> tuple:
    group = item[1]
    return -round(statistics.mean(r["bytes_held"] / r["bytes_full"] for r in group), 2), statistics.mean(
        r["perplexity"] for r in group
    )


def _cell(values: list) -> str:
    if any(v is None for v in values):
        return "-"
    mean = statistics.mean(values)
    digits = 2 if mean >= 10 else 3 if mean >= 1 else 4
    off = half_width(values)
    return f"{mean:.{digits}f}" + ("" if off is None else f" ±{off:.{digits}f}")


if __name__ == "__main__":
    app()
