"""`lowkey convert`: give a trained model another kind of attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lowkey.cli import choices
from lowkey.cli.checks import check_model_options, check_word, corpus_at, hold, pairs_of, within
from lowkey.cli.console import note
from lowkey.cli.options import (
    CALIBRATION,
    CONTEXT_HELP,
    EMBEDDED_TEXT,
    MEASURING,
    METHOD,
    AsJson,
    Device,
    Dtype,
    Force,
    MeasuringSeed,
    Model,
    OutFolder,
)
from lowkey.core import files, text
from lowkey.core.errors import LowkeyError
from lowkey.core.options import check_names, shown


def convert(
    model: Model,
    out: OutFolder,
    attention: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"the kind of attention: {', '.join(choices.ATTENTIONS)}",
            rich_help_panel=METHOD,
        ),
    ],
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-O",
            metavar="NAME=VALUE",
            help="a field of the attention, like lrkv_rank=12, kv_lora_rank=160 or attention_layers=half; "
            "repeat for several",
            rich_help_panel=METHOD,
        ),
    ] = None,
    heads: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"what heads that are pooled become: their {' or the '.join(choices.POOLINGS)}",
            rich_help_panel=METHOD,
        ),
    ] = "mean",
    basis: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"{' or '.join(choices.BASES)}: heads as they are, or aligned with one another before they "
            "are pooled",
            rich_help_panel=METHOD,
        ),
    ] = "weights",
    frequencies: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="which rotary frequencies a rotated slice narrower than a head keeps: "
            f"{', '.join(choices.FREQUENCIES)}",
            rich_help_panel=METHOD,
        ),
    ] = "high",
    whiten: Annotated[
        bool,
        typer.Option(
            help="lose least of what projections make of a text, not of their weights",
            rich_help_panel=CALIBRATION,
        ),
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="with --whiten: " + EMBEDDED_TEXT,
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"to measure on: {EMBEDDED_TEXT}", rich_help_panel=MEASURING),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(metavar="N", help=within("Task", "context", CONTEXT_HELP), rich_help_panel=MEASURING),
    ] = None,
    windows: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=within("Task", "windows", "windows to measure on, and to whiten with"),
            rich_help_panel=MEASURING,
        ),
    ] = 32,
    seed: MeasuringSeed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Give a trained model another kind of attention.

    What that costs at the start is measured; `lowkey pretrain` trains the model further from there.
    """
    check_word("attention", attention, choices.ATTENTIONS)
    for what, word, known in (
        ("heads", heads, choices.POOLINGS),
        ("basis", basis, choices.BASES),
        ("frequencies", frequencies, choices.FREQUENCIES),
    ):
        check_word(what, word, known)
    fields = fields_of(attention, pairs_of(option))
    hold("Task", windows=windows, context=context)
    hold("Sample", windows=windows if whiten else None, seed=seed)
    if calibration and not whiten:
        raise LowkeyError(f"calibration {str(calibration)!r}: is for --whiten; give it too")
    check_model_options(model, dtype, device)
    judged = corpus_at(data, "data")
    corpus = corpus_at(calibration) or text.embedded_text("calibration")
    files.check_folder(out, force)

    from lowkey.calibration.calibrate import Sample, calibration_windows
    from lowkey.cli.loading import check_context, open_model
    from lowkey.cli.tables import show_conversion
    from lowkey.conversion import (
        ConversionOptions,
        Exactness,
        conversion_record,
        input_moments,
        save_conversion,
        starting_loss,
    )
    from lowkey.conversion import convert as convert_model
    from lowkey.conversion.convert import checked_configuration
    from lowkey.core.progress import bars
    from lowkey.evaluate.result import Task
    from lowkey.models.fingerprint import data_fingerprint

    loaded, tokenizer = open_model(model, dtype, device)
    check_context(context, loaded)
    context = Task.context if context is None else context
    choice = ConversionOptions(heads, basis, frequencies)
    checked_configuration(loaded, attention, choice, whiten, fields)
    rows = calibration_windows(loaded, tokenizer, corpus, Sample(windows, context, seed)) if whiten else None
    moments = input_moments(loaded, rows, progress=bars) if rows is not None else None
    made = convert_model(loaded, attention, options=choice, moments=moments, progress=bars, **fields)
    before, after = (
        starting_loss(m, tokenizer, judged, context=context, windows=windows, progress=bars)
        for m in (loaded, made)
    )
    how = {
        "fields": fields,
        "options": vars(choice),
        "whitened": None
        if rows is None
        else {"tokens": rows.numel(), "data_sha256": data_fingerprint(rows), "seed": seed},
        "data": str(data) if data else "embedded",
        "context": context,
    }
    record = conversion_record(loaded, made, before, after, how)
    save_conversion(made, tokenizer, record, out, force)
    if as_json:
        print(json.dumps({"model": str(out), **record}))
        return
    show_conversion(record)
    note(f"the start is {Exactness(record['exact'], record['lost'], record['exact_with'])}")
    tokens = record["loss"]["tokens"]
    note(f"model written to {out}; loss on {tokens:,} held-out tokens, nothing trained yet")


def fields_of(attention: str, given: dict[str, str]) -> dict[str, Any]:
    """ConversionOptions as text, each in the type of its field."""
    known = choices.ATTENTIONS[attention]
    check_names(f"attention {attention!r}", given, list(known))
    return {name: _value(name, value, known[name]) for name, value in given.items()}


def _value(name: str, value: str, kind: str) -> int | bool | str | list[int]:
    """One field. A list of layers may also be one of the subsets that have a name."""
    if kind == "int" and value.removeprefix("-").isdecimal():
        return int(value)
    if kind == "bool" and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if kind == "str" or value in choices.LAYER_SUBSETS:
        return value
    if kind == "list":
        return _layers(name, value)
    rule = "a whole number" if kind == "int" else "true or false"
    raise LowkeyError(f"option {name}={shown(value)}: must be {rule}; give another")


def _layers(name: str, value: str) -> list[int]:
    """Numbers and ranges of layers, like 3-8,11."""
    found: list[int] = []
    for part in value.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(first + last) > 9:
            subsets = " or ".join(choices.LAYER_SUBSETS)
            raise LowkeyError(f"option {name}={shown(value)}: must be layers like 3-8,11, or {subsets}")
        found += range(int(first), min(int(last or first), 10**5) + 1)
    return found
