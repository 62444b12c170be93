"""`lowkey serve`: start a server for many users, over a plan, an exported model or one of our own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowkey.cli.checks import check_plan, check_word, parse_bytes, parse_pairs, parse_tokens
from lowkey.cli.console import note, say
from lowkey.cli.options import CACHE, HARDWARE, OUTPUT, SERVER, AsJson, Dtype, Model
from lowkey.core.errors import LowkeyError
from lowkey.core.options import Range, checked
from lowkey.models.names import check_dtype, check_name, is_gguf
from lowkey.serving import engine
from lowkey.serving.engine import EXACT_CHOICES, KERNEL_CHOICES

if TYPE_CHECKING:
    from lowkey.serving.routes import ExactShape, Route

PORTS = Range(at_least=1, at_most=2**16 - 1)
BLOCKS = Range(at_least=32, at_most=2**12)
PAGE_TOKENS = 128  # tokens of a page, as the engine has them on a CPU
CHUNK = (
    512  # new tokens of a step beside exact tokens, all of which are stored exactly until the step is over
)
USUAL_MEMORY = "1GiB"  # on a CPU, where the engine would take nearly all there is


def serve(
    model: Model,
    plan: Annotated[
        Path | None, typer.Option(metavar="PLAN", help="a plan folder", rich_help_panel=CACHE)
    ] = None,
    exact: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="plan: sinks and recent tokens as the plan has them; none: all tokens as latents",
            rich_help_panel=CACHE,
        ),
    ] = "plan",
    kernel: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="auto: in each layer whatever takes less memory; own: lowkey's attention in all layers",
            rich_help_panel=CACHE,
        ),
    ] = "auto",
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help=f"memory for the cache of all users (default: {USUAL_MEMORY} on a CPU, what vLLM takes on a "
            "GPU)",
            rich_help_panel=HARDWARE,
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="longest sequence, like 4096 or 8k (default: as many as the model has positions)",
            rich_help_panel=CACHE,
        ),
    ] = None,
    block: Annotated[
        int,
        typer.Option(
            metavar="N", help=f"tokens of a page, a multiple of 32 ({BLOCKS})", rich_help_panel=CACHE
        ),
    ] = PAGE_TOKENS,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="address to listen on", rich_help_panel=SERVER)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", help=f"port to listen on ({PORTS})", rich_help_panel=SERVER)
    ] = 8000,
    engine_option: Annotated[
        list[str] | None,
        typer.Option(
            "--engine-option",
            "-E",
            metavar="NAME=VALUE",
            help="an option of vLLM's server, like max-num-seqs=8 or enforce-eager=true; repeat for several",
            rich_help_panel=SERVER,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="check and count, and start nothing; needs no vLLM",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Serve a model to many users at once, with vLLM.

    Any OpenAI client can then ask it. The model may be a plain one, with or without a plan, or what export,
    convert or pretrain wrote. What each layer stores, and how many users fit beside the full cache, is told
    before the server starts.
    """
    length = None if context is None else parse_tokens("context", context)
    room = None if memory is None else int(parse_bytes("memory", memory))
    checked("port", port, int, PORTS, 8000)
    if checked("block", block, int, BLOCKS, PAGE_TOKENS) % 32:
        raise LowkeyError(f"block {block}: must be a multiple of 32; give {block // 32 * 32 + 32}")
    check_word("exact", exact, EXACT_CHOICES)
    check_word("kernel", kernel, KERNEL_CHOICES)
    options = parse_pairs(engine_option, "engine option")
    engine.check_engine_options(options)
    if not host.strip() or not host.isprintable():
        raise LowkeyError(f"host {host!r}: give an address, like 127.0.0.1")
    check_dtype(dtype)
    check_name(model)
    if is_gguf(model):
        raise LowkeyError(f"model {model!r}: is a GGUF file, which vLLM does not serve here; give a folder")
    if plan is not None:
        check_plan(plan)
    if not dry_run:
        engine.check_engine_installed()

    import torch

    if room is None and not torch.cuda.is_available():
        room = int(parse_bytes("memory", USUAL_MEMORY))
    request = {} if plan is None else {"plan": str(plan.absolute()), "kernel": kernel, "exact": exact}
    told, start = _prepared(model, dtype, request, options, (host, port, block, length, room))
    if as_json:
        print(json.dumps(told), flush=True)
    else:
        _tell(told)
    if not dry_run:
        note(f"starting vLLM on http://{host}:{port}/v1 (model {model!r})")
        engine.replace_process(start.command())


