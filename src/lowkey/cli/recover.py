"""`lowkey recover`: train a model through a plan."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowkey.cli import choices
from lowkey.cli.checks import (
    check_model_options,
    check_plan,
    check_settings,
    check_word,
    read_corpus,
    with_range,
)
from lowkey.cli.console import note
from lowkey.cli.options import (
    TRAINING,
    AsJson,
    Calibration,
    Device,
    Dtype,
    Force,
    Model,
    OutFolder,
    PlanArgument,
    Seed,
)
from lowkey.core import files
from lowkey.core.errors import LowkeyError
from lowkey.core.options import shown

if TYPE_CHECKING:
    from lowkey.calibration.recover import Recovered

Stages = tuple[tuple[str, int], ...]


def recover(
    model: Model,
    plan: PlanArgument,
    out: OutFolder,
    stages: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="objectives with their steps and, after a colon, their learning rates, like "
            f"distill=100:1e-4,ce=200; objectives: {', '.join(choices.OBJECTIVES)}",
            rich_help_panel=TRAINING,
        ),
    ] = "kl=200",
    factors: Annotated[
        bool, typer.Option(help="train the plan's maps too", rich_help_panel=TRAINING)
    ] = False,
    rank: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range("Recovery", "rank", "rank of the LoRA adapters"),
            rich_help_panel=TRAINING,
        ),
    ] = 16,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="linear maps that get adapters, like mlp.*; repeat for several (default: all; '': none)",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    full: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="linear maps that are trained in full, like self_attn.*; repeat for several",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="X",
            help=with_range("Recovery", "temperature", "temperature of the distributions that kl compares"),
            rich_help_panel=TRAINING,
        ),
    ] = 1.0,
    lr: Annotated[
        float,
        typer.Option(
            metavar="X",
            help=with_range("Recovery", "lr", "peak learning rate of stages that name none"),
            rich_help_panel=TRAINING,
        ),
    ] = 3e-4,
    weight_decay: Annotated[
        float,
        typer.Option(
            metavar="X",
            help=with_range("Recovery", "weight_decay", "weight decay of everything but the plan's maps"),
            rich_help_panel=TRAINING,
        ),
    ] = 0.01,
    eps: Annotated[
        float,
        typer.Option(
            metavar="X", help=with_range("Recovery", "eps", "epsilon of AdamW"), rich_help_panel=TRAINING
        ),
    ] = 1e-8,
    batch: Annotated[
        int,
        typer.Option(
            metavar="N", help=with_range("Recovery", "batch", "windows per step"), rich_help_panel=TRAINING
        ),
    ] = 4,
    length: Annotated[
        int,
        typer.Option(
            metavar="N", help=with_range("Recovery", "length", "tokens per window"), rich_help_panel=TRAINING
        ),
    ] = 256,
    calibration: Calibration = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train a model through a plan, to win back quality.

    The trained model is written to OUT, and its plan to OUT/plan. Interrupted work resumes when the same
    command is given again.
    """
    named, rates = parse_stages(stages, lr)
    values: dict[str, Any] = {
        "stages": named, "lrs": rates, "rank": rank, "temperature": temperature, "lr": lr,
        "weight_decay": weight_decay, "eps": eps, "batch": batch, "length": length, "seed": seed,
    }  # fmt: skip
    check_settings("Recovery", **values)
    check_model_options(model, dtype, device)
    corpus = read_corpus(calibration)
    work = files.check_output(out, force)
    check_plan(plan)

    from lowkey.calibration.recover import Recovery
    from lowkey.calibration.recover import recover as train
    from lowkey.cli.loading import open_model
    from lowkey.core.progress import bars
    from lowkey.plan.plan import Plan

    settings = Recovery(
        alpha=2 * rank,
        factors=factors,
        lora=("*",) if lora is None else tuple(filter(None, lora)),
        full=tuple(full or ()),
        **values,
    )
    loaded, tokenizer = open_model(model, dtype, device)
    chosen = Plan.load(plan, loaded)
    found = train(loaded, tokenizer, chosen, corpus, settings=settings, work=work, progress=bars)
    with files.replacing_folder(out) as temporary:
        found.model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        found.plan.save(temporary / "plan")
        files.write_json(temporary / "losses.json", {"losses": found.losses}, "losses")
    files.remove_work(work)
    if as_json:
        told = {
            "model": str(out),
            "plan": str(out / "plan"),
            "steps": len(found.losses),
            "stages": found.stages,
            "held_out": found.held_out,
            "exact": found.exact,
        }
        print(json.dumps(told))
    else:
        _note_losses(found)
        note(f"model and plan written to {out}")


def _note_losses(found: Recovered) -> None:
    """Write on stderr how the losses fell."""
    if found.exact:
        note("the plan is exact: it lost nothing, so there was nothing to recover")
    for stage in found.stages:
        note(f"{stage['objective']}, {stage['steps']} steps: {stage['first']:.4f} -> {stage['last']:.4f}")
    whole, before, after = (found.held_out[name] for name in ("full", "before", "after"))
    note(
        f"held-out loss with the plan: {before:.4f} -> {after:.4f} nats per token (full cache before "
        f"training: {whole:.4f})"
    )


def parse_stages(written: str, lr: float) -> tuple[Stages, tuple[float, ...]]:
    """Read objectives with their steps, and their learning rates: none if the text names none.

    Raises:
        LowkeyError: for what is not written like `distill=100:1e-4,ce=200`.
    """
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
    for name, _, _ in parts:
        check_word("stage", name.strip(), choices.OBJECTIVES)
    stages = tuple((name.strip(), int(steps)) for name, _, steps in parts)
    return stages, rates if any(colon for _, colon, _ in pairs) else ()
