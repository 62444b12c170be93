"""What is compared: the full cache, plans, packed integers. A setting knows how to make a fresh cache."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from lowkey.cache import LowkeyCache, Origin, cache_from, make_cache
from lowkey.layers.base import StoringLayer
from lowkey.layers.exact import Exact
from lowkey.layers.packing import scheme, scheme_name
from lowkey.plan import Plan
from lowkey.policies import policy_words
from lowkey.policies.allocators import HeadImportance
from lowkey.policies.base import Policy
from lowkey.types import Budget, LowkeyError

UNMEASURED = (
    *("perplexity", "perplexity_decode", "kl", "top1_agreement", "layer_error", "layer_cosine", "exact_match"),
    *("bytes_per_token", "bytes_held", "bytes_predicted", "bytes_full", "prefill_ms", "step_ms"),
)


@dataclass(frozen=True)
class Setting:
    """name: the row's name; identity: the row's keys that describe it; make: a fresh cache; evicts: what it drops is chosen after a
    chunk was read, so a chunk by itself shows nothing of it; repeats: and only after the whole context was repeated (`lowkey.prefill`)."""

    name: str
    identity: dict
    make: Callable[[], LowkeyCache]
    evicts: bool = False
    repeats: bool = False

    def row(self) -> dict:
        """The row with nothing measured yet."""
        return {"name": self.name, **self.identity, **dict.fromkeys(UNMEASURED)}

    def storage(self, index: int) -> StoringLayer | None:
        """A fresh storage of one layer alone, or None when this setting stores it as transformers does."""
        layer = self.make().layers[index]
        return layer if isinstance(layer, StoringLayer) else None


def identity(**known: object) -> dict:
    names = ("method", "plan", "policy", "budget", "bits", "packing", "layout", "task")
    return dict.fromkeys(names) | known


def full(model: PreTrainedModel) -> Setting:
    return Setting("full", identity(budget="100%"), lambda: make_cache(model))


def packed(model: PreTrainedModel, bits: int | str, exact: Exact | None = None) -> Setting:
    """exact: tokens kept as they are beside the packed ones, in the place of the scheme's own."""
    scheme(bits)  # refuses now what would be refused at the first case
    return Setting(scheme_name(bits) + _beside(exact), identity(**_packing(bits)), lambda: make_cache(model, bits=bits, exact=exact))


def _packing(bits: int | str | None) -> dict:
    return {} if bits is None else {"bits": scheme(bits).bits, "packing": scheme_name(bits)}


def planned(model: PreTrainedModel, plan: Plan, path: str, bits: int | str | None = None, exact: Exact | None = None) -> Setting:
    """A plan, checked once; its caches skip the fingerprint. bits: its latents in packed integers. exact: tokens kept as they are, in the
    place of what the plan or the scheme says."""
    plan.check(model)
    known = identity(method=plan.method["name"], plan=path, budget=plan.budget, layout=plan.layout, **_packing(bits))
    known["profile"] = {**plan.profile, "layers": list(plan.factors)}
    origin = Origin(weakref.ref(model), plan, bits=bits, exact=exact)
    name = f"{plan.method['name']} {plan.budget}" + ("" if bits is None else f" {scheme_name(bits)}") + _beside(exact)
    return Setting(name, known, lambda: cache_from(model, origin))


def _beside(exact: Exact | None) -> str:
    return "" if exact is None else f" + {exact.recent} recent"


def evicted(
    model: PreTrainedModel,
    policy: Policy,
    name: str,
    context: int,
    plan: Plan | None = None,
    path: str | None = None,
    heads: HeadImportance | None = None,
) -> Setting:
    """A policy by itself or on top of a plan. Errors: LowkeyError when its budget does not hold what it always keeps."""
    budget = policy.budget and Budget.parse(policy.budget)
    tokens = {"%": budget.amount / 100 * context, "tokens": budget.amount}.get(budget.unit, math.inf) if budget else math.inf
    if tokens < policy.sinks + policy.recent:
        raise LowkeyError(policy.too_small(tokens))
    if plan is not None:
        plan.check(model)
    policy = policy.fitted({**(plan.heads if plan else {}), **(heads or {})})
    known = identity(method=plan and plan.method["name"], plan=path, policy=policy_words(policy), budget=budget and str(budget))
    origin = Origin(weakref.ref(model), plan, policy)
    cache_from(model, origin)  # refuses now what would be refused at the first case
    label = (f"{name} {budget}" if budget else name) + (f" on {plan.method['name']} {plan.budget}" if plan else "")
    return Setting(label, known, lambda: cache_from(model, origin), True, policy.repeats)


def distinct(settings: Sequence[Setting]) -> list[Setting]:
    """The same settings under names of their own: a second `pca 50%` becomes `pca 50% (2)`."""
    seen: Counter[str] = Counter()
    found = []
    for s in settings:
        seen[s.name] += 1
        found.append(s if seen[s.name] == 1 else replace(s, name=f"{s.name} ({seen[s.name]})"))
    return found
