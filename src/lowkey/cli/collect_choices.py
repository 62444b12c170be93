"""Write `data/choices.json`, which `lowkey.cli.choices` reads: `python -m lowkey.cli.collect_choices`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lowkey
from lowkey.attention import ATTENTION_KINDS, SUBSETS
from lowkey.cache.cache import NO_POLICY
from lowkey.calibration.calibrate import Sample
from lowkey.calibration.recover import OBJECTIVES, Recovery
from lowkey.catalog import make_policy
from lowkey.cli.stand_ins import fields_described
from lowkey.conversion import BASES, CONVERSION_FIELDS, CONVERSIONS, FREQUENCIES, HEAD_POOLINGS
from lowkey.core.errors import LowkeyError
from lowkey.evaluate.decode_bench import DecodeShape
from lowkey.evaluate.recall import FORMS, USUAL_FORM
from lowkey.evaluate.result import TASKS, USUAL_TASKS, Task
from lowkey.evaluate.step_bench import STOCK_SETTING, StepTiming
from lowkey.export import FORMATS
from lowkey.harness.protocols import ASK_AFTER, PROTOCOLS
from lowkey.harness.task_settings import TaskMeasuring
from lowkey.heads import CHAIN_KINDS, GATES
from lowkey.heads.diversity import Compared
from lowkey.heads.induction import ECHOES
from lowkey.heads.needles import NEEDLE_TASKS, Drawing
from lowkey.heads.retrieval import SCORE_KINDS
from lowkey.methods import METHODS
from lowkey.methods.dynakv import GateTraining
from lowkey.plan.reading import PLAN_JSON
from lowkey.plan.token_ranks import DYNAMIC_PLAN_JSON
from lowkey.planner.candidates import AXES, EVICTION
from lowkey.planner.plan_for import Search
from lowkey.policies import PLANNED, POLICIES, policy_to_dict
from lowkey.policies.allocators import TOKEN_ALLOCATORS
from lowkey.storage.exact import DEFAULT_WINDOW, Exact
from lowkey.storage.packing import NO_BITS, SCHEMES
from lowkey.suites import SUITES

FILE = Path(lowkey.__file__).parent / "data" / "choices.json"
SETTINGS = (
    *(Compared, Drawing, Exact, GateTraining, Recovery, Sample, DecodeShape, Search, StepTiming, Task),
    TaskMeasuring,
)


def collected() -> dict[str, Any]:
    """What can be chosen, from the tables and classes themselves."""
    return {
        "methods": {
            name: {"allocator": kind.allocator, "options": fields_described(kind)}
            for name, kind in METHODS.items()
        },
        "policies": {name: _policy(name) for name in POLICIES},
        "token_allocators": {name: fields_described(kind) for name, kind in TOKEN_ALLOCATORS.items()},
        "settings": {kind.__name__: fields_described(kind) for kind in SETTINGS},
        "schemes": list(SCHEMES),
        "no_bits": NO_BITS,
        "no_policy": NO_POLICY,
        "tasks": list(TASKS),
        "usual_tasks": list(USUAL_TASKS),
        "protocols": PROTOCOLS,
        "ask_after": ASK_AFTER,
        "suites": list(SUITES),
        "recall_forms": {name: form.summary for name, form in FORMS.items()},
        "usual_recall_form": USUAL_FORM,
        "head_kinds": list(SCORE_KINDS),
        "echo_kinds": list(ECHOES),
        "chain_kinds": list(CHAIN_KINDS),
        "gates": list(GATES),
        "needle_tasks": list(NEEDLE_TASKS),
        "attention_kinds": list(ATTENTION_KINDS),
        "attentions": {
            kind: {name: of.__name__ for name, of in CONVERSION_FIELDS[kind].items()} for kind in CONVERSIONS
        },
        "layer_subsets": list(SUBSETS),
        "poolings": list(HEAD_POOLINGS),
        "bases": list(BASES),
        "frequencies": list(FREQUENCIES),
        "objectives": list(OBJECTIVES),
        "formats": list(FORMATS),
        "plan_files": [PLAN_JSON, DYNAMIC_PLAN_JSON],
        "axes": list(AXES),
        "eviction": EVICTION,
        "planned": PLANNED,
        "stock_setting": STOCK_SETTING,
        "sinks": DEFAULT_WINDOW.sinks,
        "recent": DEFAULT_WINDOW.recent,
    }


def _policy(name: str) -> dict[str, Any]:
    """The options of a policy, and the allocator that it has when no other is named."""
    made = make_policy(name, "50%", {})
    return {
        "allocator": policy_to_dict(made)["allocator"]["name"],
        "allocator_without_budget": _allocator_without_budget(name),
        "options": fields_described(type(made), leave_out=("budget",)),
    }


def _allocator_without_budget(policy: str) -> str | None:
    """The allocator that a policy has when no budget is given, or None if it needs one."""
    try:
        return policy_to_dict(make_policy(policy, None, {}))["allocator"]["name"]
    except LowkeyError:
        return None


def text() -> str:
    """The file: an option on a line, so that two changes of different options can be merged."""
    found = {key: _lines(value) for key, value in collected().items()}
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {value}" for key, value in found.items()) + "\n}\n"


def _lines(value: Any, depth: int = 1) -> str:
    """JSON in which tables of tables take a line for each entry."""
    if not (isinstance(value, dict) and any(isinstance(x, dict) for x in value.values())):
        return json.dumps(value)
    space = " " * depth
    inside = (f"{space}{json.dumps(key)}: {_lines(x, depth + 1)}" for key, x in value.items())
    return "{\n" + ",\n".join(inside) + "\n" + " " * (depth - 1) + "}"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
