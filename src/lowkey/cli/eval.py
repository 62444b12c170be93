"""`lowkey eval`: quality, bytes and speed of caches on the same text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowkey.cli import choices
from lowkey.cli.checks import (
    check_bits,
    check_model_options,
    check_plan,
    check_policies,
    check_settings,
    check_word,
    with_range,
)
from lowkey.cli.console import note
from lowkey.cli.harness import (
    BatchSize,
    Chat,
    Chunk,
    DataFolder,
    HarnessTasks,
    Limit,
    MaxLength,
    Protocol,
    Shots,
    check_harness,
)
from lowkey.cli.options import (
    CACHE,
    EMBEDDED_TEXT,
    EXACT,
    MEASURING,
    OUTPUT,
    POLICY,
    AsJson,
    Device,
    Dtype,
    GateFolders,
    HeadFiles,
    MeasuringSeed,
    Model,
    PolicyOptions,
    SmallModel,
    TokenAllocatorOptions,
)
from lowkey.cli.result_paths import interrupted_result, unused_result_path
from lowkey.core import files, text
from lowkey.core.errors import LowkeyError
from lowkey.core.processes import ALONE, Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowkey.evaluate.settings import Setting
    from lowkey.plan.plan import Plan

QUESTION = 32  # tokens that recall's question and answer may take
LONG = 4096  # tokens of prompts that suites make
PLAN_DEFAULT = "(default: the plan's own; of integers alone {})"
RECALL_FORMS = "; ".join(f"{name}: {summary}" for name, summary in choices.RECALL_FORMS.items())


def eval_(
    session: typer.Context,
    model: Model,
    plan: Annotated[
        list[Path] | None,
        typer.Option(metavar="PLAN", help="a plan folder; repeat to compare several", rich_help_panel=CACHE),
    ] = None,
    bits: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="also packed integers, alone and over each plan, in the place of its own: "
            f"{', '.join(choices.SCHEMES)}; {choices.NO_BITS}: plans without their own; repeat for several "
            "(default: int8 and int4, alone)",
            rich_help_panel=CACHE,
        ),
    ] = None,
    sinks: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=with_range(
                "Exact", "sinks", f"first tokens kept exact {PLAN_DEFAULT.format(choices.SINKS)}"
            ),
            rich_help_panel=EXACT,
        ),
    ] = None,
    recent: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=with_range(
                "Exact", "recent", f"last tokens kept exact {PLAN_DEFAULT.format(choices.RECENT)}"
            ),
            rich_help_panel=EXACT,
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="eviction policies that `lowkey policies` lists, or package.module:Class, separated by "
            f"commas; {choices.NO_POLICY}: plans without their own",
            rich_help_panel=POLICY,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES",
            help="what policies keep: '10%', '64 tokens', or '40 KiB' of everything that is held after a "
            "prompt; several separated by commas; fastgen takes none",
            rich_help_panel=POLICY,
        ),
    ] = None,
    option: PolicyOptions = None,
    allocator_option: TokenAllocatorOptions = None,
    heads: HeadFiles = None,
    gates: GateFolders = None,
    small_model: SmallModel = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help=f"what is measured: {', '.join(choices.TASKS)}; several separated by commas "
            f"(default: {', '.join(choices.USUAL_TASKS)})",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help=f"text to measure on: {EMBEDDED_TEXT}; repeat to take windows from each in turn",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=with_range(
                "Task",
                "context",
                "tokens per window and per recall case (default: 512, or as many as the model has positions)",
            ),
            rich_help_panel=MEASURING,
        ),
    ] = None,
    windows: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range("Task", "windows", "number of windows to score at most; a short text has fewer"),
            rich_help_panel=MEASURING,
        ),
    ] = 16,
    cases: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range("Task", "cases", "number of recall cases, and of each kind of behaviour"),
            rich_help_panel=MEASURING,
        ),
    ] = 20,
    recall_form: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"how recall asks: {RECALL_FORMS} ({choices.USUAL_RECALL_FORM}: lines with a chat template, "
            "else plain)",
            rich_help_panel=MEASURING,
        ),
    ] = choices.USUAL_RECALL_FORM,
    questions: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range(
                "Task", "questions", "number of questions, of which those count that the full cache answers"
            ),
            rich_help_panel=MEASURING,
        ),
    ] = 64,
    refeed: Annotated[
        bool,
        typer.Option(
            help="recall, questions and behaviour: ask again over what was kept, so that the first token of "
            "the answer is tested too",
            rich_help_panel=MEASURING,
        ),
    ] = True,
    seed: MeasuringSeed = 0,
    harness: HarnessTasks = None,
    protocol: Protocol = choices.ASK_AFTER,
    limit: Limit = None,
    batch_size: BatchSize = 1,
    chunk: Chunk = None,
    max_length: MaxLength = None,
    shots: Shots = None,
    chat: Chat = False,
    data_dir: DataFolder = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="the result file (default: results/eval-MODEL-TIME.json)",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what compression costs: quality, bytes, speed.

    The full cache, plans, policies and packed integers are measured on the same text, with one row for each
    policy and budget. With --plan, policies evict on top of it. With --harness, tasks of lm-eval are measured
    instead of --task. Interrupted work resumes when the same command is given again. Under `accelerate
    launch` several processes share the samples.
    """
    measuring = {"protocol": protocol, "limit": limit, "batch_size": batch_size, "chunk": chunk}
    measuring |= {"max_length": max_length, "shots": shots, "chat": chat}
    wanted = check_harness(harness, task, data_dir, measuring)
    names = [name for item in task or choices.USUAL_TASKS for name in item.split(",")]
    for name in names:
        check_word("task", name, choices.TASKS)
    counts = {"windows": windows, "cases": cases, "questions": questions, "seed": seed}
    check_settings("Task", context=context, recall_form=recall_form, **counts)
    check_settings("Exact", sinks=sinks, recent=recent)
    for scheme in bits or ():
        check_bits(scheme, also=[choices.NO_BITS])
    check_policies(policy, budget, option, allocator_option, heads, gates, small_model)
    whole = _leaves_out_policies(plan, policy, bits)
    check_model_options(model, dtype, device)
    for folder in plan or ():
        check_plan(folder)
    texts = {str(path): text.read_text(path, "data") for path in data or ()} or {
        "embedded": text.embedded_text("evaluation")
    }
    place = out or unused_result_path(f"eval-{Path(model).name}-")
    files.check_file(place, "result")
    work = files.work_beside(place)

    if wanted:
        from lowkey.cli.harness_run import run_harness
    from lowkey.cli.loading import head_scores, learnt_gates, make_policies, open_model, open_small_model
    from lowkey.core.progress import bars
    from lowkey.evaluate.result import Task, evaluate, evaluation_job
    from lowkey.evaluate.settings import distinct
    from lowkey.plan.plan import Plan

    policies = make_policies(policy, budget, option, allocator_option)
    processes: Processes = session.obj or ALONE
    device = processes.device(device)
    loaded, tokenizer = open_model(model, dtype, device)
    small = open_small_model(small_model, policies, tokenizer, dtype, device)
    context = _usual_context(loaded, names, wanted) if context is None else context
    plans = [(Plan.load(folder, loaded), str(folder)) for folder in plan or ()]
    beside = {"heads": head_scores(heads, loaded), "gates": learnt_gates(gates), "small": small}
    length = None if wanted else context  # prompts of tasks differ in length
    settings = _plans_and_policies(loaded, plans, policies, sinks, recent, length, whole, beside)
    if bits or not wanted:
        settings += _packed_settings(loaded, plans, bits, sinks, recent)
    if wanted:
        sources = {"texts": texts if data else {}, "folder": data_dir, "seed": seed, "length": context}
        given, where = (wanted, measuring, sources), (place, work, out is None)
        result, place, work = run_harness(loaded, tokenizer, settings, *given, *where, processes)
        lines = []
    else:
        task_of = Task(texts, context, refeed=refeed, recall_form=recall_form, **counts)
        if out is None:
            job = evaluation_job(loaded, tokenizer, distinct(settings), task_of, names)
            place, work = interrupted_result(f"eval-{Path(model).name}-", job) or (place, work)
        result = evaluate(loaded, tokenizer, settings, task_of, names, bars, work, processes)
        lines = _perplexity_notes(settings, names)
    if processes.main:
        _write_result(result, place, work, as_json, lines)


