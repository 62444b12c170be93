"""`lowkey convert`: give a trained model another kind of attention."""

from __future__ import annotations

import json
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
from lowkey.cli.console import note
from lowkey.cli.options import (
    CALIBRATION,
    EMBEDDED_TEXT,
    MEASURING,
    METHOD,
    AsJson,
    Device,
    Dtype,
    Force,
    MeasuringContext,
    MeasuringSeed,
    MeasuringText,
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
            help=f"how several heads become one: {', '.join(choices.POOLINGS)}",
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
            help="rotary frequencies to keep where fewer channels than a whole head are rotated: "
            f"{', '.join(choices.FREQUENCIES)}",
            rich_help_panel=METHOD,
        ),
    ] = "high",
    whiten: Annotated[
        bool,
        typer.Option(
            help="minimise the error of the projections' outputs on a text, not of their weights",
            rich_help_panel=CALIBRATION,
        ),
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"text for --whiten: {EMBEDDED_TEXT}",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    data: MeasuringText = None,
    context: MeasuringContext = None,
    windows: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range("Task", "windows", "windows to measure on, and to whiten with"),
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

    The loss before and after is measured, without any training. `lowkey pretrain` trains the converted model
    further.
    """
    check_word("attention", attention, choices.ATTENTIONS)
    for what, word, known in (
        ("heads", heads, choices.POOLINGS),
        ("basis", basis, choices.BASES),
        ("frequencies", frequencies, choices.FREQUENCIES),
    ):
        check_word(what, word, known)
    fields = parse_fields(attention, parse_pairs(option))
    check_settings("Task", windows=windows, context=context)
    check_settings("Sample", windows=windows if whiten else None, seed=seed)
    if calibration and not whiten:
        raise LowkeyError(f"calibration {str(calibration)!r}: is for --whiten; give it too")
    check_model_options(model, dtype, device)
    evaluation_text = read_corpus(data, "data")
    corpus = read_corpus(calibration) or text.embedded_text("calibration")
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
    converted = convert_model(loaded, attention, options=choice, moments=moments, progress=bars, **fields)
    before, after = (
        starting_loss(m, tokenizer, evaluation_text, context=context, windows=windows, progress=bars)
        for m in (loaded, converted)
    )
    settings = {
        "fields": fields,
        "options": vars(choice),
        "whitened": None
        if rows is None
        else {"tokens": rows.numel(), "data_sha256": data_fingerprint(rows), "seed": seed},
        "data": str(data) if data else "embedded",
        "context": context,
    }
    record = conversion_record(loaded, converted, before, after, settings)
    save_conversion(converted, tokenizer, record, out, force)
    if as_json:
        print(json.dumps({"model": str(out), **record}))
        return
    show_conversion(record)
    note(f"the start is {Exactness(record['exact'], record['lost'], record['exact_with'])}")
    tokens = record["loss"]["tokens"]
    note(f"model written to {out}; loss on {tokens:,} held-out tokens, nothing trained yet")


def parse_fields(attention: str, given: dict[str, str]) -> dict[str, Any]:
    """Read fields of the attention that were given as text, each in its type. Raises: LowkeyError."""
    known = choices.ATTENTIONS[attention]
    check_names(f"attention {attention!r}", given, list(known))
    return {name: _value(name, value, known[name]) for name, value in given.items()}


def _value(name: str, value: str, kind: str) -> int | bool | str | list[int]:
    """Read one field. kind: the name of its type. The layers of a list may also be a named subset."""
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
    """Read numbers and ranges of layers, like 3-8,11."""
    found: list[int] = []
    for part in value.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(first + last) > 9:
            subsets = " or ".join(choices.LAYER_SUBSETS)
            raise LowkeyError(f"option {name}={shown(value)}: must be layers like 3-8,11, or {subsets}")
        found += range(int(first), min(int(last or first), 10**5) + 1)
    return found
