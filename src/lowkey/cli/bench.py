"""`lowkey bench`: time parts of lowkey on this machine."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lowkey.cli.checks import check_head_files, check_model_options, check_settings, parse_numbers, with_range
from lowkey.cli.options import CACHE, MEASURING, SHAPE, AsJson, Device, Dtype, HeadFiles, MeasuringSeed, Model
from lowkey.cli.step_settings import GRAMMAR, cache_makers, parse_step_settings
from lowkey.core.budget import Budget
from lowkey.evaluate.limits import check_head_groups


def decode(
    context: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range("DecodeShape", "context", "tokens stored per head"),
            rich_help_panel=SHAPE,
        ),
    ] = 8192,
    head_dim: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range("DecodeShape", "head_dim", "channels of a head"),
            rich_help_panel=SHAPE,
        ),
    ] = 128,
    heads: Annotated[
        int,
        typer.Option(
            metavar="N", help=with_range("DecodeShape", "heads", "query heads"), rich_help_panel=SHAPE
        ),
    ] = 32,
    kv_heads: Annotated[
        int,
        typer.Option(
            metavar="N", help=with_range("DecodeShape", "kv_heads", "KV heads"), rich_help_panel=SHAPE
        ),
    ] = 8,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=with_range("DecodeShape", "dtype", "dtype of queries, keys and values"),
            rich_help_panel=SHAPE,
        ),
    ] = "bfloat16",
    budget: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="what the evicted cache keeps: '10%' or '512 tokens'",
            rich_help_panel=MEASURING,
        ),
    ] = "10%",
    repeats: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range("DecodeShape", "repeats", "rounds; medians are shown"),
            rich_help_panel=MEASURING,
        ),
    ] = 15,
    seed: MeasuringSeed = 0,
    as_json: AsJson = False,
) -> None:
    """Time the attention of one decode step in every backend.

    Each backend attends to the full cache and to what a budget keeps. torch's own attention and plain reads
    of memory are timed for comparison.
    """
    shape: dict[str, Any] = {
        "context": context,
        "head_dim": head_dim,
        "heads": heads,
        "kv_heads": kv_heads,
        "dtype": dtype,
    }
    check_settings("DecodeShape", repeats=repeats, seed=seed, **shape)
    check_head_groups(heads, kv_heads)
    Budget.parse(budget)

    from lowkey.cli.tables import show_bench
    from lowkey.evaluate.decode_bench import decode_bench

    result = decode_bench(budget=budget, repeats=repeats, seed=seed, **shape)
    if as_json:
        print(json.dumps(result))
    else:
        show_bench(result)


def step(
    model: Model,
    context: Annotated[
        str,
        typer.Option(
            metavar="N[,N...]",
            help=with_range(
                "StepTiming",
                "contexts",
                "tokens of the prompt, like 4096 or 1k,4k; several are timed in turn",
            ),
            rich_help_panel=MEASURING,
        ),
    ] = "1024",
    settings: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help=f"caches to time beside transformers' own, separated by commas: {GRAMMAR}",
            rich_help_panel=CACHE,
        ),
    ] = "full,int8,int4",
    threads: Annotated[
        str,
        typer.Option(
            metavar="N[,N...]",
            help=with_range("StepTiming", "threads", "CPU threads of a step; several are timed in turn"),
            rich_help_panel=MEASURING,
        ),
    ] = "1",
    rounds: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range("StepTiming", "rounds", "rounds of two steps each; medians are shown"),
            rich_help_panel=MEASURING,
        ),
    ] = 15,
    heads: HeadFiles = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Time one decode step of a model with different caches.

    The first row, stock, is transformers' own cache and attention with the same weights. Operations on
    tensors and reads of their values are counted on a step of their own.
    """
    contexts = parse_numbers("context", context, "StepTiming", "contexts")
    counts = parse_numbers("threads", threads, "StepTiming", "threads")
    check_settings("StepTiming", rounds=rounds)
    wanted = parse_step_settings(settings)
    check_head_files(heads)
    check_model_options(model, dtype, device)

    from lowkey.cli.loading import head_scores, open_model
    from lowkey.cli.tables import show_steps
    from lowkey.core.progress import bars
    from lowkey.evaluate.step_bench import StepTiming, step_bench

    loaded, tokenizer = open_model(model, dtype, device)
    timing = StepTiming(contexts, counts, rounds)
    makers = cache_makers(wanted, loaded, head_scores(heads, loaded))
    result = step_bench(loaded, tokenizer, makers, timing, bars)
    if as_json:
        print(json.dumps(result))
    else:
        show_steps(result)
