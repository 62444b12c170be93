"""What is compared: the full cache, packed integers, plans and policies. A setting knows how to make a fresh
cache.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lowkey.allocation.allocators import RANK_ALLOCATORS
from lowkey.cache.cache import LowkeyCache, Origin, cache_from, make_cache
from lowkey.cache.refusals import check_gates_model
from lowkey.core.budget import Budget, too_few_tokens
from lowkey.core.options import defaults_of
from lowkey.core.row_names import distinct_row_names
from lowkey.core.types import LowkeyError
from lowkey.methods import METHODS
from lowkey.models.fingerprint import model_fingerprint
from lowkey.plan.plan import Plan
from lowkey.policies import policy_to_dict
from lowkey.policies.base import Policy
from lowkey.policies.gates import Gates
from lowkey.policies.sharing import HeadImportance
from lowkey.storage.base import StoringLayer
from lowkey.storage.exact import Exact
from lowkey.storage.packing import NO_BITS, scheme, scheme_name

# Fields of a row that tasks fill in; the row of a new setting has None in each.
# fmt: off
UNMEASURED = (
    "perplexity", "perplexity_95", "perplexity_decode", "kl", "kl_95", "kl_decode", "kl_decode_95",
    "top1_agreement",
    "layer_error", "layer_cosine",
    "exact_match", "recall_form", "recall_evidence", "recall_kept",
    "questions", "questions_right", "questions_of", "questions_evidence", "questions_kept",
    "behaviour", "behaviour_ceiling", "behaviour_kinds", "behaviour_same", "behaviour_evidence",
    "behaviour_kept",
    "bytes_per_token", "bytes_held", "bytes_predicted", "bytes_full",
    "prefill_ms", "step_ms",
)
# fmt: on


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
        sees_answer: whether it has to be shown the right answer.
        marks: what distinguishes the setting from others of the same short name, by kind (see
            `lowkey.core.row_names`).
        made_of: checksum of everything that decides what the caches hold.
        short: the name without marks.
        small: the small model that reads along, or None.
    """

    name: str
    identity: dict
    make: Callable[[], LowkeyCache]
    evicts: bool = False
    needs_second_pass: bool = False
    sees_answer: bool = False
    marks: Mapping[str, str] = field(default_factory=dict)
    made_of: str = ""
    short: str = ""
    small: PreTrainedModel | None = None

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
    scheme(bits)  # refuses an unknown scheme now, and not when the first cache is made
    origin = Origin(weakref.ref(model), bits=bits, exact=exact)
    exact = _exact_tokens(model, origin)
    identity = row_identity(**_packing(bits), sinks=exact.sinks, recent=exact.recent)
    return Setting(
        scheme_name(bits),
        identity,
        lambda: cache_from(model, origin),
        marks={"window": _exact_words(exact)},
        made_of=_hash(identity),
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
    if bits is None:
        bits = plan.bits
    elif bits == NO_BITS:
        bits = None
    origin = Origin(weakref.ref(model), plan, bits=NO_BITS if bits is None else bits, exact=exact)
    exact = _exact_tokens(model, origin)
    kept = plan.budget if plan.factors or plan.policy is None else plan.policy["budget"]
    identity = row_identity(
        method=plan.method["name"] if plan.factors else None,
        plan=path,
        budget=kept,
        layout=plan.layout,
        sinks=exact.sinks,
        recent=exact.recent,
        policy=plan.policy,
        **_packing(bits),
    )
    policy = origin.policy_in_use
    name = _plan_name(plan, bits)
    marks = {"window": _exact_words(exact), **plan_marks(plan, path)}
    made_of = _hash(identity, plan.digest())
    # The profile is shown in reports and changes no number, so it is no part of the checksum.
    shown = {name: part for name, part in plan.profile.items() if name != "frontier"}
    identity["profile"] = {**shown, "layers": list(plan.factors)}
    return Setting(
        name,
        identity,
        lambda: cache_from(model, origin),
        evicts=policy is not None,
        needs_second_pass=policy is not None and policy.needs_second_pass,
        marks=marks,
        made_of=made_of,
    )


def _plan_name(plan: Plan, bits: int | str | None) -> str:
    """The parts of a plan that are in use, in words, like `fisher-svd 25% snapkv 50% kivi4`."""
    parts = [f"{plan.method['name']} {plan.budget}"] if plan.factors else []
    if plan.policy is not None:
        parts.append(f"{plan.policy['name']} {plan.policy['budget'] or ''}".strip())
    if bits is not None:
        parts.append(scheme_name(bits))
    return " ".join(parts) or "uncompressed"


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
    own = _exact_tokens(model, Origin(weakref.ref(model), plan, bits=bits))
    return replace(
        own, sinks=own.sinks if sinks is None else sinks, recent=own.recent if recent is None else recent
    )


def _exact_tokens(model: PreTrainedModel, origin: Origin) -> Exact:
    """The tokens that a cache of this origin keeps exact."""
    # A cache of this origin is made and asked, since plan, scheme and layers each have a say.
    kept = (getattr(layer, "exact", None) for layer in cache_from(model, origin).layers)
    return next((exact for exact in kept if exact is not None), Exact())


def _exact_words(exact: Exact) -> str:
    """The exact tokens in words, for a row's name."""
    return " ".join(f"+ {n} {word}" for n, word in ((exact.sinks, "sinks"), (exact.recent, "recent")) if n)


def plan_marks(plan: Plan, path: str) -> dict[str, str]:
    """What distinguishes a plan from others of its method and budget, in words."""
    method, allocator = plan.method["name"], plan.allocator["name"]
    options = {}
    for part, kind, parameters in (
        ("method", METHODS.get(method), plan.method["parameters"]),
        ("allocator", RANK_ALLOCATORS.get(allocator), plan.allocator["parameters"]),
    ):
        for name, value in changed(kind, parameters).items():
            options[f"{part}.{name}"] = f"{name}={value}"
    seed = plan.provenance.get("seed")
    return {
        "layout": plan.layout,
        "allocator": allocator,
        **options,
        "seed": "" if seed is None else f"seed={seed}",
        **({"folder": Path(path).name, "path": path} if path else {}),
    }


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
    context: int | None,
    plan: Plan | None = None,
    path: str | None = None,
    heads: HeadImportance | None = None,
    gates: Mapping[str, Gates] | None = None,
    small: PreTrainedModel | None = None,
) -> Setting:
    """A policy, by itself or over a plan.

    Args:
        model: the model, attached.
        policy: the policy.
        name: its name in `POLICIES`.
        context: tokens of a window, by which a budget in `%` is checked; None where contexts differ.
        plan: the plan, or None.
        path: folder of the plan.
        heads: head scores by kind.
        gates: what policies have learnt of the model, by what they call it (`Policy.learns`).
        small: a small model, for a policy that has one read along.

    Raises:
        LowkeyError: its budget does not hold the tokens that are always kept, head scores or gates are
            missing, or gates are another model's.
    """
    budget = policy.budget and Budget.parse(policy.budget)
    # A budget in tokens was checked when the policy was made; one in bytes is checked by the cache.
    if context is not None and budget and budget.unit == "%" and not policy.protect_prompt:
        tokens = budget.amount / 100 * context
        if tokens < policy.sinks + policy.recent:
            raise too_few_tokens(budget, tokens, policy.sinks, policy.recent)
    if plan is not None:
        plan.check(model)
    policy = policy.with_head_scores({**(plan.heads if plan else {}), **(heads or {})})
    written = policy_to_dict(policy)
    identity = row_identity(
        method=plan and plan.method["name"], plan=path, policy=written, budget=budget and str(budget)
    )
    learnt = (gates or {}).get(policy.learns)
    if learnt is not None:
        check_gates_model(model, learnt)
    beside = small if policy.reads_along else None
    origin = Origin(
        weakref.ref(model), plan, policy, gates=learnt, small=None if beside is None else weakref.ref(beside)
    )
    cache_from(model, origin)  # refuses what does not go together now, and not when the first case is read
    label = f"{name} {budget}" if budget else name
    marks = {key: f"{key}={value}" for key, value in written["parameters"].items()}
    if plan:
        label += f" on {_plan_name(replace(plan, policy=None), plan.bits)}"
        marks |= plan_marks(plan, path or "")
    return Setting(
        label,
        identity,
        lambda: cache_from(model, origin),
        evicts=True,
        needs_second_pass=policy.needs_second_pass,
        sees_answer=policy.sees_answer,
        marks=marks,
        made_of=_hash(
            identity,
            repr(policy),
            plan and plan.digest(),
            learnt and learnt.describe(),
            None if beside is None else model_fingerprint(beside),
        ),
        small=beside,
    )


def distinct(settings: Sequence[Setting]) -> list[Setting]:
    """Settings with names that distinguish them: two of `pca 50%` become `pca 50% pre_rope` and `pca 50%
    post_rope`.

    Raises:
        LowkeyError: a setting is given twice.
    """
    names = distinct_row_names([s.name for s in settings], [s.marks for s in settings])
    renamed: list[Setting] = []
    for name, setting in zip(names, settings, strict=True):
        if any(name == other.name for other in renamed):
            raise LowkeyError(f"setting {name!r}: is given twice; give it once")
        renamed.append(replace(setting, name=name, short=setting.name))
    return renamed