def _prepared(
    model: str, dtype: str, request: dict[str, str], options: dict[str, str], place: tuple[Any, ...]
) -> tuple[dict[str, Any], engine.Start]:
    """What is told before the start, and the start.

    Args:
        model: as it was given.
        dtype: as it was given.
        request: of `lowkey.serving.requests.PlanRequest`.
        options: of the engine.
        place: host, port, tokens of a page, longest sequence or None, bytes for pages or None.
    """
    import torch

    from lowkey.cli.loading import quiet_libraries
    from lowkey.models import families
    from lowkey.models.loading import local_folder, read_config
    from lowkey.serving import requests, routes

    quiet_libraries()
    host, port, block, length, room = place
    config, saved = read_config(model)
    number = saved if dtype == "auto" else getattr(torch, dtype)
    longest = families.configured_positions(config)
    if length is not None and longest is not None and length > longest:
        raise LowkeyError(f"context {length}: the model has {longest} positions; give at most that")
    cache_dtype = options.get("kv-cache-dtype", "auto")
    folder = local_folder(model)
    asked = requests.PlanRequest.read(request)
    if asked.plan is not None:
        drafts = any(name.startswith("speculative") for name in options)
        requests.check_engine(cache_dtype, _count(options, "tensor-parallel-size"), drafts)
    plan = requests.served_plan(asked, folder, config)
    architecture = families.plain_architecture(config)
    told: dict[str, Any] = {"model": model, "plan": request.get("plan"), "memory_bytes": room}
    exact: routes.ExactShape | None = None
    if families.is_own(config) and architecture is None:
        parallel = (_count(options, f"{kind}-parallel-size") for kind in ("tensor", "pipeline"))
        requests.check_own_engine(config, cache_dtype, *parallel)
        rows = _own_rows(config, number.itemsize)
    else:
        shape = families.configured_shapes(config)
        layers = shape.compressible if plan else range(shape.layers)
        sizes = routes.GPU_HEAD_SIZES if torch.cuda.is_available() else routes.CPU_HEAD_SIZES
        itemsize = 1 if cache_dtype.startswith("fp8") else number.itemsize
        heads = shape.kv_heads, shape.head_dim
        found = routes.routes(plan, layers, heads, itemsize, sizes, asked.kernel == "own")
        requests.check_cache_dtype(cache_dtype, {route.name for route in found.values()})
        rows = _rows(found, kv_bytes := 2 * shape.kv_heads * shape.head_dim * number.itemsize)
        if plan is not None:
            stored = rows["token_bytes"] * block
            exact = routes.exact_shape(plan, kv_bytes, len(found), block, stored)
    used = length or longest or 2048
    told |= {"block": block, "context": used, **rows}
    if plan is not None and exact is not None:
        told["exact"] = {"sinks": plan.sinks, "window": exact.window, "blocks_per_user": exact.blocks}
        options = {"max-num-batched-tokens": str(CHUNK), **options}
    if room is not None:
        told |= _room(room, rows, block, used, exact)
    return told, engine.Start(
        str(folder),
        model,
        str(number).removeprefix("torch."),
        host,
        port,
        block,
        length,
        room,
        request,
        architecture,
        options,
    )


def _room(
    room: int, rows: Mapping[str, Any], block: int, used: int, exact: ExactShape | None
) -> dict[str, dict[str, int]]:
    """What fits, with the plan and without it. Raises: LowkeyError if no user does.

    Args:
        room: bytes for pages.
        rows: with `token_bytes` and `full_token_bytes`.
        block: tokens of a page.
        used: tokens of a user.
        exact: of the plan.
    """
    from lowkey.serving.routes import capacity

    fits = vars(capacity(room, rows["token_bytes"], block, used, exact))
    if not fits["users"]:
        raise LowkeyError(
            f"memory {room:,} bytes: does not hold one user of {used:,} tokens; give more, or a smaller "
            "--context"
        )
    return {"room": fits, "full_room": vars(capacity(room, rows["full_token_bytes"], block, used))}


def _count(options: Mapping[str, str], name: str) -> int:
    """A whole number among the engine's options; 1 if it is not given. Raises: LowkeyError."""
    given = options.get(name, "1")
    if not given.isascii() or not given.isdecimal() or len(given) > 6:
        raise LowkeyError(f"engine option {name}={given!r:.40}: must be a whole number")
    return int(given)


def _rows(found: Mapping[int, Route], full: int) -> dict[str, Any]:
    """The routes of all layers, for JSON. full: bytes of a token in a layer of the full cache."""
    layers = [
        {"layer": i, "route": r.name, "bytes": r.token_bytes, "width": r.width} for i, r in found.items()
    ]
    return {
        "layers": layers,
        "token_bytes": sum(r.token_bytes for r in found.values()),
        "full_token_bytes": full * len(found),
    }


def _own_rows(config: Any, itemsize: int) -> dict[str, Any]:
    """The same for one of our own models, beside multi-head attention with its heads."""
    from lowkey.attention import layer_costs

    inner = config.get_text_config()
    full = 2 * inner.num_attention_heads * inner.head_dim * itemsize
    numbers = [cost.stored for cost in layer_costs(inner)]
    layers = [{"layer": i, "route": "own", "bytes": n * itemsize, "width": 0} for i, n in enumerate(numbers)]
    return {
        "layers": layers,
        "token_bytes": sum(numbers) * itemsize,
        "full_token_bytes": full * len(numbers),
    }


def _tell(told: Mapping[str, Any]) -> None:
    """Print the routes in runs of layers, and what fits."""
    for (route, width), rows in groupby(told["layers"], key=lambda row: (row["route"], row["width"])):
        run = list(rows)
        first, last = run[0]["layer"], run[-1]["layer"]
        where = f"layer {first}" if first == last else f"layers {first} to {last}"
        wide = f", heads of {width}" if route == "projected" else ""
        least, most = (f"{pick(row['bytes'] for row in run):g}" for pick in (min, max))
        sizes = least if least == most else f"{least} to {most}"
        say(f"{where}: {route}{wide}, {sizes} bytes per token")
    token, full = told["token_bytes"], told["full_token_bytes"]
    say(f"a token takes {token:,.0f} bytes, {100 * token / full:.1f}% of the {full:,} of the full cache")
    if "exact" in told:
        exact = told["exact"]
        say(
            f"exact: the first {exact['sinks']} tokens of a user and the last {exact['window']} at most, in "
            f"{exact['blocks_per_user']} blocks"
        )
    if "room" in told:
        room, stock = told["room"], told["full_room"]
        mib = told["memory_bytes"] / 2**20
        say(
            f"{mib:,.0f} MiB hold {room['tokens']:,} tokens (full: {stock['tokens']:,}), or "
            f"{room['users']:,} users of {told['context']:,} tokens (full: {stock['users']:,})"
        )
