"""`lowkey gates`: what a policy learns of a model before it can score tokens."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Annotated

import typer

from lowkey.cli import choices
from lowkey.cli.checks import check_model_options, check_sample, check_word, parse_pairs, read_corpus
from lowkey.cli.options import (
    METHOD,
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
from lowkey.core.options import check_names, read_option


def gates(
    model: Model,
    out: OutFolder,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME", help=f"the policy that learns: {', '.join(choices.GATES)}", rich_help_panel=METHOD
        ),
    ] = choices.GATES[0],
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-O",
            metavar="NAME=VALUE",
            help="an option of the method's training, like steps=500; repeat for several",
            rich_help_panel=METHOD,
        ),
    ] = None,
    calibration: Calibration = None,
    windows: Windows = 32,
    context: Context = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Learn what a policy has to know of a model.

    `lowkey eval --gates OUT` and `lowkey generate --gates OUT` use it. Interrupted work resumes when the same
    command is given again.
    """
    check_word("method", method, choices.GATES)
    given = parse_pairs(option)
    check_sample(windows, context, seed)
    check_model_options(model, dtype, device)
    corpus = read_corpus(calibration)
    work = files.check_output(out, force)

    from lowkey.cli.loading import check_context, make_sample, open_model
    from lowkey.cli.tables import say
    from lowkey.core.progress import bars
    from lowkey.heads import GATE_TRAININGS, GATES

    what, kind = f"method {method!r}", GATE_TRAININGS.get(method)
    check_names(what, given, [f.name for f in fields(kind)] if kind else [])
    training = {}
    if kind and given:
        training["training"] = kind(
            **{key: read_option(kind, key, word, what) for key, word in given.items()}
        )
    loaded, tokenizer = open_model(model, dtype, device)
    check_context(context, loaded)
    sample = make_sample(windows, context, seed)
    found = GATES[method](
        loaded,
        tokenizer,
        corpus=corpus,
        windows=sample.windows,
        context=sample.length,
        seed=seed,
        progress=bars,
        work=work,
        **training,
    )
    found.save(out, force)
    files.remove_work(work)
    if as_json:
        print(json.dumps({"gates": str(out), **found.describe()}))
    else:
        said = ", ".join(f"{name} {value}" for name, value in found.settings.items() if "sha256" not in name)
        say(f"{out}: gates of {method} for {len(found.layers)} layers ({said})")
