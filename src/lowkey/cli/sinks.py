"""`lowkey sinks`: which tokens are attention sinks."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowkey.cli.checks import check_model_options, check_sample, read_corpus, with_range
from lowkey.cli.options import (
    MEASURING,
    AsJson,
    Device,
    Dtype,
    MeasuringContext,
    MeasuringSeed,
    MeasuringText,
    Model,
)
from lowkey.core import text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def sinks(
    model: Model,
    data: MeasuringText = None,
    windows: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range(
                "Sample",
                "windows",
                "windows that the rule is fitted on, and as many others that are searched",
            ),
            rich_help_panel=MEASURING,
        ),
    ] = 4,
    context: MeasuringContext = None,
    start: Annotated[
        bool,
        typer.Option(
            help="begin every window with the tokenizer's beginning-of-sequence token",
            rich_help_panel=MEASURING,
        ),
    ] = True,
    seed: MeasuringSeed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Find the tokens that are attention sinks.

    Sinks are recognised by their values in the cache, with KVSink's rule (arXiv:2508.04257), which is learnt
    from outlier channels of the hidden states. The first token of a text is usually a sink; some later tokens
    can be, too.
    """
    check_sample(windows, context, seed)
    check_model_options(model, dtype, device)
    corpus = read_corpus(data, "data") or text.embedded_text("calibration")

    from lowkey.calibration.sinks import find_sinks, locate_sinks
    from lowkey.cli.loading import check_context, make_sample, open_model
    from lowkey.cli.tables import show_sinks
    from lowkey.models import families
    from lowkey.models.attention_interface import attach

    loaded, tokenizer = open_model(model, dtype, device)
    check_context(context, loaded)
    length = families.readable_length(loaded, make_sample(windows, context, seed).length)
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
        by_layer = locate_sinks(loaded, others, rule, batch=1)
        found |= {"channels": list(rule.channels), "emergence": rule.emergence}
        found |= {"layers": {i: _counted(x) for i, x in by_layer.items()}}
        found |= {"tokens": _tokens(by_layer, others, tokenizer)}
    if as_json:
        print(json.dumps(found))
    else:
        show_sinks(found)


def _counted(is_sink: Tensor) -> dict[str, int]:
    """Of sinks (n, t): in how many windows the first token is one, and how many later tokens are."""
    return {"first": int(is_sink[:, 0].sum()), "later": int(is_sink[:, 1:].sum())}


def _tokens(
    by_layer: dict[int, Tensor], rows: Tensor, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Every token that is a sink in some layer, with those layers; the ones of most layers first."""
    places = {tuple(place) for is_sink in by_layer.values() for place in is_sink.nonzero().tolist()}
    found = [(n, p, [i for i, is_sink in by_layer.items() if is_sink[n, p]]) for n, p in sorted(places)]
    ordered = sorted(found, key=lambda entry: -len(entry[2]))
    return [
        {"window": n, "position": p, "token": str(tokenizer.decode([int(rows[n, p])])), "layers": own}
        for n, p, own in ordered
    ]
