"""What is compared: the full cache, packed integers, plans and policies. A setting knows how to make a fresh
cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lowkey.allocation.allocators import RANK_ALLOCATORS
from lowkey.cache.cache import LowkeyCache, Origin, cache_from, make_cache
from lowkey.core.budget import Budget, too_few_tokens
from lowkey.core.options import defaults_of
from lowkey.core.row_names import told_apart
from lowkey.core.types import LowkeyError
from lowkey.methods import METHODS
from lowkey.plan.plan import Plan
from lowkey.policies import policy_to_dict
from lowkey.policies.allocators import HeadImportance
from lowkey.policies.base import Policy
from lowkey.storage.base import StoringLayer
from lowkey.storage.exact import Exact
from lowkey.storage.packing import NO_BITS, scheme, scheme_name

UNMEASURED = (
    *(
        "perplexity",
        "perplexity_95",
        "perplexity_decode",
        "kl",
        "kl_95",
        "top1_agreement",
        "layer_error",
        "layer_cosine",
        "exact_match",
    ),
    *("recall_form", "recall_evidence", "recall_kept"),
    *("questions", "questions_right", "questions_of", "questions_evidence", "questions_kept"),
    *("bytes_per_token", "bytes_held", "bytes_predicted", "bytes_full", "prefill_ms", "step_ms"),
)


@dataclass(frozen=True)
class Setting:
    """One thing that is compared, a row of the result.

    Args:
        name: name of the row, distinct from all others.
        identity: fields of the row that describe the setting.
        make: makes a fresh cache.
        evicts: whether tokens are dropped. They are chosen after a chunk was read, so one chunk by itself
            shows nothing of it.
        needs_second_pass: whether they are chosen only after a second pass over the whole context
            (`lowkey.prefill`).
        marks: what distinguishes the setting from others of the same short name, by kind (see
            `lowkey.core.row_names`).
        made_of: checksum of everything that decides what the caches hold.
        short: the name without marks.
    """

    name: str
    identity: dict
    make: Callable[[], LowkeyCache]
    evicts: bool = False
    needs_second_pass: bool = False
    marks: Mapping[str, str] = field(default_factory=dict)
    made_of: str = ""
    short: str = ""

    def row(self) -> dict:
        """The row of the result with nothing measured yet."""
        return {
            "name": self.name,
            "short": self.short,
            "marks": dict(self.marks),
            **self.identity,
            **dict.fromkeys(UNMEASURED),
        }

    def storage(self, index: int) -> StoringLayer | None:
        """A fresh storing layer of this setting.

        Args:
            index: number of the decoder layer.

        Returns:
            The layer, or None if the setting stores it as transformers does.
        """
        layer = self.make().layers[index]
        return layer if isinstance(layer, StoringLayer) else None


def row_identity(**known: object) -> dict:
    """The descriptive fields of a row, None where they do not apply."""
    names = ("method", "plan", "policy", "budget", "bits", "packing", "layout", "sinks", "recent", "task")
    return dict.fromkeys(names) | known


def full(model: PreTrainedModel) -> Setting:
    """The full cache."""
    return Setting("full", row_identity(budget="100%"), lambda: make_cache(model))


def packed(model: PreTrainedModel, bits: int | str, exact: Exact | None = None) -> Setting:
    """Keys and values as packed integers.

    Args:
        model: the model, attached.
        bits: packing scheme, by bits or by name.
        exact: tokens that are kept exact; None for the scheme's own.

    Raises:
        LowkeyError: an unknown scheme, or one that the model cannot have.
    """
    scheme(bits)  # refuses now what would be refused at the first case
    origin = Origin(weakref.ref(model), bits=bits, exact=exact)
    near = _window(model, origin)
    known = row_identity(**_packing(bits), sinks=near.sinks, recent=near.recent)
    return Setting(
        scheme_name(bits),
        known,
        lambda: cache_from(model, origin),
        marks={"window": _beside(near)},
        made_of=_hash(known),
    )


def _packing(bits: int | str | None) -> dict:
    """The fields of a row that name a packing."""
    return {} if bits is None else {"bits": scheme(bits).bits, "packing": scheme_name(bits)}


def planned(
    model: PreTrainedModel, plan: Plan, path: str, bits: int | str | None = None, exact: Exact | None = None
) -> Setting:
    """A plan.

    Args:
        model: the model, attached.
        plan: the plan; it is checked against the model once, and its caches skip that.
        path: folder of the plan.
        bits: packing of its latents; None for the plan's own.
        exact: tokens that are kept exact; None for what the plan or the scheme says.

    Raises:
        LowkeyError: the plan is of another model.
    """
    plan.check(model)
    bits = plan.bits if bits is None else None if bits == NO_BITS else bits
    origin = Origin(weakref.ref(model), plan, bits=NO_BITS if bits is None else bits, exact=exact)
    near = _window(model, origin)
    known = row_identity(
        method=plan.method["name"], plan=path, budget=plan.budget, layout=plan.layout, **_packing(bits)
    )
    known |= {"sinks": near.sinks, "recent": near.recent}
    name = f"{plan.method['name']} {plan.budget}" + ("" if bits is None else f" {scheme_name(bits)}")
    marks, made_of = {"window": _beside(near), **plan_marks(plan, path)}, _hash(known, plan.digest())
    known["profile"] = {**plan.profile, "layers": list(plan.factors)}
    return Setting(name, known, lambda: cache_from(model, origin), marks=marks, made_of=made_of)


def window_of(
    model: PreTrainedModel,
    plan: Plan | None,
    bits: int | str | None,
    sinks: int | None = None,
    recent: int | None = None,
) -> Exact | None:
    """The exact tokens of a plan or a scheme, with other numbers.

    Args:
        model: the model, attached.
        plan: the plan, or None.
        bits: packing scheme, or None.
        sinks: number of first tokens; None for the plan's own.
        recent: number of newest tokens; None for the plan's own.

    Returns:
        The exact tokens, or None if neither number is given.
    """
    if sinks is None and recent is None:
        return None
    own = _window(model, Origin(weakref.ref(model), plan, bits=bits))
    return replace(
        own, sinks=own.sinks if sinks is None else sinks, recent=own.recent if recent is None else recent
    )


def _window(model: PreTrainedModel, origin: Origin) -> Exact:
    """The tokens that a cache of this origin keeps exact."""
    kept = (getattr(layer, "exact", None) for layer in cache_from(model, origin).layers)
    return next((exact for exact in kept if exact is not None), Exact())


def _beside(exact: Exact) -> str:
    """The exact tokens in words, for a row's name."""
    return " ".join(f"+ {n} {word}" for n, word in ((exact.sinks, "sinks"), (exact.recent, "recent")) if n)


