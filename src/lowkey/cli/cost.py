"""`lowkey cost`: what a model and its caches take on a GPU, from the model's config alone."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lowkey.cli import choices
from lowkey.cli.checks import check_plan, check_word, parse_bytes, parse_tokens
from lowkey.cli.console import note
from lowkey.cli.options import CACHE, HARDWARE, MODEL, SHAPE, AsJson, Model
from lowkey.core.budget import UNITS
from lowkey.core.errors import LowkeyError
from lowkey.core.gpus import GPUS, Gpu, find_gpu
from lowkey.core.options import Range, checked, shown
from lowkey.core.stored_setting import EXPANDED, parse_settings
from lowkey.models.names import DTYPES, check_name

SEQUENCES = Range(at_least=1, at_most=2**20)
CARDS = Range(at_least=1, at_most=2**16)
BANDWIDTH = Range(above=0, at_most=10**6)
WEIGHT_BITS = Range(at_least=1, at_most=64)
ALSO = (EXPANDED,)


def cost(
    model: Model,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="tokens of a sequence, like 4096 or 128k (default: as many as the model has positions)",
            rich_help_panel=SHAPE,
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            metavar="N", help=f"sequences that are decoded at once ({SEQUENCES})", rich_help_panel=SHAPE
        ),
    ] = 1,
    settings: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="what is stored, separated by commas: full, a packing like int4, rank:SHARE, POLICY:BUDGET "
            "like snapkv:10%, plan:DIR, or some of these joined by + (default: some of each)",
            rich_help_panel=CACHE,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"dtype of weights and caches: {', '.join(DTYPES)} (auto: as the config says)",
            rich_help_panel=MODEL,
        ),
    ] = "auto",
    weight_bits: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help=f"bits of a weight, scales included, if they are not the dtype's ({WEIGHT_BITS})",
            rich_help_panel=MODEL,
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"the GPU, for times and for what fits: {', '.join(GPUS)}",
            rich_help_panel=HARDWARE,
        ),
    ] = None,
    gpus: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=f"like GPUs, over which weights and caches are spread evenly ({CARDS})",
            rich_help_panel=HARDWARE,
        ),
    ] = 1,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="memory of any other GPU, like '96GiB'; needs --bandwidth",
            rich_help_panel=HARDWARE,
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            metavar="GB/S",
            help=f"bandwidth of its memory, in 10^9 bytes per second ({BANDWIDTH}); needs --memory",
            rich_help_panel=HARDWARE,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count from a config what a model and its caches take.

    Weights are not needed. It counts their bytes, the cache of each setting after a prompt, what a decode
    step reads, the least time that this takes, and how many sequences fit beside the weights. Nothing is
    measured, and the floor of a step leaves out arithmetic, the launch of kernels, activations and traffic
    between GPUs.
    """
    length = None if context is None else parse_tokens("context", context)
    checked("batch", batch, int, SEQUENCES, 1)
    if weight_bits is not None:
        checked("weight bits", weight_bits, float, WEIGHT_BITS)
    asked = None if settings is None else parse_settings(settings, choices.SCHEMES, choices.POLICIES, ALSO)
    card = _hardware(gpu, gpus, memory, bandwidth)
    check_word("dtype", dtype, DTYPES)
    check_name(model)
    for setting in asked or ():
        if setting.plan is not None:
            check_plan(setting.plan)

    import torch

    from lowkey.cli.loading import quiet_libraries
    from lowkey.cli.tables import show_cost
    from lowkey.models.families import configured_positions
    from lowkey.models.loading import read_config
    from lowkey.plan.plan import Plan
    from lowkey.planner.floor import Workload, floor_of, stored_bytes, usual_settings

    quiet_libraries()
    config, saved = read_config(model)
    length = length or configured_positions(config)
    if length is None:
        raise LowkeyError("context: the config does not say how many positions the model has; give --context")
    work = Workload(config, saved if dtype == "auto" else getattr(torch, dtype), length, batch, weight_bits)
    if asked is None:
        asked = parse_settings(usual_settings(config), choices.SCHEMES, choices.POLICIES, ALSO)
    plans = [None if s.plan is None else Plan.load(s.plan) for s in asked]
    for plan in plans:
        if plan is not None:
            plan.check_fixed_ranks("cost")
    stored = [stored_bytes(work, *pair) for pair in zip(asked, plans, strict=True)]
    told = {"model": model, **floor_of(work, stored, card)}
    if card is not None:
        _check_room(told)
    if as_json:
        print(json.dumps(told))
    else:
        show_cost(told)
    for line in _remarks(told, config, weight_bits):
        note(line)


def _hardware(gpu: str | None, gpus: int, memory: str | None, bandwidth: float | None) -> Gpu | None:
    """The GPUs that are asked for; None if there is only to be counted."""
    checked("gpus", gpus, int, CARDS, 1)
    if gpu is not None:
        for name, value in (("memory", memory), ("bandwidth", bandwidth)):
            if value is not None:
                raise LowkeyError(f"{name} {shown(value)}: is of a GPU without a name; leave out --gpu or it")
        known = find_gpu(gpu)
        return Gpu(known.name, known.gib, known.gbs, gpus)
    if memory is None and bandwidth is None:
        if gpus > 1:
            raise LowkeyError(f"gpus {gpus}: says not which; give --gpu, or --memory with --bandwidth")
        return None
    if memory is None or bandwidth is None:
        given, other = ("bandwidth", "memory") if memory is None else ("memory", "bandwidth")
        value = bandwidth if memory is None else memory
        raise LowkeyError(f"{given} {shown(value)}: is half of a GPU; give --{other}, too, or --gpu")
    speed = checked("bandwidth", bandwidth, float, BANDWIDTH)
    return Gpu("other", parse_bytes("memory", memory) / UNITS["GiB"], speed, gpus)


def _check_room(told: dict[str, Any]) -> None:
    """Refuse what no setting makes fit. Raises: LowkeyError that says what does."""
    from lowkey.planner.memory import in_words

    card, batch = told["gpu"], told["batch"]
    place = f"{card['count']} x {card['name']} ({in_words(card['memory_bytes'])})"
    weights = told["weights_bytes"]
    if weights >= card["memory_bytes"]:
        needed = weights * card["count"] // card["memory_bytes"] + 1
        raise LowkeyError(
            f"gpu {place}: the weights alone take {in_words(weights, up=True)}; give --gpus {needed} or "
            "more, or fewer --weight-bits"
        )
    best = max(told["rows"], key=lambda row: row["sequences_that_fit"])
    if best["sequences_that_fit"] >= batch:
        return
    most = best["sequences_that_fit"]
    fits = f"{most:,} do with {best['setting']}" if most else "not even one does"
    raise LowkeyError(
        f"batch {batch} of {told['context']:,} tokens: does not fit into {place} beside {in_words(weights)} "
        f"of weights in any setting; {fits}; give a smaller --batch or --context, or more --gpus"
    )


def _remarks(told: dict[str, Any], config: Any, weight_bits: float | None) -> list[str]:
    """What a reader of the numbers should know, a line each."""
    lines = []
    if told["gpu"] is not None:
        short = [r for r in told["rows"] if r["sequences_that_fit"] < told["batch"]]
        if short:
            fits = ", ".join(f"{r['setting']} {r['sequences_that_fit']:,}" for r in short)
            lines.append(f"batch {told['batch']} does not fit in every setting; so many do: {fits}")
    if weight_bits is None and getattr(config, "quantization_config", None):
        lines.append(
            f"the config says that its weights are quantised; they are counted in {told['dtype']}: give "
            "--weight-bits"
        )
    return lines
