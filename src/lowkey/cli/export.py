"""`lowkey export`: fold a plan into the weights of a plain checkpoint."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from lowkey.cli import choices
from lowkey.cli.checks import check_model_options, check_plan, check_word
from lowkey.cli.console import note
from lowkey.cli.options import OUTPUT, AsJson, Dtype, Force, Model, OutFolder, PlanArgument
from lowkey.core import files


def export(
    model: Model,
    plan: PlanArgument,
    out: OutFolder,
    dtype: Dtype = "auto",
    format: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"format of the checkpoint: {', '.join(choices.FORMATS)} (transformers)",
            rich_help_panel=OUTPUT,
        ),
    ] = "hf",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Fold a plan into the weights of a plain checkpoint.

    The checkpoint runs without lowkey. A plan can be exported if such a checkpoint represents it exactly.
    """
    check_word("format", format, choices.FORMATS)
    check_model_options(model, dtype, "cpu")
    files.check_folder(out, force)
    check_plan(plan)

    from lowkey.cli.loading import open_model
    from lowkey.export import FORMATS
    from lowkey.plan.plan import Plan

    loaded, tokenizer = open_model(model, dtype, "cpu")
    place = FORMATS[format](loaded, tokenizer, Plan.load(plan, loaded), out, force)
    if as_json:
        print(json.dumps({"model": str(place), "format": format}))
    else:
        note(f"model written to {place}")
