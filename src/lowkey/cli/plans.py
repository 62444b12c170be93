"""Plan folders of both kinds, as commands use them: one rank for all tokens, or a rank for every token."""

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


class Folder(Protocol):
    """`wanted` says on whose behalf an ordinary plan is asked for; sinks and recent, of `setting`, stand in
    the place of the plan's own where it keeps exact tokens. bits: the packing that it has itself. Errors:
    LowkeyError for what this kind of plan cannot do."""

    @property
    def path(self) -> Path: ...

    @property
    def bits(self) -> str | None: ...

    def ordinary(self, wanted: str) -> Plan: ...

    def cache(self, model: PreTrainedModel, policy: Policy | None, bits: str | None) -> LowkeyCache: ...

    def setting(
        self,
        model: PreTrainedModel,
        bits: str | None = None,
        sinks: int | None = None,
        recent: int | None = None,
    ) -> Setting: ...

    def show(self, as_json: bool) -> None: ...


@dataclass(frozen=True)
class Ordinary:
    """A plan that `lowkey compress` made."""

    path: Path
    plan: Plan

    @property
    def bits(self) -> str | None:
        return self.plan.bits

    def ordinary(self, wanted: str) -> Plan:
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
class Dynamic:
    """A plan that `lowkey dynamic` made."""

    path: Path
    plan: DynamicPlan

    @property
    def bits(self) -> str | None:
        return None

    def ordinary(self, wanted: str) -> Plan:
        rule = "gives every token a rank of its own, which only eval and generate can use, without a policy and bits"
        raise LowkeyError(
            f"{wanted} with plan {str(self.path)!r}: it {rule}; give a plan that lowkey compress made"
        )

    def cache(self, model: PreTrainedModel, policy: Policy | None, bits: str | None) -> LowkeyCache:
        self._alone(policy, bits)
        return make_dynamic_cache(model, self.plan)

    def setting(
        self,
        model: PreTrainedModel,
        bits: str | None = None,
        sinks: int | None = None,
        recent: int | None = None,
    ) -> Setting:
        self._alone(None, bits)
        self.plan.check(model)
        known = row_identity(
            method=dynamic.METHOD, plan=str(self.path), budget=self.plan.budget, layout=self.plan.layout
        )
        marks = {
            "layout": self.plan.layout,
            "seed": f"seed={self.plan.provenance.get('seed')}",
            **plan_place(str(self.path)),
        }
        return Setting(
            *(
                f"{dynamic.METHOD} {self.plan.budget}",
                known,
                lambda: dynamic.unchecked_dynamic_cache(model, self.plan),
            ),
            marks=marks,
            made_of=self.plan.digest(),
        )

    def show(self, as_json: bool) -> None:
        show_dynamic(self.plan.describe(), self.path, as_json)

    def _alone(self, policy: Policy | None, bits: str | None) -> None:
        for name, given in (("policy", policy), ("bits", bits)):
            if given is not None:
                self.ordinary(name)


def plan_at(path: Path, model: PreTrainedModel | None = None) -> Folder:
    """Which kind a folder is, its files say. Errors: LowkeyError as `Plan.load` and `DynamicPlan.load` have
    them.
    """
    return files.steady(path, lambda: _at(path, model))


def _at(path: Path, model: PreTrainedModel | None) -> Folder:
    if (path / dynamic.DYNAMIC_PLAN_JSON).exists():
        return Dynamic(path, DynamicPlan.load(path, model))
    return Ordinary(path, Plan.load(path, model))
