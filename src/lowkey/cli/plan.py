"""`lowkey plan`: from a memory to the plan that loses least within it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowkey.calibration.limits import BUDGET_LENGTH
from lowkey.cli import choices
from lowkey.cli.checks import (
    check_model_options,
    check_sample,
    check_settings,
    check_word,
    parse_bytes,
    parse_tokens,
    read_corpus,
    with_range,
)
from lowkey.cli.console import note
from lowkey.cli.options import (
    BUDGET,
    EMBEDDED_TEXT,
    MEASURING,
    POLICY,
    AsJson,
    Calibration,
    Device,
    Dtype,
    Force,
    Model,
    OutFolder,
    Seed,
    Windows,
)
from lowkey.core import files
from lowkey.core.budget import Budget
from lowkey.core.errors import LowkeyError
from lowkey.core.options import Range, checked, shown

if TYPE_CHECKING:
    from lowkey.planner.memory import Memory
    from lowkey.planner.plan_for import Planned

COUNT = Range(at_least=1, at_most=2**20)
SIZES = "--memory with --context, --bytes-per-token or --keep"


def plan(
    model: Model,
    out: OutFolder,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="what the weights and the caches may take together, like '2GiB'; needs --context",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="tokens of a sequence, like 4096 or 32k (default: 1024, or as many as the model has "
            "positions)",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    sequences: Annotated[
        int, typer.Option(metavar="N", help=f"number of sequences ({COUNT})", rich_help_panel=BUDGET)
    ] = 1,
    bytes_per_token: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="instead of a memory: what a token of a sequence may take in the layers that can be "
            "compressed, like '4KiB'",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="P%",
            help="instead of a memory: the share of the bytes of these layers that is kept, like '12.5%'",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    axes: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help=f"what may be made smaller, separated by commas: {', '.join(choices.AXES)} (default: all)",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    allow_eviction: Annotated[
        bool | None,
        typer.Option(
            "--allow-eviction/--no-eviction",
            help="whether tokens may be dropped (default: they may, if --axes has tokens)",
            rich_help_panel=POLICY,
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"the policy that chooses tokens, of `lowkey policies` (default: {choices.PLANNED})",
            rich_help_panel=POLICY,
        ),
    ] = None,
    recall: Annotated[
        bool,
        typer.Option(
            help="whether the choice must recall as much as the best choice on a single axis",
            rich_help_panel=MEASURING,
        ),
    ] = True,
    cases: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=with_range("Search", "cases", "number of recall cases (default: 16)"),
            rich_help_panel=MEASURING,
        ),
    ] = None,
    calibration: Calibration = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"text to check the choice on: {EMBEDDED_TEXT}; with --calibration, its last quarter",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    windows: Windows = 32,
    compare_windows: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range("Search", "windows", "windows of calibration text to compare candidates on"),
            rich_help_panel=MEASURING,
        ),
    ] = 4,
    held_out_windows: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range("Search", "held_out", "windows of held-out text to compare the best on"),
            rich_help_panel=MEASURING,
        ),
    ] = 6,
    window_tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range("Search", "context", "tokens of these windows, or as many as the model reads"),
            rich_help_panel=MEASURING,
        ),
    ] = 1024,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Find the plan that loses least within a memory.

    Rank, bits and tokens are made smaller together, in the proportion that loses least on this model. Beside
    the plan folder OUT, the comparison on held-out text is written to OUT-frontier.json, which `lowkey
    report` draws; that of an earlier plan is replaced, or removed. Interrupted work resumes when the same
    command is given again.
    """
    budget = _parse_budget(memory, bytes_per_token, keep)
    length = None if context is None else parse_tokens("context", context)
    if memory is not None and length is None:
        raise LowkeyError(f"memory {shown(memory)}: depends on the length of sequences; give --context, too")
    checked("sequences", sequences, int, COUNT, 1)
    used = _parse_axes(axes, allow_eviction)
    chooser = _check_policy(policy, used)
    if cases is not None and not recall:
        raise LowkeyError(f"cases {cases}: are for recall; leave out --cases or --no-recall")
    names = {"held_out": "held-out windows", "windows": "compare windows", "context": "window tokens"}
    counts = {"windows": compare_windows, "held_out": held_out_windows, "context": window_tokens}
    check_settings("Search", names, cases=cases, **counts)
    check_sample(windows, None, seed)
    check_model_options(model, dtype, device)
    corpus, unseen = read_corpus(calibration), read_corpus(held_out, "held-out")
    place = frontier_file(out)
    files.check_file(place, "result")
    work = files.check_output(out, force)

    from lowkey.cli.loading import check_context, make_sample, open_model
    from lowkey.core.progress import bars
    from lowkey.models import families
    from lowkey.planner.memory import Memory
    from lowkey.planner.plan_for import RANK_BITS, Search, search_plans

    loaded, tokenizer = open_model(model, dtype, device)
    check_context(length, loaded)
    length = families.readable_length(loaded, BUDGET_LENGTH) if length is None else length
    room = Memory.of(loaded, length, sequences)
    total = None if memory is None else int(budget.amount)
    if total is not None:
        budget = room.for_a_sequence(total, used, chooser, RANK_BITS)
    search = Search(**counts, cases=0 if not recall else Search.cases if cases is None else cases)
    found = search_plans(
        *(loaded, tokenizer, corpus), keep=budget, tokens=length, axes=used, policy=chooser,
        held_out=unseen, sample=make_sample(windows, None, seed), search=search, work=work, progress=bars,
    )  # fmt: skip
    if found.result:
        files.write_json(place, found.result, "result")
    else:  # what an earlier command compared says nothing of this plan
        files.remove_file(place, "result")
    found.plan.save(out, force)
    files.remove_work(work)
    _show(found, room, total, out, place if found.result else None, as_json)


