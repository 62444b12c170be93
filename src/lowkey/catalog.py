"""Methods, rank allocators and policies by name, with their options as text: what the command line and the
benchmarks choose from.

A name is a key of METHODS, RANK_ALLOCATORS or POLICIES, or `package.module:Class` for a class of the user's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any

from lowkey.allocation.allocators import RANK_ALLOCATORS
from lowkey.allocation.base import REQUIRED_ATTRIBUTES, RankAllocator
from lowkey.core import options
from lowkey.core.errors import first_line
from lowkey.core.types import Budget, LowkeyError
from lowkey.methods import METHODS, Method
from lowkey.policies import POLICIES
from lowkey.policies.base import Policy

# What a method class of the user's own must have.
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


def make_method(name: str, given: Mapping[str, str]) -> Method:
    """A method by its name in METHODS or as `package.module:Class`, with options given as text."""
    kind: Any = METHODS.get(name) or _outside("method", name, METHODS, METHOD_PARTS)
    return _made(f"method {name!r}", kind, given)


def make_allocator(name: str, given: Mapping[str, str]) -> RankAllocator:
    """An allocator of ranks by its name in RANK_ALLOCATORS or as `package.module:Class`, with options given as
    text.
    """
    kind: Any = RANK_ALLOCATORS.get(name) or _outside("allocator", name, RANK_ALLOCATORS, REQUIRED_ATTRIBUTES)
    return _made(f"allocator {name!r}", kind, given)


def make_policy(
    name: str, budget: str | Budget | None, given: Mapping[str, str], split: Mapping[str, str] | None = None
) -> Policy:
    """A policy by its name in POLICIES or as `package.module:Class`, with options given as text: of it or,
    where it has none of that name, of its allocator. split: options of the allocator alone."""
    make: Any = POLICIES.get(name) or _outside("policy", name, POLICIES, ("score", "summary", "paper"))
    what, kind = f"policy {name!r}", getattr(make, "func", make)
    own = [f.name for f in fields(kind) if f.name != "budget"]
    chosen = {
        key: text if key == "allocator" else options.read_option(kind, key, text, what)
        for key, text in given.items()
        if key in own
    }
    policy = make(budget, **chosen)
    allocator = policy.resolved_allocator()
    of, parts = f"the allocator of {what}", [f.name for f in fields(allocator)]
    _check_options(what, given, [*own, *parts])
    _check_options(of, split or {}, parts)
    rest = {key: text for key, text in given.items() if key not in own} | dict(split or {})
    values = {
        key: options.read_option(type(allocator), key, text, of if key in (split or {}) else what)
        for key, text in rest.items()
    }
    return replace(policy, allocator=replace(allocator, **values)) if values else policy


def _made(what: str, kind: Any, given: Mapping[str, str]) -> Any:
    _check_options(what, given, [f.name for f in fields(kind)])
    made = kind(**{key: options.read_option(kind, key, text, what) for key, text in given.items()})
    options.check_options(made)  # a class from outside need not do so itself
    return made


def _check_options(what: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise LowkeyError(
                f"option {name!r} of {what} is unknown; it has {', '.join(known) or 'none'}{hint}"
            )


def _outside(what: str, name: str, table: Mapping[str, Any], needed: Sequence[str]) -> Any:
    if ":" not in name:
        near = get_close_matches(name, table, 1)
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else f"choose one of {', '.join(table)} or package.module:Class"
        )
        raise LowkeyError(f"{what} {name!r} is unknown; {hint}")
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs the user's file, which may raise anything
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise LowkeyError(
            f"{what} {name!r} cannot be imported ({problem}); give package.module:Class"
        ) from error
    if not (isinstance(kind, type) and is_dataclass(kind) and all(hasattr(kind, part) for part in needed)):
        raise LowkeyError(f"{what} {name!r} is no {what}; give a dataclass with {', '.join(needed)}")
    return kind