def _write_result(result: dict, place: Path, work: Path, as_json: bool, lines: Sequence[str]) -> None:
    """Write a result to its file, and show it with further lines. The work that led to it is removed."""
    from lowkey.cli.tables import notes, show_rows, show_tasks

    files.write_json(place, result, "result")
    files.remove_work(work)
    if as_json:
        print(json.dumps(result))
    else:
        (show_tasks if "harness" in result["rows"][0] else show_rows)(result)
    for line in (f"result written to {place}", *lines, *notes(result)):
        note(line)


def _perplexity_notes(settings: Sequence[Setting], names: Sequence[str]) -> list[str]:
    """A line that says why a setting has no perplexity, if one has none."""
    late = [s.name for s in settings if s.needs_second_pass and "perplexity" in names]
    if not late or "decode" in names:
        return []
    return [
        f"{late[0]} has no perplexity: it chooses tokens by reading the whole context a second time, and "
        "perplexity is measured while a text is read once; add --task decode"
    ]


def _leaves_out_policies(plan: Sequence[Path] | None, policy: str | None, bits: Sequence[str] | None) -> bool:
    """Whether plans are measured without their policies, too. Raises: LowkeyError if there are no plans."""
    whole = choices.NO_POLICY in (policy or "").split(",")
    if not plan and (whole or choices.NO_BITS in (bits or ())):
        given = f"policy {choices.NO_POLICY!r}" if whole else f"bits {choices.NO_BITS!r}"
        raise LowkeyError(f"{given}: leaves out what a plan has; give --plan too, or leave it out")
    return whole


