"""`lowkey compress`: fit a low-rank method and write a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowkey.allocation.allocators import RANK_ALLOCATORS
from lowkey.allocation.rank_grid import read_request
from lowkey.calibration.limits import BUDGET_LENGTH, JUDGES, resolve_budget
from lowkey.cli import choices
from lowkey.cli.checks import (
    check_bits,
    check_head_files,
    check_method,
    check_model_options,
    check_rank_allocator,
    check_sample,
    check_settings,
    check_word,
    parse_layout,
    parse_pairs,
    read_corpus,
    with_range,
)
from lowkey.cli.options import (
    BUDGET,
    EXACT,
    METHOD,
    POLICY,
    AsJson,
    Calibration,
    CandidateRanks,
    Context,
    Device,
    Dtype,
    Force,
    LayoutOption,
    MethodOptions,
    Model,
    OutFolder,
    RankAllocatorOptions,
    Seed,
    Windows,
)
from lowkey.core import files
from lowkey.core.budget import Budget
from lowkey.core.errors import LowkeyError
from lowkey.core.options import Range, checked, shown

AT_LEAST_ONE = Range(at_least=1)


def compress(
    model: Model,
    out: OutFolder,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="a name that `lowkey methods` lists, with its paper's defaults, or package.module:Class "
            "(default: what did best on a real model at this budget, packed integers included)",
            rich_help_panel=METHOD,
        ),
    ] = None,
    option: MethodOptions = None,
    layout: LayoutOption = None,
    ranks: CandidateRanks = None,
    rank_multiple: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="allow only ranks per KV head that are a multiple of this, or the head dim",
            rich_help_panel=METHOD,
        ),
    ] = 1,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="what the compressed layers may hold: '50%', '64 KiB/token', or '1.5 GiB' of one sequence "
            "(default: 50%)",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    error_budget: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="instead of a budget: the largest layer error, like 0.03, or what else the allocator "
            "bounds (see `lowkey methods`)",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"store latents as packed integers: {', '.join(choices.SCHEMES)}, or {choices.NO_BITS} "
            f"(default: {choices.NO_BITS} if --method is given)",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    at: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="length of the cache, in tokens, for which the budget is counted, exact tokens included "
            "(at least 1)",
            rich_help_panel=BUDGET,
        ),
    ] = BUDGET_LENGTH,
    allocator: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"how ranks are split over layers: {', '.join(RANK_ALLOCATORS)}, or package.module:Class "
            "(default: the method's own)",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    allocator_option: RankAllocatorOptions = None,
    judge: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="how a layer's error is measured: layers (relative error of its output) or loss (nats by "
            "which the cross-entropy grows when only this layer is compressed)",
            rich_help_panel=BUDGET,
        ),
    ] = "layers",
    sinks: Annotated[
        int,
        typer.Option(
            metavar="N", help=with_range("Exact", "sinks", "first tokens kept exact"), rich_help_panel=EXACT
        ),
    ] = choices.SINKS,
    recent: Annotated[
        int,
        typer.Option(
            metavar="N", help=with_range("Exact", "recent", "last tokens kept exact"), rich_help_panel=EXACT
        ),
    ] = choices.RECENT,
    calibration: Calibration = None,
    windows: Windows = 32,
    context: Context = None,
    seed: Seed = 0,
    heads: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="head scores that `lowkey heads` wrote, kept in the plan for policies on top of it",
            rich_help_panel=POLICY,
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Fit a low-rank method on text and write a plan.

    The ranks of all layers are chosen for the budget. Interrupted work resumes when the same command is given
    again.
    """
    options, of_allocator = parse_pairs(option), parse_pairs(allocator_option, "allocator option")
    _check_method(method, options, allocator, of_allocator)
    form = None if layout is None else parse_layout(layout)
    if ranks is not None:
        read_request(ranks)
    checked("rank multiple", rank_multiple, int, AT_LEAST_ONE, 1)
    check_word("judge", judge, JUDGES)
    limit = resolve_budget(budget, error_budget, judge)
    if isinstance(limit, Budget) and limit.unit != "bytes":
        limit.bytes_per_token(1)  # refuses a budget of tokens
    check_bits(bits, also=[choices.NO_BITS])
    checked("at", at, int, AT_LEAST_ONE, BUDGET_LENGTH)
    check_settings("Exact", sinks=sinks, recent=recent)
    check_sample(windows, context, seed)
    check_model_options(model, dtype, device)
    check_head_files(heads)
    corpus = read_corpus(calibration)
    work = files.check_output(out, force)

    from lowkey.calibration.calibrate import calibrate
    from lowkey.catalog import make_allocator, make_method
    from lowkey.cli.loading import check_context, head_scores, make_sample, open_model
    from lowkey.cli.tables import show_plan
    from lowkey.core.progress import bars

    chosen = None if method is None else make_method(method, options)
    name = chosen.allocator if allocator is None and chosen else allocator
    split = None if name is None else make_allocator(name, of_allocator)
    loaded, tokenizer = open_model(model, dtype, device)
    check_context(context, loaded)
    plan = calibrate(
        *(loaded, tokenizer, corpus), method=chosen, budget=budget, error_budget=error_budget,
        allocator=split, layout=form, sample=make_sample(windows, context, seed), ranks=ranks,
        rank_multiple=rank_multiple, judge=judge, sinks=sinks, recent=recent, bits=bits, at=at,
        heads=head_scores(heads, loaded), work=work, progress=bars,
    )  # fmt: skip
    plan.save(out, force)
    files.remove_work(work)
    show_plan(plan, out, as_json)


def _check_method(
    method: str | None, options: dict[str, str], allocator: str | None, of_allocator: dict[str, str]
) -> None:
    """Check a method and an allocator, each with its options.

    Without `--allocator`, allocator options belong to the allocator that the method uses by default.
    """
    if method is not None:
        check_method(method, options)
    elif options:
        raise LowkeyError(
            f"option {shown(next(iter(options)))}: belongs to a method; name it with --method (`lowkey "
            "methods` lists them)"
        )
    name = choices.rank_allocator_of(method) if allocator is None and method is not None else allocator
    if name is not None:
        check_rank_allocator(name, of_allocator)
    elif of_allocator:
        raise LowkeyError(
            f"allocator option {shown(next(iter(of_allocator)))}: belongs to an allocator; name it with "
            "--allocator"
        )
