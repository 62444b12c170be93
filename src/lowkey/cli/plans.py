"""Plan folders of both kinds, behind one interface for commands.

A plan of `lowkey compress` has ranks that all tokens share. A plan of `lowkey dynamic` has a rank for every
token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel

from lowkey.cache.cache import LowkeyCache, make_cache
from lowkey.calibration import dynamic
from lowkey.calibration.dynamic import DynamicPlan, make_dynamic_cache
from lowkey.cli.tables import show_dynamic, show_plan
from lowkey.core import files
from lowkey.core.types import LowkeyError
from lowkey.evaluate.settings import Setting, plan_place, planned, row_identity, window_of
from lowkey.plan.plan import Plan
from lowkey.policies.base import Policy


class PlanFolder(Protocol):
    """What commands ask of a plan folder of either kind.

    Every method raises LowkeyError for what this kind of plan cannot do.
    """

    @property
    def path(self) -> Path:
        """The folder."""

    @property
    def bits(self) -> str | None:
        """The packing of integers that the plan itself has, or None."""

    def fixed_rank(self, purpose: str) -> Plan:
        """The plan, if its ranks are the same for all tokens. purpose: what needs that, for the message."""

    def cache(self, model: PreTrainedModel, policy: Policy | None, bits: str | None) -> LowkeyCache:
        """A new cache of the model. policy, bits: on top of the plan, or None."""

    def setting(
        self,
        model: PreTrainedModel,
        bits: str | None = None,
        sinks: int | None = None,
        recent: int | None = None,
    ) -> Setting:
        """A row of `lowkey eval`. sinks, recent: exact tokens in place of the plan's own, or None."""

    def show(self, as_json: bool) -> None:
        """Print what the plan holds."""


@dataclass(frozen=True)
class FixedRankFolder:
    """A plan that `lowkey compress` made."""

    path: Path
    plan: Plan

    @property
    def bits(self) -> str | None:
        return self.plan.bits

    def fixed_rank(self, purpose: str) -> Plan:
        return self.plan

    def cache(self, model: PreTrainedModel, policy: Policy | None, bits: str | None) -> LowkeyCache:
        return make_cache(model, self.plan, policy, bits=bits)

    def setting(
        self,
        model: PreTrainedModel,
        bits: str | None = None,
        sinks: int | None = None,
        recent: int | None = None,
    ) -> Setting:
        return planned(
            model, self.plan, str(self.path), bits, window_of(model, self.plan, bits, sinks, recent)
        )

    def show(self, as_json: bool) -> None:
        show_plan(self.plan, self.path, as_json)


@dataclass(frozen=True)
class DynamicRankFolder:
    """A plan that `lowkey dynamic` made."""

    path: Path
    plan: DynamicPlan

    @property
    def bits(self) -> str | None:
        return None

    def fixed_rank(self, purpose: str) -> Plan:
        raise LowkeyError(
            f"{purpose} with plan {str(self.path)!r}: it gives every token a rank of its own, which only "
            "eval and generate can use, without a policy or bits; give a plan that lowkey compress made"
        )

    def cache(self, model: PreTrainedModel, policy: Policy | None, bits: str | None) -> LowkeyCache:
        self._refuse_others(policy, bits)
        return make_dynamic_cache(model, self.plan)

    def setting(
        self,
        model: PreTrainedModel,
        bits: str | None = None,
        sinks: int | None = None,
        recent: int | None = None,
    ) -> Setting:
        self._refuse_others(None, bits)
        self.plan.check(model)
        known = row_identity(
            method=dynamic.DYNAMIC_METHOD,
            plan=str(self.path),
            budget=self.plan.budget,
            layout=self.plan.layout,
        )
        marks = {
            "layout": self.plan.layout,
            "seed": f"seed={self.plan.provenance.get('seed')}",
            **plan_place(str(self.path)),
        }
        return Setting(
            f"{dynamic.DYNAMIC_METHOD} {self.plan.budget}",
            known,
            lambda: dynamic.unchecked_dynamic_cache(model, self.plan),
            marks=marks,
            made_of=self.plan.digest(),
        )

    def show(self, as_json: bool) -> None:
        show_dynamic(self.plan.describe(), self.path, as_json)

    def _refuse_others(self, policy: Policy | None, bits: str | None) -> None:
        """Raises: LowkeyError for a policy or bits, which need ranks that are the same for all tokens."""
        for name, given in (("policy", policy), ("bits", bits)):
            if given is not None:
                self.fixed_rank(name)


def load_plan(path: Path, model: PreTrainedModel | None = None) -> PlanFolder:
    """Load a plan folder of either kind; its files say which it is.

    Args:
        path: the folder.
        model: if given, the plan must have been made for it.

    Raises:
        LowkeyError: for a folder that is missing, damaged, or of another model.
    """
    return files.read_consistently(path, lambda: _load(path, model))


def _load(path: Path, model: PreTrainedModel | None) -> PlanFolder:
    if (path / dynamic.DYNAMIC_PLAN_JSON).exists():
        return DynamicRankFolder(path, DynamicPlan.load(path, model))
    return FixedRankFolder(path, Plan.load(path, model))
