"""Commands that measure: evaluations, benchmarks, the report."""

from __future__ import annotations

import glob
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel

from lowkey.cli.common import (
    BITS,
    AllocatorOptions,
    AsJson,
    Device,
    Dtype,
    Model,
    Seed,
    err,
    head_scores,
    hold,
    policies_of,
    within,
    word_of,
)
from lowkey.cli.plans import Folder, plan_at
from lowkey.cli.tables import notes, show_bench, show_rows
from lowkey.core import files, text
from lowkey.core.progress import bars
from lowkey.evaluate.decode_bench import DecodeShape, decode_bench
from lowkey.evaluate.recall import FORMS
from lowkey.evaluate.recall import USUAL_FORM as USUAL_FORM
from lowkey.evaluate.result import TASKS, USUAL_TASKS, Task, evaluate, evaluation_job
from lowkey.evaluate.settings import Setting, distinct, evicted, full, packed
from lowkey.models import families
from lowkey.models.loading import load
from lowkey.plan.plan import Plan
from lowkey.storage.exact import DEFAULT_WINDOW, Exact

QUESTION = 32  # tokens
RESULTS = Path("results")
FORMS_TOLD = "how recall asks: " + "; ".join(f"{name}: {form.summary}" for name, form in FORMS.items())
OWN = "(default: the plan's own; integers alone"
Sinks = Annotated[
    int | None,
    typer.Option(
        help=within(
            Exact, "sinks", f"first tokens kept exact by plans and integers {OWN} {DEFAULT_WINDOW.sinks})"
        )
    ),
]
Refeed = Annotated[
    bool,
    typer.Option(help="recall, questions: ask again over what was kept, to test the first answer token, too"),
]
Budgets = Annotated[
    str | None,
    typer.Option(
        help="what policies keep: '10%', '64 tokens', or '40 KiB' of all that is held after a prompt; several separated by commas; "
        "fastgen may do without"
    ),
]


