"""The settings of `lowkey bench step`: checked without torch, and then what makes an empty cache of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from lowkey.cli import choices
from lowkey.cli.checks import check_plan, check_policies
from lowkey.core.errors import LowkeyError
from lowkey.core.options import shown
from lowkey.core.stored_setting import StoredSetting, parse_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowkey.cache.cache import LowkeyCache
    from lowkey.policies.sharing import HeadImportance

GRAMMAR = "full, int4, snapkv:10%, plan:DIR, or several joined by + like plan:DIR+snapkv:25%+kivi4"


def parse_step_settings(words: str) -> list[StoredSetting]:
    """Read settings that are separated by commas, without importing torch.

    The row of transformers' own cache is always measured, so its name may be given and changes nothing.

    Raises:
        LowkeyError: for an unknown name, a plan folder that does not exist, a budget that is none, ranks
            without a plan, or what is given twice.
    """
    budget_is_optional = [name for name in choices.POLICIES if choices.allocator_of(name, budget=False)]
    found = parse_settings(
        words, choices.SCHEMES, choices.POLICIES, (choices.STOCK_SETTING,), budget_is_optional
    )
    for setting in found:
        if setting.rank is not None:
            raise LowkeyError(
                f"setting {shown(setting.text)}: ranks are timed on a plan; make one with lowkey compress, "
                "and give it as plan:DIR"
            )
        if setting.plan is not None:
            check_plan(setting.plan)
        if setting.policy is not None:
            check_policies(
                setting.policy, str(setting.budget) if setting.budget else None, None, None, None, None
            )
    return [setting for setting in found if setting.text != choices.STOCK_SETTING]


def cache_makers(
    settings: Sequence[StoredSetting], model: PreTrainedModel, heads: HeadImportance
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
    from lowkey.plan.plan import Plan

    makers: dict[str, Callable[[], LowkeyCache]] = {}
    for setting in settings:
        plan = Plan.load(setting.plan, model) if setting.plan else None
        policy = make_policy(setting.policy, setting.budget, {}) if setting.policy else None
        if policy is not None:
            policy = policy.with_head_scores(importance(plan, heads))
        makers[setting.text] = partial(make_cache, model, plan, policy, bits=setting.bits)
    return makers
