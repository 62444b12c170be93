"""`lowkey heads`: which heads retrieve facts from a long text."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from lowkey.cli import choices
from lowkey.cli.checks import (
    check_model_options,
    check_settings,
    check_word,
    parse_pairs,
    read_corpus,
    with_range,
)
from lowkey.cli.options import EMBEDDED_TEXT, MEASURING, OUTPUT, AsJson, Device, Dtype, MeasuringSeed, Model
from lowkey.core import files
from lowkey.core.errors import LowkeyError
from lowkey.core.options import check_names, read_option, shown

KINDS = (*choices.HEAD_KINDS, *choices.ECHO_KINDS, *choices.CHAIN_KINDS)
NEEDLE_CONTEXT, CHAIN_CONTEXT = 1024, 96  # tokens
NO_HAYSTACK = {
    **dict.fromkeys(choices.ECHO_KINDS, "is measured on random tokens"),
    **dict.fromkeys(choices.CHAIN_KINDS, "is learnt from chains"),
}


def heads(
    model: Model,
    kind: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"the score of a head: {', '.join(KINDS)}",
            rich_help_panel=MEASURING,
        ),
    ] = "r2",
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"the question that is asked: {', '.join(choices.NEEDLE_TASKS)} (default: the kind's own)",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    haystack: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"text that the question is hidden in: {EMBEDDED_TEXT}",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-O",
            metavar="NAME=VALUE",
            help=f"an option of {', '.join(choices.CHAIN_KINDS)}, like steps=100; repeat for several",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    cases: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range("Drawing", "cases", "number of cases; only those that are answered right count"),
            rich_help_panel=MEASURING,
        ),
    ] = 100,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=with_range(
                "Drawing",
                "context",
                "tokens of the longest cases; the shortest have a fifth of that (default: 1024, and 96 for "
                f"{', '.join(choices.CHAIN_KINDS)}, whose cases are of one length)",
            ),
            rich_help_panel=MEASURING,
        ),
    ] = None,
    seed: MeasuringSeed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="the JSON file to write", rich_help_panel=OUTPUT),
    ] = Path("heads.json"),
    force: Annotated[
        bool, typer.Option(help="replace a file that lowkey wrote before", rich_help_panel=OUTPUT)
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure which heads retrieve facts from a long text.

    Policies that split their budget over heads use the scores (headkv-r, headkv-r2, razor, rlkv,
    duoattention). Interrupted work resumes when the same command is given again.
    """
    check_word("kind", kind, KINDS)
    if context is None:
        context = CHAIN_CONTEXT if kind in choices.CHAIN_KINDS else NEEDLE_CONTEXT
    check_settings("Drawing", cases=cases, context=context, seed=seed)
    options = parse_pairs(option)
    if options and kind not in choices.CHAIN_KINDS:
        raise LowkeyError(
            f"option {shown(next(iter(options)))}: kind {kind!r} has none; leave it out, or give one of "
            f"{', '.join(choices.CHAIN_KINDS)}"
        )
    for what, given in (("task", task), ("haystack", haystack)):
        if given is not None and kind in NO_HAYSTACK:
            raise LowkeyError(f"{what} {shown(str(given))}: kind {kind!r} {NO_HAYSTACK[kind]}; leave it out")
    if task is not None:
        check_word("task", task, choices.NEEDLE_TASKS)
    check_model_options(model, dtype, device)
    corpus = read_corpus(haystack, "haystack")
    files.check_file(out, force=force)
    work = files.work_beside(out)

    from lowkey.cli.loading import open_model
    from lowkey.cli.tables import show_heads
    from lowkey.core.progress import bars
    from lowkey.heads import CHAIN_KINDS, CHAIN_TRAININGS
    from lowkey.heads.induction import estimate_echo
    from lowkey.heads.retrieval import estimate_heads

    training = None
    sample: Any = {"cases": cases, "context": context, "seed": seed, "progress": bars, "work": work}
    if kind in CHAIN_KINDS:
        own, what = CHAIN_TRAININGS[kind], f"kind {kind!r}"
        check_names(what, options, [f.name for f in fields(own)])
        training = own(**{name: read_option(own, name, word, what) for name, word in options.items()})
    loaded, tokenizer = open_model(model, dtype, device)
    if training is not None:
        found = CHAIN_KINDS[kind](loaded, tokenizer, training=training, **sample)
    elif kind in choices.ECHO_KINDS:
        found = estimate_echo(loaded, tokenizer, kind=kind, **sample)
    else:
        found = estimate_heads(loaded, tokenizer, kind=kind, task=task, haystack=corpus, **sample)
    found.save(out)
    files.remove_work(work)
    if as_json:
        print(json.dumps({"heads": str(out), **found.describe()}))
    else:
        show_heads(found, out, cases)
