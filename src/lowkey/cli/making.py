"""Commands that make something: a plan, a profile, head scores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from lowkey.allocation.allocators import RANK_ALLOCATORS
from lowkey.allocation.base import RankAllocator
from lowkey.calibration.calibrate import Sample, calibrate
from lowkey.calibration.dynamic import make_dynamic_plan
from lowkey.calibration.recover import OBJECTIVES, Recovery
from lowkey.calibration.recover import recover as train
from lowkey.calibration.request import BUDGET_LENGTH, JUDGES
from lowkey.catalog import make_allocator, make_method
from lowkey.cli.common import (
    AllocatorOptions,
    AsJson,
    Calibration,
    Device,
    Dtype,
    Force,
    Model,
    Options,
    Seed,
    check_context,
    err,
    head_scores,
    heads_of,
    hold,
    layout_of,
    opened,
    options_of,
    sample_of,
    share_of,
    within,
    word_of,
)
from lowkey.cli.plans import plan_at
from lowkey.cli.tables import show_dynamic, show_heads, show_plan
from lowkey.core import files
from lowkey.core.options import shown
from lowkey.core.progress import bars
from lowkey.core.types import Budget, LowkeyError
from lowkey.export import FORMATS
from lowkey.heads.induction import ECHOES, estimate_echo
from lowkey.heads.needles import NEEDLE_TASKS as NEEDLES
from lowkey.heads.needles import Drawing
from lowkey.heads.retrieval import SCORE_KINDS, estimate_heads
from lowkey.methods import Method
from lowkey.methods.dynakv import GateTraining
from lowkey.models.loading import load
from lowkey.storage.exact import DEFAULT_WINDOW, Exact
from lowkey.storage.packing import SCHEMES, scheme_or_none

WINDOWS = within(Sample, "windows", "calibration windows at most, as far as the text goes")
CONTEXT = within(Sample, "length", "tokens per calibration window (default: 512, or all a model takes)")

PlanBudget = Annotated[
    str | None,
    typer.Option(
        help="bytes that the compressed layers may hold: '50%', '64 KiB/token' or '1.5 GiB' of one sequence (50% when none is given)"
    ),
]
ErrorBudget = Annotated[
    float | None,
    typer.Option(
        help="instead, like 0.03: the largest layer error, or what else the allocator bounds (`lowkey methods`)"
    ),
]
RankAllocatorName = Annotated[
    str | None,
    typer.Option(
        help=f"how ranks are split: {', '.join(RANK_ALLOCATORS)} or package.module:Class (default: the method's)"
    ),
]
Judge = Annotated[
    str,
    typer.Option(
        help="a layer's error: layers (relative, of its output) or loss (nats, that layer alone compressed)"
    ),
]
BITS_DEFAULT = "(none with a method that is named)"
CandidateRanks = Annotated[
    str | None,
    typer.Option(
        help="candidates: a count like 8, ranks like 16,32,64, shares like 50%,75%, or all (the method's own when not given)"
    ),
]


def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(help="folder to write the plan to")],
    method: Annotated[
        str | None,
        typer.Option(
            help="a name that `lowkey methods` lists, with its paper's defaults, or package.module:Class (default: what does best on a "
            "real model at the budget, integers included)"
        ),
    ] = None,
    budget: PlanBudget = None,
    bits: Annotated[
        str | None,
        typer.Option(help=f"latents in packed integers: {', '.join(SCHEMES)} or none {BITS_DEFAULT}"),
    ] = None,
    at: Annotated[
        int,
        typer.Option(help="tokens of the cache that the budget is counted for, exact tokens included", min=1),
    ] = BUDGET_LENGTH,
    error_budget: ErrorBudget = None,
    allocator: RankAllocatorName = None,
    allocator_option: AllocatorOptions = None,
    layout: Annotated[
        str | None, typer.Option(help="post_rope or pre_rope (the method's own when not given)")
    ] = None,
    calibration: Calibration = None,
    windows: Annotated[int, typer.Option(help=WINDOWS)] = 32,
    context: Annotated[int | None, typer.Option(help=CONTEXT)] = None,
    judge: Judge = "layers",
    ranks: CandidateRanks = None,
    rank_multiple: Annotated[
        int, typer.Option(help="hold every rank per KV head to a multiple of this, or to the head dim")
    ] = 1,
    sinks: Annotated[
        int, typer.Option(help=within(Exact, "sinks", "first tokens kept exact"))
    ] = DEFAULT_WINDOW.sinks,
    recent: Annotated[
        int, typer.Option(help=within(Exact, "recent", "last tokens kept exact"))
    ] = DEFAULT_WINDOW.recent,
    heads: Annotated[
        list[Path] | None,
        typer.Option(help="a file of head scores to keep in the plan, for policies on top of it"),
    ] = None,
    option: Options = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Fit a method on text and write a plan. Interrupted work resumes when the same command is given again."""
    work = files.check_output(out, force)
    sample, form = sample_of(windows, context, seed), None if layout is None else layout_of(layout)
    chosen, split = _method_and_allocator(
        method, options_of(option), allocator, options_of(allocator_option, "allocator option")
    )
    scheme_or_none(bits)
    asked = None if budget is None else Budget.parse(budget)
    hold(Exact, sinks=sinks, recent=recent)
    word_of("judge", judge, JUDGES)
    loaded, tokenizer, corpus = opened(model, dtype, device, calibration)
    check_context(context, loaded)
    plan = calibrate(
        *(loaded, tokenizer, corpus), method=chosen, budget=asked, error_budget=error_budget, allocator=split, layout=form, sample=sample,
        ranks=ranks, rank_multiple=rank_multiple, judge=judge, sinks=sinks, recent=recent, bits=bits, at=at,
        heads=head_scores(heads, loaded), work=work, progress=bars,
    )  # fmt: skip
    plan.save(out, force)
    files.remove_work(work)
    show_plan(plan, out, as_json)


