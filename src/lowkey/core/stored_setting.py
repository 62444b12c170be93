"""What is stored of a cache, as text: `full`, `int4`, `rank:50%`, `snapkv:10%`, `plan:DIR`, or some joined.

Imports no torch: the command line reads settings before it loads torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowkey.core.budget import Budget
from lowkey.core.errors import LowkeyError
from lowkey.core.options import nearest_name, shown

FULL, RANK, PLAN = "full", "rank", "plan"
EXPANDED = "expanded"  # the keys and values of all heads, of a model that stores latents


@dataclass(frozen=True)
class StoredSetting:
    """What is stored, on each axis; None everywhere for the full cache.

    Args:
        text: as it was given.
        rank: the share of the rank of every head that is kept, above 0 and up to 1.
        bits: the packing.
        policy: the name of the eviction policy.
        budget: what the policy keeps; None without a policy, or for one that needs none.
        plan: a plan folder, of which the other axes may replace parts.
    """

    text: str
    rank: float | None = None
    bits: str | None = None
    policy: str | None = None
    budget: Budget | None = None
    plan: Path | None = None

    @property
    def is_full(self) -> bool:
        """Whether nothing is made smaller."""
        return self.rank is self.bits is self.policy is self.plan is None


def parse_settings(
    text: str,
    packings: Sequence[str],
    policies: Sequence[str],
    also: Sequence[str] = (),
    budget_is_optional: Sequence[str] = (),
) -> list[StoredSetting]:
    """Read settings that are separated by commas.

    Args:
        text: as it was given.
        packings: the names of packings.
        policies: the names of policies.
        also: other words that stand for a whole cache.
        budget_is_optional: the policies that may be given without a budget.

    Raises:
        LowkeyError: for an unknown name, a wrong share or budget, and what is given twice.
    """
    words = [word.strip() for word in text.split(",")]
    found = [_parse(word, packings, policies, also, budget_is_optional) for word in words]
    names = [setting.text for setting in found]
    for name in names:
        if names.count(name) > 1:
            raise LowkeyError(f"setting {shown(name)}: is given twice; give it once")
    return found


def _parse(
    text: str,
    packings: Sequence[str],
    policies: Sequence[str],
    also: Sequence[str],
    budget_is_optional: Sequence[str],
) -> StoredSetting:
    """Read one setting, whose parts are joined by `+`."""
    if text in (FULL, *also):
        return StoredSetting(text)
    axes: dict[str, Any] = {}
    for part in text.split("+"):
        head, colon, rest = part.strip().partition(":")
        if head == RANK and colon:
            axis: dict[str, Any] = {"rank": _share(text, rest)}
        elif head == PLAN and colon and rest:
            axis = {"plan": Path(rest)}
        elif head in policies:
            if not rest and (colon or head not in budget_is_optional):
                raise LowkeyError(f"setting {shown(text)}: says not what is kept; write it as '{head}:10%'")
            axis = {"policy": head, "budget": Budget.parse(rest) if rest else None}
        elif head in packings:
            if colon:
                raise LowkeyError(f"setting {shown(text)}: integers take no budget; write {head!r}")
            axis = {"bits": head}
        elif head in (FULL, *also):
            raise LowkeyError(f"setting {shown(text)}: {head} is the whole cache; give it alone")
        else:
            known = [FULL, *also, "rank:50%", *packings, *(f"{name}:10%" for name in policies), "plan:DIR"]
            raise LowkeyError(f"setting {shown(text)} is unknown; {nearest_name(part.strip(), known)}")
        if twice := axes.keys() & axis.keys():
            raise LowkeyError(f"setting {shown(text)}: gives {min(twice)} twice; give it once")
        axes |= axis
    if "plan" in axes and "rank" in axes:
        raise LowkeyError(f"setting {shown(text)}: a plan has ranks of its own; leave out one of them")
    return StoredSetting(text, **axes)


def _share(text: str, share: str) -> float:
    budget = Budget.parse(share)
    if budget.unit != "%":
        raise LowkeyError(f"setting {shown(text)}: a rank is a share of the head dim; write it as 'rank:50%'")
    return budget.amount / 100
