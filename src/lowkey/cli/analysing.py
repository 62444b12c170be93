"""Commands that look into a trained model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowkey.calibration.calibrate import Sample
from lowkey.calibration.sinks import find_sinks, locate_sinks
from lowkey.cli.common import AsJson, Device, Dtype, Model, Seed, check_context, err, hold, sample_of, within
from lowkey.cli.tables import show_diversity, show_sinks
from lowkey.core import files, text
from lowkey.core.progress import bars
from lowkey.heads.diversity import Compared
from lowkey.heads.diversity import diversity as measure
from lowkey.models import families
from lowkey.models.attention_interface import attach
from lowkey.models.loading import load


def diversity(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for diversity.json and the plots")] = Path(
        "diversity"
    ),
    data: Annotated[
        Path | None, typer.Option(help="a UTF-8 text file for attention maps (default: the embedded text)")
    ] = None,
    windows: Annotated[
        int,
        typer.Option(help=within(Compared, "windows", "windows of text whose attention maps are compared")),
    ] = 8,
    context: Annotated[int, typer.Option(help=within(Compared, "context", "tokens per window"))] = 128,
    inits: Annotated[
        int,
        typer.Option(
            help=within(
                Compared,
                "inits",
                "random initialisations beside it; each takes the memory of a model; 0: none",
            )
        ),
    ] = 3,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """How different the heads of every layer are, by weights (queries with keys, values with output) and by
    where they look, beside the same configuration at random."""
    from lowkey.report.diversity import cosines_figure, diversity_figure

    files.check_folder(out, force=False, again="diversity.json")
    hold(Compared, windows=windows, context=context, inits=inits, seed=seed)
    corpus = text.read_text(data, "data") if data else None
    loaded, tokenizer = load(model, dtype, device)
    found = measure(
        loaded, tokenizer, corpus, windows=windows, context=context, inits=inits, seed=seed, progress=bars
    )
    found = {**found, "data": str(data) if data else "embedded"}
    with files.replacing_folder(out) as temporary:
        files.write_json(temporary / "diversity.json", found, "diversity")
        for name, draw in (("diversity", diversity_figure), ("cosines", cosines_figure)):
            draw(found).savefig(temporary / f"{name}.png", dpi=150)
    err.print(
        f"diversity.json, diversity.png and cosines.png written to {out}", highlight=False, soft_wrap=True
    )
    print(json.dumps(found)) if as_json else show_diversity(found)


def sinks(
    model: Model,
    data: Annotated[Path | None, typer.Option(help="a UTF-8 text file (default: the embedded text)")] = None,
    windows: Annotated[
        int,
        typer.Option(help=within(Sample, "windows", "windows to learn from, and as many others to look at")),
    ] = 4,
    context: Annotated[
        int | None, typer.Option(help="tokens per window (default: 512, or all a model takes)")
    ] = None,
    start: Annotated[
        bool, typer.Option(help="begin windows with the tokenizer's first token, as a text begins")
    ] = True,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Which tokens are attention sinks by KVSink's rule (arXiv:2508.04257), read from values: the first of a
    text, or later ones too.
    """
    sample = sample_of(windows, context, seed)
    corpus = text.read_text(data, "data") if data else text.embedded_text("calibration")
    loaded, tokenizer = load(model, dtype, device)
    check_context(context, loaded)
    length = families.readable_length(loaded, sample.length)
    ids = text.encode(tokenizer, corpus, loaded)
    rows = text.sample_windows(ids, tokenizer, length, 2 * windows, seed, "data")
    if not start and tokenizer.bos_token_id is not None:
        rows = rows[:, 1:]
    learnt, others = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        rule = find_sinks(attach(loaded), learnt, batch=1)
    found: dict[str, Any] = {"model": model, "windows": len(others), "context": rows.shape[1], "start": start}
    if rule is None:
        found |= {"layers": {}, "tokens": [], "why": str(told[-1].message)}
    else:
        at = locate_sinks(loaded, others, rule, batch=1)
        found |= {"channels": list(rule.channels), "emergence": rule.emergence}
        found |= {"layers": {i: _where(x) for i, x in at.items()}, "tokens": _tokens(at, others, tokenizer)}
    print(json.dumps(found)) if as_json else show_sinks(found)


def _where(found: Tensor) -> dict[str, int]:
    """Of sinks (n, t): in how many windows the first token is one, and how many later tokens are."""
    return {"first": int(found[:, 0].sum()), "later": int(found[:, 1:].sum())}


def _tokens(at: dict[int, Tensor], rows: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Every token that is a sink in some layer, with those layers; the ones of most layers first."""
    places = {tuple(place) for found in at.values() for place in found.nonzero().tolist()}
    found = [(n, p, [i for i, x in at.items() if x[n, p]]) for n, p in sorted(places)]
    ordered = sorted(found, key=lambda entry: -len(entry[2]))
    return [
        {"window": n, "position": p, "token": str(tokenizer.decode([int(rows[n, p])])), "layers": own}
        for n, p, own in ordered
    ]