def _method_and_allocator(
    method: str | None, given: dict, allocator: str | None, of_split: dict
) -> tuple[Method | None, RankAllocator | None]:
    """Those that are named, or None, with their options: the method's own allocator where only a method is
    named.
    """
    if method is None and given:
        raise LowkeyError(
            f"option {shown(next(iter(given)))}: belongs to a method; name it with --method (`lowkey "
            "methods` lists them)"
        )
    chosen = None if method is None else make_method(method, given)
    name = chosen.allocator if allocator is None and chosen else allocator
    if name is None and of_split:
        raise LowkeyError(
            f"allocator option {shown(next(iter(of_split)))}: belongs to an allocator; name it with "
            "--allocator"
        )
    return chosen, None if name is None else make_allocator(name, of_split)


def dynamic(
    model: Model,
    out: Annotated[Path, typer.Argument(help="folder to write the plan to")],
    budget: Annotated[
        str, typer.Option(help="share of the coordinates kept, like 40%, in the mean over tokens and layers")
    ] = "50%",
    layout: Annotated[str, typer.Option(help="post_rope or pre_rope")] = "post_rope",
    key_bases: Annotated[
        str, typer.Option(help="shared (by the KV heads of a layer) or per_head")
    ] = "shared",
    steps: Annotated[
        int, typer.Option(help=within(GateTraining, "steps", "training steps of the gates"))
    ] = 200,
    calibration: Calibration = None,
    windows: Annotated[int, typer.Option(help=WINDOWS)] = 32,
    context: Annotated[int | None, typer.Option(help=CONTEXT)] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train gates that give every token a rank of its own, and write a plan for eval and generate.
    Interrupted work resumes when the same command is given again."""
    work = files.check_output(out, force)
    training, form, heads = (
        GateTraining(share_of(budget), steps, seed=seed),
        layout_of(layout),
        heads_of(key_bases),
    )
    sample = sample_of(windows, context, seed)
    loaded, tokenizer, corpus = opened(model, dtype, device, calibration)
    check_context(context, loaded)
    plan = make_dynamic_plan(
        loaded,
        tokenizer,
        corpus,
        layout=form,
        key_bases=heads,
        sample=sample,
        training=training,
        work=work,
        progress=bars,
    )
    plan.save(out, force)
    files.remove_work(work)
    show_dynamic(plan.describe(), out, as_json)


def profile(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for profile.json and the plots")] = Path(
        "profile"
    ),
    method: Annotated[str, typer.Option(help="whose bases to profile")] = "eigenattention",
    option: Options = None,
    layout: Annotated[
        str | None, typer.Option(help="post_rope or pre_rope (the method's own when not given)")
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(help="where to measure: a count, ranks, shares or all, as for compress")
    ] = None,
    calibration: Calibration = None,
    windows: Annotated[int, typer.Option(help=WINDOWS)] = 16,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """The error-rank surface of every layer and the spectra of keys and values, as JSON and PNG."""
    from lowkey.report import plots

    files.check_folder(out, force=False, again="profile.json")
    sample, form = sample_of(windows, None, seed), None if layout is None else layout_of(layout)
    chosen = make_method(method, options_of(option))
    loaded, tokenizer, corpus = opened(model, dtype, device, calibration)
    plan = calibrate(
        *(loaded, tokenizer, corpus),
        method=chosen,
        budget="100%",  # nothing is chosen
        allocator="uniform",
        layout=form,
        pairs=True,
        ranks=ranks,
        sample=sample,
        progress=bars,
    )
    measured = {name: plan.profile[name] for name in ("ranks", "surface", "spectra")}
    found = {
        "model": model,
        "method": plan.method,
        "layout": plan.layout,
        **measured,
        "layers": list(plan.factors),
    }
    with files.replacing_folder(out) as temporary:
        files.write_json(temporary / "profile.json", found, "profile")
        for name, draw in (("surface", plots.error_surface_figure), ("spectra", plots.spectra_figure)):
            draw(found).savefig(temporary / f"{name}.png", dpi=150)
    print(json.dumps(found)) if as_json else err.print(
        f"profile.json, surface.png and spectra.png written to {out}", highlight=False
    )


def heads(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="the JSON file to write")] = Path("heads.json"),
    kind: Annotated[str, typer.Option(help=f"the score: {', '.join([*SCORE_KINDS, *ECHOES])}")] = "r2",
    task: Annotated[str | None, typer.Option(help=f"{', '.join(NEEDLES)} (default: the kind's own)")] = None,
    haystack: Annotated[
        Path | None, typer.Option(help="a UTF-8 text file (default: the embedded text)")
    ] = None,
    cases: Annotated[
        int, typer.Option(help=within(Drawing, "cases", "cases to ask; those answered right count"))
    ] = 100,
    context: Annotated[
        int, typer.Option(help="tokens of the longest cases; the shortest have a fifth")
    ] = 1024,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Annotated[bool, typer.Option(help="replace a file")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure which heads find the answer in a long text, for policies that split their budget by it.
    Interrupted work resumes when the same command is given again."""
    files.check_file(out, force=force)
    work = files.work_beside(out)
    hold(Drawing, cases=cases, context=context, seed=seed)
    word_of("kind", kind, [*SCORE_KINDS, *ECHOES])
    for what, given in (("task", task), ("haystack", haystack)):
        if given is not None and kind in ECHOES:
            raise LowkeyError(
                f"{what} {shown(str(given))}: kind {kind!r} is measured on random tokens; leave it out"
            )
    loaded, tokenizer, corpus = opened(model, dtype, device, haystack, "haystack")
    if kind in ECHOES:
        found = estimate_echo(
            loaded, tokenizer, kind=kind, cases=cases, context=context, seed=seed, progress=bars, work=work
        )
    else:
        found = estimate_heads(
            loaded,
            tokenizer,
            kind=kind,
            task=task,
            haystack=corpus,
            cases=cases,
            context=context,
            seed=seed,
            progress=bars,
            work=work,
        )
    found.save(out)
    files.remove_work(work)
    print(json.dumps({"heads": str(out), **found.describe()})) if as_json else show_heads(found, out, cases)


def recover(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="a plan folder made for this model")],
    out: Annotated[
        Path, typer.Argument(help="folder to write the trained model and, in OUT/plan, its plan to")
    ],
    stages: Annotated[
        str,
        typer.Option(
            help=f"objectives, steps and, after a colon, rates, like distill=100:1e-4,ce=200: {', '.join(OBJECTIVES)}"
        ),
    ] = "kl=200",
    calibration: Calibration = None,
    factors: Annotated[bool, typer.Option(help="train the plan's maps too")] = False,
    rank: Annotated[int, typer.Option(help=within(Recovery, "rank", "of the LoRA adapters"))] = 16,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="linear maps with adapters, like mlp.*; repeat (default: all; '': none)"),
    ] = None,
    full: Annotated[
        list[str] | None, typer.Option(help="linear maps trained in full, like self_attn.*; repeat")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help=within(Recovery, "temperature", "of kl's distributions"))
    ] = 1.0,
    lr: Annotated[
        float, typer.Option(help=within(Recovery, "lr", "peak learning rate of stages that name none"))
    ] = 3e-4,
    weight_decay: Annotated[
        float, typer.Option(help=within(Recovery, "weight_decay", "of all but the plan's maps"))
    ] = 0.01,
    eps: Annotated[float, typer.Option(help=within(Recovery, "eps", "of AdamW"))] = 1e-8,
    batch: Annotated[int, typer.Option(help=within(Recovery, "batch", "windows per step"))] = 4,
    length: Annotated[int, typer.Option(help=within(Recovery, "length", "tokens per window"))] = 256,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train a model through a plan, so that it learns to live with it. Interrupted work resumes when the same
    command is given again.
    """
    work = files.check_output(out, force)
    named, rates = _stages(stages, lr)
    settings = Recovery(
        named, rank, 2 * rank, batch=batch, length=length, seed=seed, factors=factors, temperature=temperature,
        lora=("*",) if lora is None else tuple(filter(None, lora)), full=tuple(full or ()),
        lr=lr, lrs=rates, eps=eps, weight_decay=weight_decay,
    )  # fmt: skip
    loaded, tokenizer, corpus = opened(model, dtype, device, calibration)
    chosen = plan_at(plan, loaded).ordinary("recover")
    found = train(loaded, tokenizer, chosen, corpus, settings=settings, work=work, progress=bars)
    with files.replacing_folder(out) as temporary:
        found.model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        found.plan.save(temporary / "plan")
        files.write_json(temporary / "losses.json", {"losses": found.losses}, "losses")
    files.remove_work(work)
    told = {
        "model": str(out),
        "plan": str(out / "plan"),
        "steps": len(found.losses),
        "stages": found.stages,
        "held_out": found.held_out,
    }
    told["exact"] = found.exact
    if as_json:
        print(json.dumps(told))
        return
    if found.exact:
        err.print("the plan is exact: it lost nothing, so there was nothing to recover", highlight=False)
    for stage in found.stages:
        err.print(
            f"{stage['objective']}, {stage['steps']} steps: {stage['first']:.4f} -> {stage['last']:.4f}",
            highlight=False,
        )
    whole, before, after = (found.held_out[name] for name in ("full", "before", "after"))
    told_loss = f"{before:.4f} -> {after:.4f} nats per token (full cache, untrained: {whole:.4f})"
    err.print(f"held-out loss through the plan: {told_loss}", highlight=False, soft_wrap=True)
    err.print(f"model and plan written to {out}", highlight=False, soft_wrap=True)


def _stages(written: str, lr: float) -> tuple[tuple[tuple[str, int], ...], tuple[float, ...]]:
    """Objectives with their steps, and the rate of each; no rates where none is named."""
    pairs = [part.partition(":") for part in written.split(",")]
    parts = [stage.partition("=") for stage, _, _ in pairs]
    if not all(re.fullmatch(r"\d{1,19}", steps.strip(), re.ASCII) for _, _, steps in parts):
        raise LowkeyError(f"stages {shown(written)}: write them as name=steps, like distill=100,ce=200")
    try:
        rates = tuple(float(rate) if colon else lr for _, colon, rate in pairs)
    except ValueError:
        raise LowkeyError(
            f"stages {shown(written)}: rates are numbers, like distill=100:1e-4,ce=200:2e-5"
        ) from None
    stages = tuple((word_of("stage", name.strip(), OBJECTIVES), int(steps)) for name, _, steps in parts)
    return stages, rates if any(colon for _, colon, _ in pairs) else ()


def pretrain(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="a TOML file with the tables [model], [data] and [training], like recipes/lrkv-tiny.toml"
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="folder for model, log and checkpoint (default: runs/RECIPE)"),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="a field of the recipe, like training.lr=1e-3; repeat")
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda; several GPUs under `accelerate launch`")
    ] = "auto",
    force: Annotated[bool, typer.Option(help="start anew where another run has left its files")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model from scratch, or the one at model.path further. The same command goes on where it was
    stopped.
    """
    from accelerate import PartialState

    from lowkey.pretraining import Recipe
    from lowkey.pretraining import pretrain as run

    place = out or Path("runs") / recipe.stem
    found = run(Recipe.read(recipe, settings or ()), place, progress=bars, device=device, force=force)
    if not PartialState().is_main_process:
        return
    told = {"model": str(place), **{k: v for k, v in found.result.items() if k != "losses"}}
    print(json.dumps(told)) if as_json else err.print(
        f"model written to {place} {_trained(told)}", highlight=False, soft_wrap=True
    )


