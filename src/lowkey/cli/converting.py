"""The command that gives a trained model another attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lowkey.attention import SUBSETS
from lowkey.calibration.calibrate import Sample, calibration_windows
from lowkey.cli.common import (
    AsJson,
    Calibration,
    Device,
    Dtype,
    Force,
    Model,
    Seed,
    check_context,
    err,
    hold,
    options_of,
    within,
)
from lowkey.cli.tables import screen
from lowkey.conversion import (
    BASES,
    CONVERSION_FIELDS,
    CONVERSIONS,
    FREQUENCIES,
    HEADS,
    ConversionOptions,
    Exactness,
    conversion_record,
    input_moments,
    save_conversion,
    starting_loss,
)
from lowkey.conversion import convert as made_of
from lowkey.conversion.convert import checked_configuration
from lowkey.core import files, text
from lowkey.core.progress import bars
from lowkey.core.types import LowkeyError
from lowkey.evaluate.result import Task
from lowkey.models.fingerprint import data_fingerprint
from lowkey.models.loading import load

Fields = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-O",
        help="a field of the attention, like lrkv_rank=12, kv_lora_rank=160 or attention_layers=half",
    ),
]


def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(help="folder to write the model to")],
    attention: Annotated[str, typer.Option(help=f"one of: {', '.join(CONVERSIONS)}")],
    option: Fields = None,
    heads: Annotated[str, typer.Option(help=f"what pooled heads become: {', '.join(HEADS)}")] = "mean",
    basis: Annotated[
        str, typer.Option(help=f"{', '.join(BASES)}: heads as they are, or turned towards one another first")
    ] = "weights",
    frequencies: Annotated[
        str, typer.Option(help=f"of a rotated slice narrower than a head: {', '.join(FREQUENCIES)}")
    ] = "high",
    whiten: Annotated[
        bool, typer.Option(help="lose least of what projections make of a text, not of their weights")
    ] = False,
    calibration: Calibration = None,
    data: Annotated[
        Path | None, typer.Option(help="a UTF-8 text file to measure on (default: the embedded text)")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help=within(Task, "context", "tokens per window (default: 512, or all a model takes)")),
    ] = None,
    windows: Annotated[
        int, typer.Option(help=within(Task, "windows", "windows to measure on, and to whiten with"))
    ] = 32,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Give a trained model another attention and measure what it costs; `lowkey pretrain` continues from
    there.
    """
    files.check_folder(out, force)
    hold(Task, windows=windows, context=Task.context if context is None else context)
    if whiten:
        hold(Sample, windows=windows)
    if calibration and not whiten:
        raise LowkeyError(f"calibration {str(calibration)!r}: is for --whiten; give it too")
    fields = fields_of(attention, options_of(option))
    judged = text.read_text(data, "data") if data else None
    corpus = text.read_text(calibration, "calibration") if calibration else text.embedded_text("calibration")
    loaded, tokenizer = load(model, dtype, device)
    check_context(context, loaded)
    context = Task.context if context is None else context
    choice = ConversionOptions(heads, basis, frequencies)
    checked_configuration(loaded, attention, choice, whiten, fields)
    rows = calibration_windows(loaded, tokenizer, corpus, Sample(windows, context, seed)) if whiten else None
    moments = input_moments(loaded, rows, progress=bars) if rows is not None else None
    made = made_of(loaded, attention, options=choice, moments=moments, progress=bars, **fields)
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
    _show(record, out, as_json)


def fields_of(attention: str, given: dict[str, str]) -> dict[str, Any]:
    """Options as text, each as its field has it; unknown ones are left for `convert` to refuse."""
    known = CONVERSION_FIELDS.get(attention, {})
    return {name: _value(name, value, known.get(name, str)) for name, value in given.items()}


def _value(name: str, value: str, kind: type) -> int | bool | str | list[int]:
    if kind is int and value.removeprefix("-").isdecimal():
        return int(value)
    if kind is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if kind is str or value in SUBSETS:
        return value
    if kind is list:
        return _layers(name, value)
    raise LowkeyError(
        f"option {name}={value}: must be {'a whole number' if kind is int else 'true or false'}"
    )


def _layers(name: str, value: str) -> list[int]:
    found: list[int] = []
    for part in value.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(first + last) > 9:
            raise LowkeyError(f"option {name}={value}: must be layers like 3-8,11, or {' or '.join(SUBSETS)}")
        found += range(int(first), min(int(last or first), 10**5) + 1)
    return found


def _show(record: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"model": str(out), **record}))
        return
    loss, cache, size = record["loss"], record["cache_bytes_per_token"], record["parameters"]
    table = Table(
        "model",
        "loss (nats/token)",
        "B/token",
        "kept",
        "parameters",
        title=f"{record['source']}, {record['dtype']}",
    )
    for name, which in (("source", "source"), (record["attention"], "converted")):
        nats = "not finite" if loss[which] is None else f"{loss[which]:.4f}"
        table.add_row(
            name,
            nats,
            f"{cache[which]:,}",
            f"{100 * cache[which] / cache['source']:.1f}%",
            f"{size[which]:,}",
        )
    screen.print(table)
    start = Exactness(record["exact"], record["lost"], record["exact_with"])
    err.print(f"the start is {start}", highlight=False, soft_wrap=True, markup=False)
    err.print(
        f"model written to {out}; loss on {loss['tokens']:,} held-out tokens, nothing trained yet",
        highlight=False,
        soft_wrap=True,
    )
