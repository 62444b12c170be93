"""`lowkey heads`: which heads retrieve facts from a long text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lowkey.cli import choices
from lowkey.cli.checks import check_model_options, check_settings, check_word, read_corpus, with_range
from lowkey.cli.options import EMBEDDED_TEXT, MEASURING, OUTPUT, AsJson, Device, Dtype, MeasuringSeed, Model
from lowkey.core import files
from lowkey.core.errors import LowkeyError
from lowkey.core.options import shown

KINDS = (*choices.HEAD_KINDS, *choices.ECHO_KINDS)


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
    cases: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range("Drawing", "cases", "number of cases; only those that are answered right count"),
            rich_help_panel=MEASURING,
        ),
    ] = 100,
    context: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range(
                "Drawing", "context", "tokens of the longest cases; the shortest have a fifth of that"
            ),
            rich_help_panel=MEASURING,
        ),
    ] = 1024,
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

    Policies that split their budget over heads use the scores (headkv-r, headkv-r2, razor). Interrupted work
    resumes when the same command is given again.
    """
    check_settings("Drawing", cases=cases, context=context, seed=seed)
    check_word("kind", kind, KINDS)
    for what, given in (("task", task), ("haystack", haystack)):
        if given is not None and kind in choices.ECHO_KINDS:
            raise LowkeyError(
                f"{what} {shown(str(given))}: kind {kind!r} is measured on random tokens; leave it out"
            )
    if task is not None:
        check_word("task", task, choices.NEEDLE_TASKS)
    check_model_options(model, dtype, device)
    corpus = read_corpus(haystack, "haystack")
    files.check_file(out, force=force)
    work = files.work_beside(out)

    from lowkey.cli.loading import open_model
    from lowkey.cli.tables import show_heads
    from lowkey.core.progress import bars
    from lowkey.heads.induction import estimate_echo
    from lowkey.heads.retrieval import estimate_heads

    loaded, tokenizer = open_model(model, dtype, device)
    if kind in choices.ECHO_KINDS:
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
    if as_json:
        print(json.dumps({"heads": str(out), **found.describe()}))
    else:
        show_heads(found, out, cases)
