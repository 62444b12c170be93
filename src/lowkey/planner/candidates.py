"""Combinations of rank, bits and tokens that hold the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from transformers import PreTrainedModel

from lowkey.core.types import Budget, LowkeyError
from lowkey.models import families
from lowkey.models.fingerprint import model_fingerprint
from lowkey.plan.held_bytes import held_bytes
from lowkey.plan.plan import NO_METHOD, Plan, versions
from lowkey.policies import POLICIES, policy_to_dict
from lowkey.policies.base import Policy
from lowkey.storage.exact import DEFAULT_WINDOW, Exact
from lowkey.storage.packing import NO_BITS, SCHEMES, scheme_or_none

EVICTION = "tokens"  # the axis on which tokens are dropped
AXES = ("rank", "bits", EVICTION)
CLOSE = 0.02  # a candidate may hold so much less than the budget, as a share of it
CORRECTIONS = 3  # of corrections of a rank budget, whose ranks are whole numbers


@dataclass(frozen=True)
class Candidate:
    """A combination of the axes.

    Args:
        bits: a name of `SCHEMES`, or `none`.
        tokens: share of the tokens that is kept.
        low_rank: whether ranks are lowered as far as the budget asks.
        recent: last tokens that are held exactly, where something is rounded or of low rank.
    """

    bits: str
    tokens: float
    low_rank: bool
    recent: int = DEFAULT_WINDOW.recent

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes on which it is smaller than the full cache."""
        used = (self.low_rank, self.bits != NO_BITS, self.tokens < 1)
        return tuple(axis for axis, is_used in zip(AXES, used, strict=True) if is_used)


@dataclass(frozen=True)
class Composer:
    """Makes plans of candidates.

    Args:
        model: the model.
        fit: makes a low-rank plan in a packing, with so many recent tokens exact, within a budget of bytes
            for a cache of `tokens` tokens.
        policy: makes the eviction policy that keeps a share of the tokens.
        tokens: length of the sequence that bytes are counted for.
        sinks: first tokens that are held exactly.
    """

    model: PreTrainedModel
    fit: Callable[[Budget, str, int], Plan]
    policy: Callable[[float], Policy]
    tokens: int
    sinks: int = DEFAULT_WINDOW.sinks

    @cached_property
    def fingerprint(self) -> str:
        """The model's fingerprint. It reads all weights, and a search makes a hundred plans."""
        return model_fingerprint(self.model)

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the model's dtype."""
        return self.model.dtype.itemsize

    @property
    def full_bytes(self) -> int:
        """Bytes of the full cache of one sequence, in the layers that can be compressed."""
        return families.geometry(self.model).full_bytes_per_token(self.itemsize) * self.tokens

    def held(self, plan: Plan) -> int:
        """Bytes that one sequence takes under a plan."""
        return held_bytes(plan, self.tokens, self.itemsize)

    def budget_text(self, budget: float) -> str:
        """A budget of bytes as a share of the full cache, as plans say it."""
        return f"{100 * budget / self.full_bytes:.4g}%"

    def without_ranks(self, bits: str, tokens: float, recent: int = DEFAULT_WINDOW.recent) -> Plan:
        """The plan of full rank in a packing that keeps a share of the tokens."""
        made_for = {"model": self.model.config._name_or_path, "model_sha256": self.fingerprint}
        exact = Exact(self.sinks, recent)
        return plan_without_ranks(
            families.geometry(self.model), bits, self._written(tokens), exact, **made_for
        )

    def _written(self, tokens: float) -> dict | None:
        return None if tokens >= 1 else policy_to_dict(self.policy(tokens))

    def compose(self, candidate: Candidate, budget: float) -> Plan | None:
        """The plan of a candidate within a budget of bytes; None if there is none that makes use of it.

        Args:
            candidate: the combination.
            budget: bytes of one sequence in the layers that can be compressed.
        """
        whole = self.without_ranks(candidate.bits, candidate.tokens, candidate.recent)
        if not candidate.low_rank:
            return whole if self.held(whole) <= budget else None
        if self.held(whole) <= budget:
            return None  # every rank fits: that is the candidate without `low_rank`
        return self._with_ranks(candidate, budget)

    def _with_ranks(self, candidate: Candidate, budget: float) -> Plan | None:
        """A low-rank plan whose ranks fill what the other axes leave of the budget."""
        policy, asked, best = self._written(candidate.tokens), budget, None
        for _ in range(CORRECTIONS):
            try:
                fitted = self.fit(Budget(asked, "bytes"), candidate.bits, candidate.recent)
            except LowkeyError:
                return best
            plan = replace(fitted, policy=policy, budget=self.budget_text(budget))
            dense = replace(fitted, policy=None)
            held = self.held(plan)
            if held <= budget and (best is None or held > self.held(best)):
                best = plan
            # bytes are linear in the bytes of latents, with a policy and without
            fixed, fixed_dense = (held_bytes(p, self.tokens, self.itemsize, 0.0) for p in (plan, dense))
            if held <= fixed or budget <= fixed:
                return best
            scale = (budget - fixed) / (held - fixed)
            wanted = fixed_dense + scale * (self.held(dense) - fixed_dense)
            if best is not None and self.held(best) >= budget * (1 - CLOSE):
                return best
            asked = min(
                wanted if best is None or held > budget else wanted * (1 + CLOSE / 4), self.full_bytes
            )
        return best


def plan_without_ranks(
    shape: families.Geometry, bits: str, policy: dict | None, exact: Exact, **made_for: str
) -> Plan:
    """The plan of full rank.

    Args:
        shape: of the model.
        bits: a name of `SCHEMES`, or `none`.
        policy: which tokens are kept, as a plan has it; None for all.
        exact: the tokens that are held exactly where something is rounded.
        made_for: the name and the fingerprint of the model, as a plan's provenance has them.
    """
    packed = scheme_or_none(bits)
    return Plan(
        factors={},
        layout="post_rope",
        method=NO_METHOD,
        allocator=NO_METHOD,
        budget="100%",
        geometry=asdict(shape),
        provenance={**made_for, "versions": versions()},
        sinks=exact.sinks if packed else 0,
        recent=max(exact.recent, packed.recent) if packed else 0,
        bits=bits if packed else None,
        policy=policy,
    )


def policy_keeping(name: str) -> Callable[[float], Policy]:
    """The policy of this name, as a function of the share of the tokens that it keeps."""
    return lambda share: POLICIES[name](f"{100 * share:.4f}%")


def share_of_tokens(composer: Composer, budget: float) -> float | None:
    """The share of the tokens that fits into a budget of bytes when nothing else is compressed.

    Returns:
        The share, or None if the tokens that are always kept do not fit, or all fit.
    """
    low, high = 0.0, 1.0
    if composer.held(composer.without_ranks(NO_BITS, 1.0)) <= budget:
        return None
    for _ in range(30):
        middle = (low + high) / 2
        try:
            fits = composer.held(composer.without_ranks(NO_BITS, middle)) <= budget
        except LowkeyError:
            fits = True  # too few tokens for a policy takes few bytes
        low, high = (middle, high) if fits else (low, middle)
    try:
        composer.without_ranks(NO_BITS, low)
    except LowkeyError:
        return None
    return low if low > 0 else None


def packings_within(composer: Composer, budget: float) -> list[str]:
    """The packings that hold every token and every rank within a budget of bytes, most bits first."""
    fitting = [name for name in SCHEMES if composer.held(composer.without_ranks(name, 1.0)) <= budget]
    return sorted(fitting, key=lambda name: -SCHEMES[name]().bits)