def plan_marks(plan: Plan, path: str) -> dict[str, str]:
    """What distinguishes a plan from others of its method and budget, in words."""
    named = {
        "method": METHODS.get(plan.method["name"]),
        "allocator": RANK_ALLOCATORS.get(plan.allocator["name"]),
    }
    options = {
        f"{what}.{name}": f"{name}={value}"
        for what, told in (("method", plan.method), ("allocator", plan.allocator))
        for name, value in changed(named[what], told["parameters"]).items()
    }
    seed = plan.provenance.get("seed")
    return {
        "layout": plan.layout,
        "allocator": plan.allocator["name"],
        **options,
        "seed": "" if seed is None else f"seed={seed}",
        **plan_place(path),
    }


def plan_place(path: str) -> dict[str, str]:
    """Marks of the folder that a plan is in."""
    return {"folder": Path(path).name, "path": path} if path else {}


def changed(kind: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that are not the defaults.

    Args:
        kind: the class; all parameters count if it is None.
        parameters: values by name, as JSON has them.
    """
    usual = {} if kind is None else defaults_of(kind)
    return {
        name: value
        for name, value in parameters.items()
        if name not in usual or _plain(usual[name]) != _plain(value)
    }


def _plain(value: Any) -> str:
    """A value as JSON text, in which tuples and lists are equal."""
    return json.dumps(value, sort_keys=True, default=str)


def _hash(*what: object) -> str:
    """A checksum of values."""
    return hashlib.sha256(_plain(what).encode()).hexdigest()


def evicted(
    model: PreTrainedModel,
    policy: Policy,
    name: str,
    context: int,
    plan: Plan | None = None,
    path: str | None = None,
    heads: HeadImportance | None = None,
) -> Setting:
    """A policy, by itself or over a plan.

    Args:
        model: the model, attached.
        policy: the policy.
        name: its name in `POLICIES`.
        context: tokens of a window, by which a budget in `%` is checked.
        plan: the plan, or None.
        path: folder of the plan.
        heads: head scores by kind.

    Raises:
        LowkeyError: its budget does not hold the tokens that are always kept, or head scores are missing.
    """
    budget = policy.budget and Budget.parse(policy.budget)
    tokens = (
        {"%": budget.amount / 100 * context, "tokens": budget.amount}.get(budget.unit, math.inf)
        if budget
        else math.inf
    )
    if budget and tokens < policy.sinks + policy.recent:
        raise too_few_tokens(budget, tokens, policy.sinks, policy.recent)
    if plan is not None:
        plan.check(model)
    policy = policy.with_head_scores({**(plan.heads if plan else {}), **(heads or {})})
    words = policy_to_dict(policy)
    known = row_identity(
        method=plan and plan.method["name"], plan=path, policy=words, budget=budget and str(budget)
    )
    origin = Origin(weakref.ref(model), plan, policy)
    cache_from(model, origin)  # refuses now what would be refused at the first case
    label = (f"{name} {budget}" if budget else name) + (
        f" on {plan.method['name']} {plan.budget}" if plan else ""
    )
    marks = {key: f"{key}={value}" for key, value in words["parameters"].items()} | (
        plan_marks(plan, path or "") if plan else {}
    )
    made_of = _hash(known, repr(policy), plan and plan.digest())
    return Setting(
        label, known, lambda: cache_from(model, origin), True, policy.needs_second_pass, marks, made_of
    )


def distinct(settings: Sequence[Setting]) -> list[Setting]:
    """Settings with names that distinguish them: two of `pca 50%` become `pca 50% pre_rope` and `pca 50%
    post_rope`.

    Raises:
        LowkeyError: a setting is given twice.
    """
    names, found = told_apart([s.name for s in settings], [s.marks for s in settings]), list[Setting]()
    for name, s in zip(names, settings, strict=True):
        if any(name == other.name for other in found):
            raise LowkeyError(f"setting {name!r}: is given twice; give it once")
        found.append(replace(s, name=name, short=s.name))
    return found
