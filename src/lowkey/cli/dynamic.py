"""`lowkey dynamic`: train gates that give every token a rank of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from lowkey.cli.checks import (
    check_model_options,
    check_sample,
    check_settings,
    parse_key_bases,
    parse_layout,
    parse_share,
    read_corpus,
    with_range,
)
from lowkey.cli.options import (
    BUDGET,
    LAYOUT_HELP,
    METHOD,
    TRAINING,
    AsJson,
    Calibration,
    Context,
    Device,
    Dtype,
    Force,
    Model,
    OutFolder,
    Seed,
    Windows,
)
from lowkey.core import files
from lowkey.core.layouts import HEADS


def dynamic(
    model: Model,
    out: OutFolder,
    layout: Annotated[
        str, typer.Option(metavar="NAME", help=LAYOUT_HELP, rich_help_panel=METHOD)
    ] = "post_rope",
    key_bases: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"bases of the keys: {' or '.join(HEADS)} (shared by the KV heads of a layer)",
            rich_help_panel=METHOD,
        ),
    ] = "shared",
    steps: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range("GateTraining", "steps", "training steps of the gates"),
            rich_help_panel=TRAINING,
        ),
    ] = 200,
    budget: Annotated[
        str,
        typer.Option(
            metavar="SHARE",
            help="share of the coordinates that a token keeps, like 40%, on average over tokens and layers",
            rich_help_panel=BUDGET,
        ),
    ] = "50%",
    calibration: Calibration = None,
    windows: Windows = 32,
    context: Context = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train gates that give every token its own rank.

    `lowkey eval` and `lowkey generate` can use the plan. Interrupted work resumes when the same command is
    given again.
    """
    share = parse_share(budget)
    check_settings("GateTraining", {"target": "budget"}, target=share, steps=steps, seed=seed)
    form, heads = parse_layout(layout), parse_key_bases(key_bases)
    check_sample(windows, context, seed)
    check_model_options(model, dtype, device)
    corpus = read_corpus(calibration)
    work = files.check_output(out, force)

    from lowkey.calibration.dynamic import make_dynamic_plan
    from lowkey.cli.loading import check_context, make_sample, open_model
    from lowkey.cli.tables import show_plan
    from lowkey.core.progress import bars
    from lowkey.methods.dynakv import GateTraining

    loaded, tokenizer = open_model(model, dtype, device)
    check_context(context, loaded)
    plan = make_dynamic_plan(
        loaded,
        tokenizer,
        corpus,
        layout=form,
        key_bases=heads,
        sample=make_sample(windows, context, seed),
        training=GateTraining(share, steps, seed=seed),
        work=work,
        progress=bars,
    )
    plan.save(out, force)
    files.remove_work(work)
    show_plan(plan, out, as_json)
