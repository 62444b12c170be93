"""`lowkey generate`: continue a prompt over a compressed cache."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lowkey.cli import choices
from lowkey.cli.checks import check_bits, check_model_options, check_plan, check_policies
from lowkey.cli.console import note
from lowkey.cli.options import (
    CACHE,
    OUTPUT,
    POLICY,
    AsJson,
    Device,
    Dtype,
    GateFolders,
    HeadFiles,
    Model,
    PolicyOptions,
    SmallModel,
    TokenAllocatorOptions,
)
from lowkey.core.errors import LowkeyError
from lowkey.core.options import Range, checked
from lowkey.core.text import check_unicode

if TYPE_CHECKING:
    from lowkey.policies.base import Policy

TOKENS = Range(at_least=1, at_most=2**24)
DRAFT, USUAL_DRAFT = Range(at_least=1, at_most=2**10), 4


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="text to continue", rich_help_panel=OUTPUT)],
    tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=f"new tokens at most ({TOKENS}, and what the model has positions for)",
            rich_help_panel=OUTPUT,
        ),
    ] = 64,
    plan: Annotated[
        Path | None, typer.Option(metavar="PLAN", help="a plan folder", rich_help_panel=CACHE)
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="packed integers, of the plan's latents if there is a plan: "
            f"{', '.join(choices.SCHEMES)}; {choices.NO_BITS}: without the plan's own",
            rich_help_panel=CACHE,
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="an eviction policy that `lowkey policies` lists, or package.module:Class; "
            f"{choices.NO_POLICY}: without the plan's own",
            rich_help_panel=POLICY,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="what the policy keeps: '10%', '64 tokens', or '40 KiB' of everything that is held after "
            "the prompt, to which decoding adds; fastgen takes none",
            rich_help_panel=POLICY,
        ),
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="full: the chosen cache only drafts, and the full cache verifies, so that the text is the "
            "full cache's, with the most likely token at every step (an experiment)",
            rich_help_panel=CACHE,
        ),
    ] = None,
    draft: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"tokens drafted for each verification, with --verify ({DRAFT}; default: {USUAL_DRAFT})",
            rich_help_panel=CACHE,
        ),
    ] = None,
    option: PolicyOptions = None,
    allocator_option: TokenAllocatorOptions = None,
    heads: HeadFiles = None,
    gates: GateFolders = None,
    small_model: SmallModel = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue a prompt over a compressed cache.

    The text goes to stdout as it comes. Tokens per second, and the bytes held beside those of the full cache,
    are told on stderr.
    """
    if not prompt:
        raise LowkeyError("prompt '': is empty; give some text to continue")
    check_unicode("prompt", prompt)
    checked("tokens", tokens, int, TOKENS, 64)
    if verify not in (None, "full"):
        raise LowkeyError(f"verify {verify!r}: give full, or leave it out")
    if draft is not None and verify is None:
        raise LowkeyError(f"draft {draft}: is of --verify; give --verify full")
    checked("draft", USUAL_DRAFT if draft is None else draft, int, DRAFT, USUAL_DRAFT)
    check_bits(bits, also=[choices.NO_BITS])
    check_policies(policy, budget, option, allocator_option, heads, gates, small_model)
    if any("," in (given or "") for given in (policy, budget)):
        raise LowkeyError(
            f"policy {policy!r} with budget {budget!r}: generate takes one policy and one budget"
        )
    check_model_options(model, dtype, device)
    if plan is not None:
        check_plan(plan)

    from lowkey.cache.cache import make_cache
    from lowkey.cli.loading import (
        head_scores,
        importance,
        learnt_gates,
        make_policies,
        open_model,
        open_small_model,
    )
    from lowkey.generate import stream_text
    from lowkey.plan.plan import Plan

    wanted = make_policies(policy, budget, option, allocator_option)
    loaded, tokenizer = open_model(model, dtype, device)
    small = open_small_model(small_model, wanted, tokenizer, dtype, device)
    chosen = Plan.load(plan, loaded) if plan else None
    evicting: Policy | Literal["none"] | None = "none" if policy == choices.NO_POLICY else None
    if wanted:
        evicting = wanted[0][1].with_head_scores(importance(chosen, head_scores(heads, loaded)))
    learnt = learnt_gates(gates).get(wanted[0][1].learns) if wanted else None
    cache = make_cache(loaded, chosen, evicting, bits=bits, gates=learnt, small=small)
    out = None if as_json else sys.stdout
    drafting = (draft or USUAL_DRAFT) if verify else 0
    summary = stream_text(loaded, tokenizer, prompt, cache, tokens, out, drafting)
    if as_json:
        print(json.dumps(summary))
        return
    held, whole = summary["bytes_held"], summary["bytes_full"]
    if verify:
        note(
            f"\n{summary['accepted_per_verification']:.2f} of {drafting} drafted tokens accepted, on average "
            f"over {summary['verifications']} verifications; the full cache is held besides"
        )
    note(
        f"\n{summary['tokens_per_s']:.1f} tokens/s; the cache holds {held:,} bytes, "
        f"{100 * held / whole:.1f}% of {whole:,}"
    )
    if small is not None:
        note(
            f"of these, {summary['bytes_small_cache']:,} bytes are the small model's cache; its weights take "
            f"{summary['bytes_small_weights']:,} more"
            + (f"; {summary['bytes_host']:,} lie in host memory" if summary["bytes_host"] else "")
        )
