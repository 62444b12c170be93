"""Make models, policies and head scores from checked arguments.

Imports torch, so commands import this module only after their arguments have been checked.
"""

from __future__ import annotations

import logging
from pathlib import Path

import huggingface_hub
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.calibration.calibrate import Sample
from lowkey.catalog import make_policy
from lowkey.cli import choices
from lowkey.cli.checks import parse_pairs
from lowkey.core.types import LowkeyError
from lowkey.heads.scores import HeadScores
from lowkey.models import families, loading
from lowkey.plan.plan import Plan
from lowkey.policies.base import Policy
from lowkey.policies.gates import Gates
from lowkey.policies.sharing import HeadImportance


def quiet_libraries() -> None:
    """Keep messages and progress bars of the libraries off stderr; commands write their own."""
    logging.getLogger("lowkey").setLevel(logging.ERROR)
    # that kernels are being compiled is worth a line, since it takes long
    logging.getLogger("lowkey.backends").setLevel(logging.WARNING)
    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def open_model(name: str, dtype: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, attached, and its tokenizer.

    Raises:
        LowkeyError: for a model that cannot be loaded.
    """
    quiet_libraries()
    return loading.load(name, dtype, device)


def open_small_model(
    name: str | None,
    policies: list[tuple[str, Policy]],
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    device: str,
) -> PreTrainedModel | None:
    """Load the model that reads along, if there is one.

    Raises:
        LowkeyError: if no policy lets it, or for a model that cannot be loaded or has another tokenizer.
    """
    if name is None:
        return None
    if not any(wanted.reads_along for _, wanted in policies):
        raise LowkeyError(
            f"small model {name!r}: none of the policies lets it read along; give one that does, or leave it "
            "out"
        )
    model, own = open_model(name, dtype, device)
    if own.get_vocab() != tokenizer.get_vocab():
        raise LowkeyError(
            f"small model {name!r}: its tokenizer has other tokens than the model's; give a model of the "
            "same tokenizer"
        )
    return model


def check_context(context: int | None, model: PreTrainedModel) -> None:
    """Raises: LowkeyError for windows that have more tokens than the model has positions."""
    longest = families.max_positions(model)
    if context is not None and longest is not None and context > longest:
        raise LowkeyError(f"context {context}: the model has {longest} positions; give at most that")


def make_sample(windows: int, context: int | None, seed: int) -> Sample:
    """Make the settings of what to calibrate on. Without a context, `Sample` chooses the window length."""
    return Sample(windows, seed=seed) if context is None else Sample(windows, context, seed)


def make_policies(
    names: str | None,
    budgets: str | None,
    given: list[str] | None,
    allocator_given: list[str] | None,
) -> list[tuple[str, Policy]]:
    """(name, policy) for each name but `none`, and each budget."""
    if names is None:
        return []
    own, of_allocator = parse_pairs(given), parse_pairs(allocator_given, "allocator option")
    every = budgets.split(",") if budgets is not None else [None]
    chosen = [name for name in names.split(",") if name != choices.NO_POLICY]
    return [(n, make_policy(n, budget, own, of_allocator)) for n in chosen for budget in every]


def head_scores(paths: list[Path] | None, model: PreTrainedModel) -> HeadImportance:
    """The importance of the model's KV heads by kind, from files of `lowkey heads`."""
    found = [HeadScores.load(path, model) for path in paths or []]
    return {scores.kind: scores.per_kv_head().tolist() for scores in found}


def learnt_gates(paths: list[Path] | None) -> dict[str, Gates]:
    """What policies have learnt of the model, by method, from folders of `lowkey gates`."""
    return {gates.method: gates for gates in map(Gates.load, paths or [])}


def importance(plan: Plan | None, heads: HeadImportance) -> HeadImportance:
    """Merge the importance of heads in a plan with what was given beside it, which has precedence."""
    return {**(plan.heads if plan else {}), **heads}