def _plans_and_policies(
    model: PreTrainedModel,
    plans: Sequence[tuple[Plan, str]],
    policies: Sequence[tuple[str, Any]],
    sinks: int | None,
    recent: int | None,
    context: int | None,
    whole: bool,
    beside: Mapping[str, Any],
) -> list[Setting]:
    """The full cache, plans, policies alone or over each plan, and with `whole` plans without their own."""
    from lowkey.evaluate.settings import evicted, full

    below: Sequence[tuple[Plan | None, str | None]] = plans or [(None, None)]
    return [
        full(model),
        *(_planned(model, *plan, None, sinks, recent) for plan in plans),
        *(evicted(model, made, name, context, *plan, **beside) for name, made in policies for plan in below),
        *(
            _planned(model, replace(own, policy=None), path, None, sinks, recent)
            for own, path in plans
            if whole and own.policy is not None
        ),
    ]


def _planned(
    model: PreTrainedModel, plan: Plan, path: str, bits: str | None, sinks: int | None, recent: int | None
) -> Setting:
    """A plan in its folder, with other integers and exact tokens where they are given."""
    from lowkey.evaluate.settings import planned, window_of

    return planned(model, plan, path, bits, window_of(model, plan, bits, sinks, recent))


def _packed_settings(
    model: PreTrainedModel,
    plans: Sequence[tuple[Plan, str]],
    bits: Sequence[str] | None,
    sinks: int | None,
    recent: int | None,
) -> list[Setting]:
    """Settings with packed integers: plans in other integers than their own, and integers alone."""
    from lowkey.evaluate.settings import packed
    from lowkey.models import families
    from lowkey.storage.exact import Exact
    from lowkey.storage.packing import scheme_name

    beside = Exact(choices.SINKS if sinks is None else sinks, choices.RECENT if recent is None else recent)
    alone: Sequence[int | str] = bits or (() if families.stores_own_form(model.config) else (8, 4))
    over = [
        _planned(model, plan, path, b, sinks, recent)
        for plan, path in plans
        for b in bits or ()
        if scheme_name(b) != scheme_name(plan.bits or choices.NO_BITS)
    ]
    return over + [packed(model, b, beside) for b in alone if b != choices.NO_BITS]


def _usual_context(model: PreTrainedModel, tasks: Sequence[str], suites: Sequence[str]) -> int:
    """512, or 4096 for suites, or the number of positions of a model that has fewer. The task recall leaves
    room for a question and its answer.
    """
    from lowkey.evaluate.result import Task
    from lowkey.models import families

    longest, room = families.max_positions(model), QUESTION if "recall" in tasks else 0
    usual = LONG if suites else Task.context
    return usual if longest is None else max(8, min(usual, longest - room))
