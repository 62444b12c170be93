"""What the sub-commands share: the types of their options, and how text becomes the objects they want."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey import text
from lowkey.heads import HeadScores
from lowkey.layers.packing import SCHEMES
from lowkey.loading import load, make_policy
from lowkey.plan import Plan
from lowkey.policies.allocators import HeadImportance
from lowkey.policies.base import Policy
from lowkey.types import LAYOUTS, Budget, Heads, Layout, LowkeyError

err = Console(stderr=True, markup=False, emoji=False)  # paths and names are printed as they are

BITS = f"also rows of packed integers, alone and for each plan's latents: {', '.join(SCHEMES)} (int8 and int4, alone, when not given)"
Model = Annotated[str, typer.Argument(help="a model folder, a Hub id, or 'tiny' (the embedded model)")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, or balanced over several GPUs")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="seed of the calibration sample and of training")]
Force = Annotated[bool, typer.Option(help="replace a folder that holds files")]
Calibration = Annotated[Path | None, typer.Option(help="a UTF-8 text file (default: the embedded text)")]
Options = Annotated[list[str] | None, typer.Option("--option", "-O", help="an option of the method, like epochs=5")]


def opened(
    model: str, dtype: str, device: str, corpus: Path | None, argument: str = "calibration"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str | None]:
    """(model, tokenizer, text or None); the text is read first, for that is soon done."""
    found = text.read_text(corpus, argument) if corpus else None
    return *load(model, dtype, device), found


def policies_of(names: str | None, budgets: str | None, options: list[str] | None) -> list[tuple[str, Policy]]:
    """(name, policy) for each name and budget."""
    if names is None:
        if budgets is not None:
            raise LowkeyError(f"budget {budgets!r}: is for a policy; give --policy too, or a plan for low rank")
        return []
    if budgets is None:
        raise LowkeyError(f"policy {names!r}: needs a budget; give --budget, like 10% or '64 tokens'")
    given = options_of(options)
    return [(n, make_policy(n, b, given)) for n in names.split(",") for b in budgets.split(",")]


def head_scores(paths: list[Path] | None, model: PreTrainedModel) -> HeadImportance:
    """Importance of the KV heads by kind, out of files."""
    found = [HeadScores.load(path, model) for path in paths or []]
    return {scores.kind: scores.per_kv_head().tolist() for scores in found}


def importance(plan: Plan | None, heads: HeadImportance) -> HeadImportance:
    return {**(plan.heads if plan else {}), **heads}


def options_of(pairs: list[str] | None) -> dict[str, str]:
    for pair in pairs or []:
        if "=" not in pair:
            raise LowkeyError(f"option {pair!r}: write it as name=value, like epochs=5")
    return dict(pair.split("=", 1) for pair in pairs or [])


def layout_of(name: str) -> Layout:
    for known in LAYOUTS:
        if name == known:
            return known
    raise LowkeyError(f"layout {name!r} is unknown; choose one of {', '.join(LAYOUTS)}")


def heads_of(name: str) -> Heads:
    for known in get_args(Heads):
        if name == known:
            return known
    raise LowkeyError(f"key bases {name!r} are unknown; choose one of {', '.join(get_args(Heads))}")


def share_of(budget: str) -> float:
    """A budget that can only be a share, above 0 and up to 1."""
    found = Budget.parse(budget)
    if found.unit != "%":
        raise LowkeyError(f"budget {found}: tokens keep ranks of their own, so that only a mean share can be asked for; say it as '50%'")
    return found.amount / 100


def at_least(least: int, **counts: int) -> None:
    for name, count in counts.items():
        if count < least:
            raise LowkeyError(f"{name} {count}: must be at least {least}; leave it out for the default")
