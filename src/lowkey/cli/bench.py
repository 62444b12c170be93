"""`lowkey bench`: time parts of lowkey on this machine."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lowkey.cli.checks import check_settings, with_range
from lowkey.cli.options import MEASURING, SHAPE, AsJson, MeasuringSeed
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