def frontier_file(out: Path) -> Path:
    """The result file beside a plan: `OUT-frontier.json`."""
    return out.with_name(f"{out.name}-frontier.json")


def _parse_budget(memory: str | None, bytes_per_token: str | None, keep: str | None) -> Budget:
    """The one budget that is given. A memory is one of bytes, of weights and caches together."""
    given = {"memory": memory, "bytes per token": bytes_per_token, "keep": keep}
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1:
        what = " and ".join(f"{name} {shown(value)}" for name, value in named.items()) or "budget: none"
        raise LowkeyError(f"{what}: give one of {SIZES}")
    ((name, text),) = named.items()
    if name == "memory":
        return Budget(parse_bytes(name, text), "bytes")
    if name == "bytes per token":
        return Budget(parse_bytes(name, text.removesuffix("/token")), "bytes/token")
    try:
        budget = Budget.parse(text)
    except LowkeyError:
        budget = None
    if budget is None or budget.unit != "%":
        raise LowkeyError(
            f"keep {shown(text)}: must be a share above 0% and up to 100%, like '12.5%'; {SIZES} take bytes"
        )
    return budget


def _parse_axes(axes: str | None, allow_eviction: bool | None) -> tuple[str, ...]:
    """The axes that may be made smaller, in their own order."""
    names = choices.AXES if axes is None else tuple(axes.split(","))
    for name in names:
        check_word("axis", name, choices.AXES)
    if axes is None and allow_eviction is False:
        names = tuple(name for name in names if name != choices.EVICTION)
    if allow_eviction is not None and allow_eviction != (choices.EVICTION in names):
        flag = "--allow-eviction" if allow_eviction else "--no-eviction"
        raise LowkeyError(f"axes {shown(axes)}: contradict {flag}; leave out one of them")
    return tuple(name for name in choices.AXES if name in names)


def _check_policy(policy: str | None, axes: tuple[str, ...]) -> str:
    """The policy that chooses tokens."""
    if policy is None:
        return choices.PLANNED
    check_word("policy", policy, choices.POLICIES)
    if choices.EVICTION not in axes:
        raise LowkeyError(f"policy {shown(policy)}: drops tokens, which is not allowed here; leave it out")
    return policy


def _show(
    found: Planned, room: Memory, total: int | None, out: Path, result: Path | None, as_json: bool
) -> None:
    """Print what was found, and what will be held."""
    from lowkey.cli.tables import show_frontier

    held = room.held(found.plan)
    told = {
        "format": 1,
        "choice": found.choice,
        "frontier": found.frontier,
        "weights_bytes": room.weights,
        "cache_bytes": room.sequences * held,
        "full_cache_bytes": room.sequences * room.full,
        "memory_bytes": total,
        "context": room.context,
        "sequences": room.sequences,
        "sequences_that_fit": None if total is None else (total - room.weights) // held,
        "plan": str(out),
        "result": result and str(result),
    }
    if as_json:
        print(json.dumps(told))
    else:
        show_frontier(told)
    if not found.choice["axes"]:
        note("the whole cache fits uncompressed: the plan compresses nothing, and nothing was measured")
    note(f"plan written to {out}" + (f", and the comparison to {result}" if result else ""))
