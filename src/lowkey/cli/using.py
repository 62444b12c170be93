"""Commands that use and show what was made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lowkey.allocation.allocators import RANK_ALLOCATORS
from lowkey.cache.cache import make_cache
from lowkey.calibration.calibrate import name_and_parameters
from lowkey.calibration.dynamic import METHOD
from lowkey.catalog import make_policy
from lowkey.cli.common import (
    AllocatorOptions,
    AsJson,
    Device,
    Dtype,
    Model,
    err,
    head_scores,
    importance,
    policies_of,
)
from lowkey.cli.plans import plan_at
from lowkey.cli.tables import options_of, screen
from lowkey.core.options import Range, checked, ranges
from lowkey.core.types import LowkeyError
from lowkey.generate import stream_text
from lowkey.methods import METHODS, Method
from lowkey.methods.dynakv import GateTraining
from lowkey.models.loading import load
from lowkey.policies import POLICIES, policy_to_dict
from lowkey.policies.allocators import TOKEN_ALLOCATORS as HEAD_ALLOCATORS
from lowkey.storage.packing import SCHEMES

TOKENS = Range(at_least=1, at_most=2**24)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="text to continue")],
    plan: Annotated[Path | None, typer.Option(help="a plan folder")] = None,
    bits: Annotated[
        str | None,
        typer.Option(help=f"packed integers, of the plan's latents if there is one: {', '.join(SCHEMES)}"),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="an eviction policy that `lowkey policies` lists")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="what the policy keeps: '10%', '64 tokens', or '40 KiB' of all that is held after the prompt, to which decoding "
            "adds; fastgen may do without"
        ),
    ] = None,
    heads: Annotated[
        list[Path] | None, typer.Option(help="a file of head scores that `lowkey heads` wrote")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-O", help="an option of the policy, like every=32")
    ] = None,
    allocator_option: AllocatorOptions = None,
    tokens: Annotated[
        int, typer.Option(help=f"new tokens at most ({TOKENS}, and what the model has positions for)")
    ] = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue a prompt over a compressed cache; ends with tokens/s and the bytes held against the full
    cache.
    """
    checked("tokens", tokens, int, TOKENS, 64)
    wanted = policies_of(policy, budget, option, allocator_option, heads)
    if len(wanted) > 1:
        raise LowkeyError(
            f"policy {policy!r} with budget {budget!r}: generate takes one policy and one budget"
        )
    loaded, tokenizer = load(model, dtype, device)
    chosen = plan_at(plan, loaded) if plan else None
    below = chosen.ordinary("policy") if chosen and wanted else None
    evicting = (
        wanted[0][1].with_head_scores(importance(below, head_scores(heads, loaded))) if wanted else None
    )
    cache = chosen.cache(loaded, evicting, bits) if chosen else make_cache(loaded, None, evicting, bits=bits)
    summary = stream_text(loaded, tokenizer, prompt, cache, tokens, None if as_json else sys.stdout)
    if as_json:
        print(json.dumps(summary))
        return
    held, whole = summary["bytes_held"], summary["bytes_full"]
    err.print(
        f"\n{summary['tokens_per_s']:.1f} tokens/s; the cache holds {held:,} bytes, "
        f"{100 * held / whole:.1f}% of {whole:,}",
        highlight=False,
    )


def inspect(plan: Annotated[Path, typer.Argument(help="a plan folder")], as_json: AsJson = False) -> None:
    """What a plan holds."""
    plan_at(plan).show(as_json)


def methods(as_json: AsJson = False) -> None:
    """The methods and allocators, with their options and papers, and what `lowkey dynamic` makes."""
    listed = {
        name: {"summary": m.summary, "paper": m.paper, **_defaults(m), **_options(m)}
        for name, m in METHODS.items()
    }
    splits = {
        name: {"summary": a.summary, "bounds": a.bounds, **_options(a)} for name, a in RANK_ALLOCATORS.items()
    }  # type: ignore[attr-defined]
    own = {"summary": GateTraining.summary, "paper": GateTraining.paper}
    if as_json:
        print(json.dumps({"methods": listed, "allocators": splits, "dynamic": {METHOD: own}}))
        return
    table = Table(
        "method",
        "what it does",
        "paper",
        "allocator, layout, ranks",
        "options and their ranges (-O name=value)",
    )
    for name, kind in METHODS.items():
        others = ", ".join(_defaults(kind).values())
        table.add_row(
            name,
            kind.summary,
            kind.paper,
            others,
            options_of(kind, name_and_parameters(kind())["parameters"]),
        )
    screen.print(table)
    table = Table(
        "allocator", "what it does", "what --error-budget bounds", "options and their ranges (-A name=value)"
    )
    for name, rule in RANK_ALLOCATORS.items():
        made = rule()
        table.add_row(
            name, made.summary, made.bounds, options_of(rule, name_and_parameters(made)["parameters"])
        )
    screen.print(table)
    print(
        f"{METHOD} ({own['paper']}): {own['summary']}; made by lowkey dynamic, whose --help lists its options"
    )


def policies(as_json: AsJson = False) -> None:
    """The eviction policies and their allocators, with their options and papers."""
    known = {name: make_policy(name, "50%", {}) for name in POLICIES}
    splits = {name: {"summary": a.summary, **_options(a)} for name, a in HEAD_ALLOCATORS.items()}
    if as_json:
        words = {
            name: {"summary": p.summary, "paper": p.paper, **policy_to_dict(p), "ranges": ranges(type(p))}
            for name, p in known.items()
        }
        print(json.dumps({"policies": words, "allocators": splits}))
        return
    table = Table("policy", "keeps by", "split", "paper", "options and their ranges (-O name=value)")
    for name, policy in known.items():
        told = policy_to_dict(policy)
        table.add_row(
            name,
            policy.summary,
            told["allocator"]["name"],
            policy.paper,
            options_of(type(policy), told["parameters"]),
        )
    screen.print(table)
    table = Table("allocator", "what it does", "options and their ranges (-A name=value)")
    for name, kind in HEAD_ALLOCATORS.items():
        table.add_row(name, kind.summary, options_of(kind, name_and_parameters(kind())["parameters"]))
    screen.print(table)


def _options(kind: Any) -> dict[str, dict]:
    """Options of a method or an allocator with their defaults, and what each may be."""
    return {"options": name_and_parameters(kind())["parameters"], "ranges": ranges(kind)}


def _defaults(method: type[Method]) -> dict[str, str]:
    """What calibration takes with a method when nothing else is said."""
    return {"allocator": method.allocator, "layout": method.layout, "ranks": method.grid}
