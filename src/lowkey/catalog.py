"""Methods, rank allocators and policies by name, with options given as text.

The command line and the benchmarks choose from here. A name is a key of METHODS, RANK_ALLOCATORS or POLICIES,
or `package.module:Class` for a class of the user's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from lowkey.allocation.allocators import RANK_ALLOCATORS
from lowkey.allocation.base import REQUIRED_ATTRIBUTES, RankAllocator
from lowkey.core import options
from lowkey.core.errors import first_line
from lowkey.core.types import Budget, LowkeyError
from lowkey.methods import METHODS, Method
from lowkey.policies import POLICIES
from lowkey.policies.base import Policy
from lowkey.policies.press import adapted

# What a class of the user's own must have.
METHOD_STAGES = ("has_fit", "fit", "has_tune", "tune", "has_finish", "finish")
METHOD_PARTS = (
    *METHOD_STAGES,
    "summary",
    "paper",
    "allocator",
    "layout",
    "grid",
    "serves_any_rank",
    "candidates",
    "numbers_per_token",
)
POLICY_PARTS = ("score", "summary", "paper")


def make_method(name: str, given: Mapping[str, str]) -> Method:
    """Make a low-rank method.

    Args:
        name: a key of METHODS or `package.module:Class`.
        given: options as text, by name.

    Raises:
        LowkeyError: for an unknown name, option or value.
    """
    kind: Any = METHODS.get(name) or _import_class("method", name, METHODS, METHOD_PARTS)
    return _made(f"method {name!r}", kind, given)


def make_allocator(name: str, given: Mapping[str, str]) -> RankAllocator:
    """Make a rank allocator.

    Args:
        name: a key of RANK_ALLOCATORS or `package.module:Class`.
        given: options as text, by name.

    Raises:
        LowkeyError: for an unknown name, option or value.
    """
    kind: Any = RANK_ALLOCATORS.get(name)
    kind = kind or _import_class("allocator", name, RANK_ALLOCATORS, REQUIRED_ATTRIBUTES)
    return _made(f"allocator {name!r}", kind, given)


def make_policy(
    name: str, budget: str | Budget | None, given: Mapping[str, str], split: Mapping[str, str] | None = None
) -> Policy:
    """Make an eviction policy.

    Args:
        name: a key of POLICIES or `package.module:Class`, a policy or a press (see `lowkey.policies.press`).
        budget: what is kept; None for the policy's own.
        given: options as text, by name. An option that the policy does not have is one of its allocator.
        split: options as text of the allocator alone.

    Raises:
        LowkeyError: for an unknown name, option or value.
    """
    make: Any = POLICIES.get(name) or _import_class("policy", name, POLICIES, POLICY_PARTS, adapted)
    # some names are a class with options of their own set by functools.partial
    kind = getattr(make, "func", make)
    what, split = f"policy {name!r}", split or {}
    own = [f.name for f in fields(kind) if f.name != "budget"]
    chosen = {
        key: text if key == "allocator" else options.read_option(kind, key, text, what)
        for key, text in given.items()
        if key in own
    }
    policy = make(budget, **chosen)
    allocator = policy.resolved_allocator()
    allocator_what, allocator_options = f"the allocator of {what}", [f.name for f in fields(allocator)]
    options.check_names(what, given, [*own, *allocator_options])
    options.check_names(allocator_what, split, allocator_options)
    rest = {key: text for key, text in given.items() if key not in own} | dict(split)
    values = {
        key: options.read_option(type(allocator), key, text, allocator_what if key in split else what)
        for key, text in rest.items()
    }
    return replace(policy, allocator=replace(allocator, **values)) if values else policy


def _made(what: str, kind: Any, given: Mapping[str, str]) -> Any:
    """Return an object of a dataclass with options given as text; `what` names it in messages."""
    options.check_names(what, given, [f.name for f in fields(kind)])
    made = kind(**{key: options.read_option(kind, key, text, what) for key, text in given.items()})
    options.check_options(made)  # a class from outside need not do so itself
    return made


def _import_class(
    what: str,
    name: str,
    table: Mapping[str, Any],
    needed: Sequence[str],
    adapt: Callable[[Any, str], Any] = lambda kind, name: kind,
) -> Any:
    """Return the dataclass that `package.module:Class` names.

    Args:
        what: `method`, `allocator` or `policy`, for messages.
        name: the name that was given.
        table: the names that are known without importing anything.
        needed: attributes that the class must have.
        adapt: makes such a class of another, given its name.

    Raises:
        LowkeyError: if the name is unknown, cannot be imported, or is something else.
    """
    if ":" not in name:
        remedy = options.nearest_name(name, table, options.OUTSIDE)
        raise LowkeyError(f"{what} {options.shown(name)} is unknown; {remedy}")
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs the user's file, which may raise anything
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise LowkeyError(
            f"{what} {name!r} cannot be imported ({problem}); give package.module:Class"
        ) from error
    kind = adapt(kind, name)
    if not (isinstance(kind, type) and is_dataclass(kind) and all(hasattr(kind, part) for part in needed)):
        raise LowkeyError(
            f"{what} {name!r} is not a suitable class; give a dataclass with {', '.join(needed)}"
        )
    return kind
