"""What the sub-commands share: the types of their options, and how text becomes the objects they want."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.calibration.calibrate import Sample
from lowkey.catalog import make_policy
from lowkey.cli.tables import Aside
from lowkey.core import text
from lowkey.core.options import Range, check_field, checked, nearest_name, ranges, shown
from lowkey.core.types import LAYOUTS, Budget, Heads, Layout, LowkeyError
from lowkey.heads.retrieval import HeadScores
from lowkey.models import families
from lowkey.models.loading import load
from lowkey.plan.plan import Plan
from lowkey.policies.allocators import HeadImportance
from lowkey.policies.base import Policy
from lowkey.storage.packing import SCHEMES
from lowkey.version import __version__

err = Aside(stderr=True, markup=False, emoji=False)

BITS = f"also rows of packed integers, alone and in plans that have none: {', '.join(SCHEMES)} (int8 and int4, alone, when not given)"
CORES = Range(at_least=1, at_most=2**10)
Model = Annotated[
    str,
    typer.Argument(
        help="a model folder, a Hub id, a .gguf file, 'tiny' (embedded), or 'smollm2' (`lowkey download smollm2`)"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, or balanced over several GPUs")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="seed of all that is drawn at random")]
Force = Annotated[bool, typer.Option(help="replace a folder that holds files")]
Calibration = Annotated[Path | None, typer.Option(help="a UTF-8 text file (default: the embedded text)")]
AllocatorOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--allocator-option", "-A", help="an option of the allocator, like energy=singular or beta=10; repeat"
    ),
]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-O", help="an option of the method, like epochs=5")
]


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"lowkey {__version__}")
        raise typer.Exit


def every_command(
    threads: Annotated[
        int | None,
        typer.Option(
            help=f"cores to compute on ({CORES}; default: $OMP_NUM_THREADS, or all); before the command"
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="print the version", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    """What can be said before any command."""
    if threads is not None:
        torch.set_num_threads(checked("threads", threads, int, CORES))


def opened(
    model: str, dtype: str, device: str, corpus: Path | None, argument: str = "calibration"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str | None]:
    """(model, tokenizer, text or None); the text is read first, for that is soon done."""
    found = text.read_text(corpus, argument) if corpus else None
    return *load(model, dtype, device), found


def policies_of(
    names: str | None,
    budgets: str | None,
    options: list[str] | None,
    split: list[str] | None,
    heads: list[Path] | None,
) -> list[tuple[str, Policy]]:
    """(name, policy) for each name and budget."""
    if names is None:
        for what, given in (
            ("budget", budgets),
            ("option", options),
            ("allocator option", split),
            ("heads", heads),
        ):
            if given is not None:
                word = given if isinstance(given, str) else given[0]
                raise LowkeyError(
                    f"{what} {shown(str(word))}: is for a policy; give --policy too, or leave it out"
                )
        return []
    own, allocators = options_of(options), options_of(split, "allocator option")
    asked = budgets.split(",") if budgets is not None else [None]
    return [(n, make_policy(n, b, own, allocators)) for n in names.split(",") for b in asked]


def head_scores(paths: list[Path] | None, model: PreTrainedModel) -> HeadImportance:
    """Importance of the KV heads by kind, out of files."""
    found = [HeadScores.load(path, model) for path in paths or []]
    return {scores.kind: scores.per_kv_head().tolist() for scores in found}


def importance(plan: Plan | None, heads: HeadImportance) -> HeadImportance:
    return {**(plan.heads if plan else {}), **heads}


def options_of(pairs: list[str] | None, what: str = "option") -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise LowkeyError(f"{what} {shown(pair)}: write it as name=value, like epochs=5")
        if name in found:
            raise LowkeyError(f"{what} {shown(pair)}: {name} is given twice; give it once")
        found[name] = value
    return found


def layout_of(name: str) -> Layout:
    for known in LAYOUTS:
        if name == known:
            return known
    raise LowkeyError(f"layout {shown(name)} is unknown; choose one of {', '.join(LAYOUTS)}")


def heads_of(name: str) -> Heads:
    for known in get_args(Heads):
        if name == known:
            return known
    raise LowkeyError(f"key bases {shown(name)} are unknown; choose one of {', '.join(get_args(Heads))}")


def word_of(what: str, word: str, known: Iterable[str]) -> str:
    """A word out of a list. Errors: LowkeyError with the nearest, or all."""
    if word not in known:
        raise LowkeyError(f"{what} {shown(word)} is unknown; {nearest_name(word, known)}")
    return word


def share_of(budget: str) -> float:
    """A budget that can only be a share, above 0 and up to 1."""
    found = Budget.parse(budget)
    if found.unit != "%":
        raise LowkeyError(
            f"budget {found}: tokens keep ranks of their own, so that only a mean share can be asked for; "
            "say it as '50%'"
        )
    return found.amount / 100


def within(kind: Any, name: str, help: str) -> str:
    """A help text with the range of the field that the option becomes."""
    return f"{help} ({ranges(kind)[name]})"


def hold(kind: Any, **given: Any) -> None:
    """Hold options to the ranges of the fields that they become, before a model is loaded. A field called
    otherwise than the option is given as (option's name, value)."""
    for name, value in given.items():
        shown_as, found = value if isinstance(value, tuple) else (name, value)
        check_field(kind, name, found, shown_as)


def sample_of(windows: int, context: int | None, seed: int) -> Sample:
    """What to calibrate on; without a context, windows are of the usual length or as long as a short model
    allows.
    """
    hold(
        Sample, windows=windows, seed=seed, length=("context", Sample.length if context is None else context)
    )
    return Sample(windows, seed=seed) if context is None else Sample(windows, context, seed)


def check_context(context: int | None, model: PreTrainedModel) -> None:
    """Errors: LowkeyError for windows that are longer than the model reads."""
    longest = families.positions(model)
    if context is not None and longest is not None and context > longest:
        raise LowkeyError(f"context {context}: the model has {longest} positions; give at most that")
