"""What is measured, from the arguments of lm-eval's command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lowkey.catalog import make_policy
from lowkey.evaluate.settings import Setting, evicted, full, packed, planned
from lowkey.plan.plan import Plan
from lowkey.policies.gates import Gates


def setting_of(
    model: PreTrainedModel,
    plan: str | None = None,
    policy: str | None = None,
    budget: str | int | None = None,
    bits: str | int | None = None,
    gates: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Setting:
    """The setting of a plan, a policy, integers, or the full cache if none is named.

    Args:
        model: the model, attached.
        plan: folder of a plan, or None.
        policy: name of a policy, or None; over the plan if there is one.
        budget: what the policy keeps.
        bits: packed integers, alone or over the plan.
        gates: folder of what the policy has learnt of the model.
        options: of the policy, by name.

    Raises:
        LowkeyError: for an unknown name or value, or parts that do not go together.
    """
    loaded = Plan.load(Path(plan), model) if plan is not None else None
    if policy is not None:
        own = {name: str(value) for name, value in (options or {}).items()}
        made = make_policy(policy, None if budget is None else str(budget), own)
        learnt = {found.method: found for found in [Gates.load(Path(gates))]} if gates is not None else None
        return evicted(model, made, policy, None, loaded, plan, gates=learnt)
    if loaded is not None:
        return planned(model, loaded, str(plan), bits)
    return full(model) if bits is None else packed(model, bits)
