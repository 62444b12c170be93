"""The evidence on a real model (docs/results/smollm2.md and eviction.md): every method beside the full cache
and integers, with the same window of exact tokens in each row.

    python benchmarks/evidence.py ranks docs/results/smollm2 --model smollm2 --calibration novels.txt \\
        --data one.txt --data two.txt --data three.txt

A PART of the evidence (`bits`, `ranks`, `trained`, `combined`, `default`, `policies`) becomes OUT/PART.json,
a result file that `lowkey report OUT` reads, and a Markdown table on stdout. Plans and measurements are kept
in OUT/work until all is done; the same command goes on after an interrupt. Intervals (95 %) are over windows
and, where a row has several draws of the calibration text, over draws.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.calibration.calibrate import Sample, calibrate
from lowkey.catalog import make_method, make_policy
from lowkey.core import files, text
from lowkey.core.intervals import half_width
from lowkey.core.progress import bars
from lowkey.core.types import LowkeyError
from lowkey.evaluate.result import Task, evaluate
from lowkey.evaluate.settings import Setting, evicted, full, packed, planned
from lowkey.heads.induction import ECHOES, estimate_echo
from lowkey.heads.retrieval import estimate_heads
from lowkey.heads.scores import HeadScores
from lowkey.models.loading import load
from lowkey.plan.plan import Plan
from lowkey.storage.exact import DEFAULT_WINDOW

BUDGETS = ("50%", "25%", "12.5%")
INTEGERS = ("int8", "int4", "kivi4", "hadamard4", "int2", "kivi2", "hadamard2")


@dataclass(frozen=True)
class Fit:
    """One way to make a plan: a method with options, layout, allocator and bits (its own where None), at some
    budgets.
    """

    label: str
    method: str | None
    options: tuple[tuple[str, str], ...] = ()
    layout: str | None = None
    allocator: str | None = None
    bits: str | None = "none"
    budgets: tuple[str, ...] = ("50%", "25%")
    draws: int = 1


JOINT = (("group", "0"),)
FITS: dict[str, tuple[Fit, ...]] = {
    "ranks": (
        Fit("pca, uniform", "pca", allocator="uniform"),
        Fit("pca", "pca"),
        Fit("pca (pre-RoPE)", "pca", layout="pre_rope"),
        Fit("eigenattention", "eigenattention"),
        Fit("eigenattention, uniform", "eigenattention", allocator="uniform"),
        Fit("kq-svd", "kq-svd"),
        Fit(
            "kq-svd (joint, pre-RoPE), uniform",
            "kq-svd",
            JOINT,
            "pre_rope",
            "uniform",
            budgets=BUDGETS,
            draws=3,
        ),
        Fit("palu", "palu"),
        Fit("recalkv", "recalkv"),
        Fit("lorc", "lorc"),
        Fit("lorc (whitened)", "lorc", (("whiten", "true"),)),
        Fit("kv-latent", "kv-latent"),
        Fit("kv-head-svd", "kv-head-svd", (("whole", "false"),)),
        Fit("mea", "mea"),
        Fit("fisher-svd, uniform", "fisher-svd", allocator="uniform", budgets=BUDGETS),
        Fit("fisher-svd", "fisher-svd", budgets=BUDGETS, draws=3),
    ),
    "trained": (
        Fit("fisher-svd", "fisher-svd", budgets=("25%", "12.5%"), draws=3),
        Fit("stiefattention-joint", "stiefattention-joint", budgets=("25%", "12.5%"), draws=3),
    ),
    "default": (Fit("default", None, bits=None, budgets=("50%", "25%", "18.75%", "12.5%", "8%"), draws=3),),
    "combined": (
        Fit(
            "kq-svd (joint, pre-RoPE), uniform",
            "kq-svd",
            JOINT,
            "pre_rope",
            "uniform",
            "kivi4",
            ("25%", "12.5%"),
        ),
        Fit("pca", "pca", bits="kivi4", budgets=("25%", "12.5%")),
        Fit("fisher-svd", "fisher-svd", bits="int4", budgets=("25%",)),
        Fit("fisher-svd", "fisher-svd", bits="hadamard4", budgets=("25%",)),
        Fit("fisher-svd", "fisher-svd", bits="kivi8", budgets=("25%",)),
        Fit("fisher-svd", "fisher-svd", bits="kivi2", budgets=("18.75%", "12.5%")),
        Fit("fisher-svd", "fisher-svd", bits="hadamard2", budgets=("12.5%",)),
    ),
}
POLICIES = (
    *(
        "snapkv",
        "pyramidkv",
        "ada-kv",
        "headkv-r",
        "headkv-r2",
        "kvzip",
        "expected-attention",
        "curdkv",
        "h2o",
        "tova",
        "streamingllm",
    ),
    *("kv-compress", "fastgen", "razor", "think", "knorm", "keydiff", "dropkv", "random"),
)
# of heads, that a policy reads
SCORES = {"headkv-r": ("copy",), "headkv-r2": ("r2",), "razor": ("induction", "echo")}
# of a part; a window read in one piece says nothing of what is evicted
TASKS = {"policies": "recall,questions"}
app = typer.Typer(add_completion=False)


@app.command()
def run(
    part: Annotated[str, typer.Argument(help=f"{', '.join([*FITS, 'bits', 'policies'])}")],
    out: Path,
    model: str = "smollm2",
    calibration: Annotated[Path | None, typer.Option(help="a UTF-8 text (default: the embedded one)")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="held-out texts; repeat")] = None,
    context: int = 1024,
    windows: int = 12,
    calibration_windows: int = 32,
    length: int = 512,
    tasks: Annotated[str, typer.Option(help="default: perplexity, or recall,questions for policies")] = "",
    cases: int = 40,
    only: Annotated[str, typer.Option(help="labels of this part, separated by semicolons")] = "",
    budget: Annotated[str, typer.Option(help="of policies")] = "25%",
    dtype: str = "auto",
) -> None:
    """Measure one part and print its table."""
    loaded, tokenizer = load(model, dtype, "cpu")
    words = text.read_text(calibration, "calibration") if calibration else text.embedded_text("calibration")
    texts = {path.name: text.read_text(path, "data") for path in data or ()} or {
        "embedded": text.embedded_text("evaluation")
    }
    task = Task(texts, context, windows, cases)
    work, place = out / "work", out / f"{part}.json"
    work.mkdir(parents=True, exist_ok=True)
    settings, about = [full(loaded)], dict[str, dict]()
    if part == "bits":
        settings += [packed(loaded, bits, DEFAULT_WINDOW) for bits in INTEGERS]
    elif part == "policies":
        settings += _policies(loaded, tokenizer, context, budget, work, only)
    else:
        for fit in FITS[part]:
            if not only or fit.label in only.split(";"):
                for setting, known in _plans(
                    fit, loaded, tokenizer, words, Sample(calibration_windows, length), work
                ):
                    settings.append(setting)
                    about[setting.identity["plan"]] = known
    names = (tasks or TASKS.get(part, "perplexity")).split(",")
    result = evaluate(
        loaded, tokenizer, settings, task, names, bars, files.job_folder(work, {"part": part, "only": only})
    )
    for row in result["rows"]:
        row |= about.get(row["plan"], {"label": row["name"], "draw": 0, "fit_seconds": None})
        # surfaces and spectra are in the plans
        row["chosen"] = (row.pop("profile", None) or {}).get("chosen")
    files.write_json(place, result, "result", ours=True)
    print(table(result["rows"]))


def _plans(
    fit: Fit,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    words: str,
    sample: Sample,
    work: Path,
) -> Iterator[tuple[Setting, dict]]:
    """Settings of the plans of every budget and draw, and what the table says of them; plans are read back
    when they were made before.
    """
    for draw in range(fit.draws):
        for budget in fit.budgets:
            name = _slug(f"{fit.label}-{fit.bits}-{budget}-{draw}")
            folder, timed, start = work / name, work / f"{name}.json", time.perf_counter()
            try:
                if not timed.exists():
                    calibrate(
                        *(model, tokenizer, words),
                        method=None if fit.method is None else make_method(fit.method, dict(fit.options)),
                        budget=budget,
                        allocator=fit.allocator,
                        layout=fit.layout,  # type: ignore[arg-type]
                        bits=fit.bits,
                        ranks=None,
                        sample=replace(sample, seed=draw),
                        work=work / _slug(f"fitting-{fit.label}-{draw}"),  # the same for every budget
                        progress=bars,
                    ).save(folder, force=True)
                    timed.write_text(json.dumps(time.perf_counter() - start))
                plan = Plan.load(folder, model)
            except LowkeyError as error:
                print(f"{fit.label} {budget}: {error}", flush=True)
                continue
            label = fit.label if plan.bits is None or fit.method is None else f"{fit.label} + {plan.bits}"
            known = {"label": f"{label} {budget}", "draw": draw, "fit_seconds": json.loads(timed.read_text())}
            yield planned(model, plan, str(folder)), known


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def _policies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    budget: str,
    work: Path,
    only: str,
) -> Iterator[Setting]:
    for name in POLICIES:
        if only and name not in only.split(";"):
            continue
        try:
            scores = {kind: _scores(model, tokenizer, kind, context, work) for kind in SCORES.get(name, ())}
            yield evicted(model, make_policy(name, budget, {}), name, context, heads=scores or None)
        except LowkeyError as error:
            print(f"{name}: {error}", flush=True)


def _scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str, context: int, work: Path
) -> list[list[float]]:
    """Importance of the model's own heads, from cases half as long as the context; read back when it was
    measured before.
    """
    place = work / f"heads-{kind}.json"
    if not place.exists():
        how = {"kind": kind, "context": context // 2, "progress": bars}
        found = (
            estimate_echo(model, tokenizer, **how)
            if kind in ECHOES
            else estimate_heads(model, tokenizer, cases=40, **how)
        )
        found.save(place)
    return HeadScores.load(place, model).per_kv_head().tolist()


def table(rows: list[dict]) -> str:
    """Markdown: one line for each label, its draws in the mean; intervals over draws, or over windows where
    there is one draw.
    """
    shown = [
        c for c in ("perplexity", "kl", "exact_match", "questions") if any(r.get(c) is not None for r in rows)
    ]
    lines = ["| cache | bytes | " + " | ".join(shown) + " | fit, s |", "|---" * (len(shown) + 3) + "|"]
    for label in dict.fromkeys(r["label"] for r in rows):
        group = [r for r in rows if r["label"] == label]
        kept = statistics.mean(r["bytes_held"] / r["bytes_full"] for r in group)
        fit = [r["fit_seconds"] for r in group if r["fit_seconds"] is not None]
        cells = [_cell(group, c) for c in shown] + [f"{max(fit):.0f}" if fit else ""]
        lines.append(f"| {label} | {100 * kept:.1f} % | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(rows: list[dict], column: str) -> str:
    values = [r[column] for r in rows if r.get(column) is not None]
    if not values:
        return "-"
    mean = statistics.mean(values)
    spread = half_width(values) if len(values) > 2 else rows[0].get(f"{column}_95")
    digits = 2 if mean >= 1 else 4
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


if __name__ == "__main__":
    app()
