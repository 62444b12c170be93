"""What can be chosen on the command line, known without importing torch.

Methods, policies, tasks and the dataclasses of settings live in modules that import torch, which takes
seconds. `data/choices.json` repeats their names, and the types, ranges and defaults of their options, so that
help and errors about arguments need no torch. `make choices` writes the file (see
`lowkey.cli.collect_choices`), and a test compares it with the classes.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from lowkey.cli.stand_ins import stand_in

COLLECTED: dict[str, Any] = json.loads(
    (files("lowkey") / "data" / "choices.json").read_text(encoding="utf-8")
)

METHODS = tuple(COLLECTED["methods"])
POLICIES = tuple(COLLECTED["policies"])
TOKEN_ALLOCATORS = tuple(COLLECTED["token_allocators"])  # of policies
SCHEMES = tuple(COLLECTED["schemes"])  # packed integers
NO_BITS: str = COLLECTED["no_bits"]  # the word for no packed integers
NO_POLICY: str = COLLECTED["no_policy"]  # the word for no policy, where a plan has one
TASKS = tuple(COLLECTED["tasks"])  # of `eval`
USUAL_TASKS = tuple(COLLECTED["usual_tasks"])
PROTOCOLS: dict[str, str] = COLLECTED["protocols"]  # name: when the question is known
ASK_AFTER: str = COLLECTED["ask_after"]
SUITES = tuple(COLLECTED["suites"])
RECALL_FORMS: dict[str, str] = COLLECTED["recall_forms"]  # name: how it asks
USUAL_RECALL_FORM: str = COLLECTED["usual_recall_form"]
HEAD_KINDS = tuple(COLLECTED["head_kinds"])  # scores of heads on needle tasks
ECHO_KINDS = tuple(COLLECTED["echo_kinds"])  # scores of heads on random tokens
CHAIN_KINDS = tuple(COLLECTED["chain_kinds"])  # scores of heads that are learnt from chains
GATES = tuple(COLLECTED["gates"])  # what policies learn of a model
NEEDLE_TASKS = tuple(COLLECTED["needle_tasks"])
ATTENTION_KINDS = tuple(COLLECTED["attention_kinds"])  # of a recipe
ATTENTIONS: dict[str, dict[str, str]] = COLLECTED["attentions"]  # kind: {field of a conversion: its type}
LAYER_SUBSETS = tuple(COLLECTED["layer_subsets"])
POOLINGS = tuple(COLLECTED["poolings"])
BASES = tuple(COLLECTED["bases"])
FREQUENCIES = tuple(COLLECTED["frequencies"])
OBJECTIVES = tuple(COLLECTED["objectives"])  # of `recover`
FORMATS = tuple(COLLECTED["formats"])  # of `export`
PLAN_FILES = tuple(COLLECTED["plan_files"])  # one of which every plan folder holds
AXES = tuple(COLLECTED["axes"])  # of `plan`
EVICTION: str = COLLECTED["eviction"]  # the axis on which tokens are dropped
PLANNED: str = COLLECTED["planned"]  # the policy that `plan` uses
STOCK_SETTING: str = COLLECTED["stock_setting"]  # the row of transformers' own cache
SINKS: int = COLLECTED["sinks"]  # tokens that are kept exact unless others are asked for
RECENT: int = COLLECTED["recent"]


@cache
def settings(name: str) -> type:
    """A stand-in for a dataclass of settings: the same fields with their types, ranges and defaults."""
    return stand_in(name, COLLECTED["settings"][name])


@cache
def method_options(name: str) -> type:
    """A stand-in for the class of a method. Its fields are its options."""
    return stand_in(name, COLLECTED["methods"][name]["options"])


def rank_allocator_of(method: str) -> str | None:
    """The name of the allocator that a method uses by default; None for a class from outside lowkey."""
    return COLLECTED["methods"][method]["allocator"] if method in METHODS else None


@cache
def policy_options(name: str) -> type:
    """A stand-in for the class of a policy. Its fields are its options, without the budget."""
    return stand_in(name, COLLECTED["policies"][name]["options"])


def allocator_of(policy: str, budget: bool) -> str | None:
    """The name of the allocator that a policy has when no other is named.

    Args:
        policy: a name of POLICIES.
        budget: whether a budget is given. Without one, the answer is None for a policy that needs one.
    """
    return COLLECTED["policies"][policy]["allocator" if budget else "allocator_without_budget"]


@cache
def allocator_options(name: str) -> type:
    """A stand-in for the class of a policy's allocator. Its fields are its options."""
    return stand_in(name, COLLECTED["token_allocators"][name])
