"""`lowkey gates`: what a policy learns of a model before it can score tokens."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
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
from lowkey.core.errors import LowkeyError
from lowkey.core.options import check_names, read_option

HAS_WEIGHTS = "fast-kvzip"  # the method whose trained weights were published


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
    published: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="weights of fast-kvzip that were published for this model (a .pt file), in place of a "
            "training; nothing in the file is run",
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
    if published and (method != HAS_WEIGHTS or calibration or context):
        given_too = "calibration" if calibration else "context" if context else f"method {method!r}"
        raise LowkeyError(
            f"published {str(published)!r}: gates of {HAS_WEIGHTS} are converted, nothing is learnt; leave "
            f"out {given_too}, or --published"
        )
    if published:
        with files.opened_file(published, "published gates", files.ANY_SIZE, "give weights that exist"):
            pass  # its contents are checked when it is read
    corpus = read_corpus(calibration)
    work = files.check_output(out, force)

    from lowkey.cli.loading import check_context, make_sample, open_model
    from lowkey.cli.tables import say
    from lowkey.core.progress import bars
    from lowkey.heads import GATE_TRAININGS, GATES
    from lowkey.heads.published_gates import PublishedGates, convert_gates

    what, kind = f"method {method!r}", PublishedGates if published else GATE_TRAININGS.get(method)
    check_names(what, given, [f.name for f in fields(kind)] if kind else [])
    options = {key: read_option(kind, key, word, what) for key, word in given.items()} if kind else {}
    loaded, tokenizer = open_model(model, dtype, device)
    if published:
        found = convert_gates(loaded, published, PublishedGates(**options))
    else:
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
            **({"training": kind(**options)} if kind else {}),
        )
    found.save(out, force)
    files.remove_work(work)
    if as_json:
        print(json.dumps({"gates": str(out), **found.describe()}))
    else:
        said = ", ".join(f"{name} {value}" for name, value in found.settings.items() if "sha256" not in name)
        say(f"{out}: gates of {method} for {len(found.layers)} layers ({said})")