def eval_(
    model: Model,
    plan: Annotated[list[Path] | None, typer.Option(help="a plan folder; repeat to compare several")] = None,
    bits: Annotated[list[str] | None, typer.Option(help=BITS)] = None,
    policy: Annotated[
        str | None, typer.Option(help="eviction policies that `lowkey policies` lists, separated by commas")
    ] = None,
    budget: Budgets = None,
    heads: Annotated[
        list[Path] | None, typer.Option(help="a file of head scores that `lowkey heads` wrote")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-O", help="an option of the policies, like recent=4")
    ] = None,
    allocator_option: AllocatorOptions = None,
    refeed: Refeed = True,
    sinks: Sinks = None,
    recent: Annotated[
        int | None,
        typer.Option(
            help=within(Exact, "recent", f"last tokens kept exact, too {OWN} {DEFAULT_WINDOW.recent})")
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="a UTF-8 text file (default: the embedded text); repeat to take windows from each in turn"
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help=f"only these are run: {', '.join(TASKS)} (default: {', '.join(USUAL_TASKS)})"),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="tokens per window and per recall case (default: 512, or all a model takes)"),
    ] = None,
    windows: Annotated[
        int, typer.Option(help=within(Task, "windows", "windows of text to score at most, as far as it goes"))
    ] = 16,
    cases: Annotated[int, typer.Option(help=within(Task, "cases", "recall cases"))] = 20,
    recall_form: Annotated[
        str, typer.Option(help=f"{FORMS_TOLD} (usual: lines with a chat template, else plain)")
    ] = USUAL_FORM,
    questions: Annotated[
        int, typer.Option(help=within(Task, "questions", "questions that the full cache is to answer first"))
    ] = 64,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option(help="result file (default: results/eval-MODEL-TIME.json)")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the full cache, plans, policies and packed integers on the same text: quality, bytes really
    held, and speed if asked for.

    One row for each policy and budget; with a --plan, policies evict on top of it. Interrupted work resumes
    when the same command is given again.
    """
    place = out or _fresh(f"eval-{Path(model).name}-")
    files.check_file(place, "result")
    work = files.work_beside(place)
    given = {} if context is None else {"context": context}
    hold(
        Task,
        windows=windows,
        cases=cases,
        seed=seed,
        questions=questions,
        recall_form=("recall_form", recall_form),
        **given,
    )
    hold(
        Exact, **{name: value for name, value in (("sinks", sinks), ("recent", recent)) if value is not None}
    )
    names = [word_of("task", name, TASKS) for item in task or USUAL_TASKS for name in item.split(",")]
    policies = policies_of(policy, budget, option, allocator_option, heads)
    texts = {str(path): text.read_text(path, "data") for path in data or ()} or {
        "embedded": text.embedded_text("evaluation")
    }
    loaded, tokenizer = load(model, dtype, device)
    context = _usual_context(loaded, names) if context is None else context
    plans = [plan_at(p, loaded) for p in plan or []]
    settings = [full(loaded)] + [p.setting(loaded, None, sinks, recent) for p in plans]
    below: list[tuple[Plan | None, str | None]] = [
        (p.ordinary("policy"), str(p.path)) for p in plans if policies
    ] or [(None, None)]
    scores = head_scores(heads, loaded)
    under = [
        evicted(loaded, wanted, name, context, *p, heads=scores) for name, wanted in policies for p in below
    ]
    settings += under + _integers(loaded, plans, bits, sinks, recent)
    what = Task(
        texts, context, windows, cases, seed, refeed=refeed, questions=questions, recall_form=recall_form
    )
    if out is None:
        job = evaluation_job(loaded, tokenizer, distinct(settings), what, names)
        place, work = _begun(f"eval-{Path(model).name}-", job) or (place, work)
    result = evaluate(loaded, tokenizer, settings, what, names, bars, work)
    files.write_json(place, result, "result")
    files.remove_work(work)
    print(json.dumps(result)) if as_json else show_rows(result)
    for line in (f"result written to {place}", *_late(settings, names), *notes(result)):
        err.print(line, highlight=False, soft_wrap=True)


def _late(settings: Sequence[Setting], names: Sequence[str]) -> list[str]:
    """Why a setting has no perplexity, if one has none."""
    late = [
        s.name for s in settings if s.needs_second_pass and "perplexity" in names and "decode" not in names
    ]
    told = (
        "keeps what repeating the whole context says, which a text read once does not show; add --task decode"
    )
    return [f"{late[0]} has no perplexity: it {told}"] if late else []


def _integers(
    model: PreTrainedModel,
    plans: Sequence[Folder],
    bits: Sequence[str] | None,
    sinks: int | None,
    recent: int | None,
) -> list[Setting]:
    """Latents in packed integers, of the plans that have none of their own, and integers alone."""
    beside = Exact(
        DEFAULT_WINDOW.sinks if sinks is None else sinks, DEFAULT_WINDOW.recent if recent is None else recent
    )
    alone: Sequence[int | str] = bits or (() if families.stores_its_own(model.config) else (8, 4))
    return [p.setting(model, b, sinks, recent) for p in plans if p.bits is None for b in bits or ()] + [
        packed(model, b, beside) for b in alone
    ]


def _fresh(name: str) -> Path:
    """A result file named by the time, which no other command of the same second has taken."""
    stamp = f"{name}{time.strftime('%Y%m%d-%H%M%S')}"
    names = (
        RESULTS / f"{stamp}{more}.json"
        for more in itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
    )
    return next(p for p in names if not (p.exists() or p.with_name(f"{p.name}.partial").exists()))


def _begun(name: str, job: dict) -> tuple[Path, Path] | None:
    """The result file, with the folder for its unfinished work, that this very job was to write when it was
    stopped, if it was.
    """
    for work in sorted(RESULTS.glob(f"{glob.escape(name)}*.json.partial")):
        if (work / files.job_name(job)).is_dir() and not (begun := work.with_suffix("")).exists():
            return begun, files.work_beside(begun)
    return None


def _usual_context(model: PreTrainedModel, tasks: Sequence[str]) -> int:
    """512, or all that a short model has positions for, where recall leaves room for a question and its
    answer.
    """
    longest, room = families.positions(model), QUESTION if "recall" in tasks else 0
    return Task.context if longest is None else max(8, min(Task.context, longest - room))


def decode(
    context: Annotated[
        int, typer.Option(help=within(DecodeShape, "context", "tokens stored per head"))
    ] = 8192,
    head_dim: Annotated[int, typer.Option(help=within(DecodeShape, "head_dim", "channels of a head"))] = 128,
    heads: Annotated[int, typer.Option(help=within(DecodeShape, "heads", "query heads"))] = 32,
    kv_heads: Annotated[int, typer.Option(help=within(DecodeShape, "kv_heads", "KV heads"))] = 8,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "bfloat16",
    budget: Annotated[str, typer.Option(help="what the evicted cache keeps: '10%' or '512 tokens'")] = "10%",
    repeats: Annotated[
        int, typer.Option(help=within(DecodeShape, "repeats", "rounds; medians are shown"))
    ] = 15,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """One decode step of attention: every backend, full and at a budget, against torch's own and this
    machine's reads.
    """
    found = decode_bench(context, head_dim, heads, kv_heads, dtype, budget, repeats, seed)
    print(json.dumps(found)) if as_json else show_bench(found)


def report(
    results: Annotated[list[Path], typer.Argument(help="result files, or folders of them")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the HTML file to write")] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """One self-contained HTML page from result files."""
    from lowkey.report import write_report

    place = write_report(results, out)
    print(json.dumps({"report": str(place)})) if as_json else err.print(
        f"report written to {place}", highlight=False, soft_wrap=True
    )
