"""The settings of `lowkey bench step`: what one word says, and the caches that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lowkey.cli import choices
from lowkey.cli.checks import check_plan, check_policies, check_word
from lowkey.core.errors import LowkeyError
from lowkey.core.options import shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowkey.cache.cache import LowkeyCache
    from lowkey.policies.allocators import HeadImportance

FULL, PLAN = "full", "plan"
GRAMMAR = "full, int4, snapkv:10%, plan:DIR, or several joined by + like plan:DIR+snapkv:25%+kivi4"


@dataclass(frozen=True)
class StepSetting:
    """One kind of cache.

    Args:
        name: the word that was given.
        plan: a plan folder, or None.
        policy: name of an eviction policy, or None.
        budget: what the policy keeps; None without a policy, and for one that needs no budget.
        bits: name of a packing of integers, or None.
    """

    name: str
    plan: Path | None = None
    policy: str | None = None
    budget: str | None = None
    bits: str | None = None


def parse_step_settings(words: str) -> list[StepSetting]:
    """Read settings that are separated by commas, without importing torch.

    The row of transformers' own cache is always measured, so its name may be given and changes nothing.

    Raises:
        LowkeyError: for an unknown name, a plan folder that does not exist, a budget that is none, a part
            that is given twice, or a setting that is given twice.
    """
    found: list[StepSetting] = []
    for name in (word.strip() for word in words.split(",")):
        if name == choices.STOCK_SETTING:
            continue
        if any(name == other.name for other in found):
            raise LowkeyError(f"setting {shown(name)}: is given twice; give it once")
        found.append(_parse_setting(name))
    return found


def _parse_setting(name: str) -> StepSetting:
    if name == FULL:
        return StepSetting(name)
    parts: dict[str, str | None] = {}
    for part in name.split("+"):
        for kind, value in _parse_part(name, part.strip()).items():
            if kind in parts:
                raise LowkeyError(f"setting {shown(name)}: names two of {kind}; give one")
            parts[kind] = value
    plan = parts.pop(PLAN, None)
    return StepSetting(name, plan=None if plan is None else Path(plan), **parts)


def _parse_part(name: str, part: str) -> dict[str, str | None]:
    """The fields of a setting that one of its parts gives, as text."""
    word, colon, value = part.partition(":")
    if word == PLAN and colon:
        check_plan(Path(value))
        return {PLAN: value}
    if part in choices.SCHEMES:
        return {"bits": part}
    if word in choices.SCHEMES:
        raise LowkeyError(f"setting {shown(part)}: integers take no budget; write {word!r}")
    if word == FULL:
        raise LowkeyError(f"setting {shown(name)}: full is the whole cache; give it alone, or leave it out")
    known = choices.POLICIES if colon else (FULL, *choices.SCHEMES, *choices.POLICIES)
    check_word("setting", word, known, f" or {PLAN}:DIR")
    if not colon and choices.allocator_of(word, budget=False) is None:
        raise LowkeyError(f"setting {shown(part)}: this policy needs a budget; write it as {word + ':10%'!r}")
    check_policies(word, value if colon else None, None, None, None)
    return {"policy": word, "budget": value if colon else None}


def cache_makers(
    settings: Sequence[StepSetting], model: PreTrainedModel, heads: HeadImportance
) -> dict[str, Callable[[], LowkeyCache]]:
    """What makes an empty cache of each setting.

    Args:
        settings: from `parse_step_settings`.
        model: the model, attached.
        heads: head scores by kind, beside those of plans.

    Raises:
        LowkeyError: for a plan folder that is damaged or of another model, and for head scores that lack.
    """
    from lowkey.cache.cache import make_cache
    from lowkey.catalog import make_policy
    from lowkey.cli.loading import importance
    from lowkey.cli.plans import load_plan

    makers: dict[str, Callable[[], LowkeyCache]] = {}
    for setting in settings:
        folder = load_plan(setting.plan, model) if setting.plan else None
        policy = make_policy(setting.policy, setting.budget, {}) if setting.policy else None
        if policy is not None:
            below = folder.fixed_rank("policy") if folder else None
            policy = policy.with_head_scores(importance(below, heads))
        if folder is None:
            makers[setting.name] = partial(make_cache, model, policy=policy, bits=setting.bits)
        else:
            makers[setting.name] = partial(folder.cache, model, policy, setting.bits)
    return makers