def _trained(result: dict[str, Any]) -> str:
    """How it went, in words; validation is the last step's or none."""
    told = [
        f"after {result['steps']} steps{', DIVERGED' if result['diverged'] else ''}: training loss "
        f"{_number(result['loss'])}"
    ]
    if result["validation"] and (last := result["validation"][-1])["step"] == result["steps"]:
        told.append(
            f"validation {_number(last['validation_loss'])} nats/token = {_number(last['bits_per_byte'], 3)} "
            "bits/byte"
        )
    return ", ".join(told)


def _number(value: float | None, digits: int = 4) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def export(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="a plan folder made for this model")],
    out: Annotated[Path, typer.Argument(help="folder to write the checkpoint to")],
    format: Annotated[str, typer.Option(help=f"one of: {', '.join(FORMATS)}")] = "hf",
    dtype: Dtype = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Fold a plan into the weights, where it is exactly the form of a plain checkpoint, which then needs no
    lowkey to run.
    """
    word_of("format", format, FORMATS)
    files.check_folder(out, force)
    loaded, tokenizer = load(model, dtype, "cpu")
    place = FORMATS[format](loaded, tokenizer, plan_at(plan, loaded).ordinary("export"), out, force)
    print(json.dumps({"model": str(place), "format": format})) if as_json else err.print(
        f"model written to {place}", highlight=False
    )
