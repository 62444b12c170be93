"""How many bytes a cache of a plan holds after a prompt, as a function of the prompt's length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowkey.core.budget import Budget
from lowkey.core.types import LowkeyError
from lowkey.policies import policy_from_dict
from lowkey.policies.base import Policy
from lowkey.storage.packing import scheme_or_none

if TYPE_CHECKING:  # that module imports the card, which imports this one
    from lowkey.plan.plan import Plan

INDEX = 8  # bytes of an index
POSITION, SCORE, SINK_INDEX = 4, 4, 4  # bytes


@dataclass(frozen=True)
class _Layer:
    """One compressed layer.

    Args:
        rows: of each sequence.
        stored: bytes of one stored token in all rows.
        exact: bytes of one exact token in all rows.
    """

    rows: int
    stored: float
    exact: int


def held_bytes(plan: Plan, tokens: int, itemsize: int, latents: float = 1.0) -> int:
    """The bytes that one sequence takes in the compressed layers after a prompt.

    Exact for plans without a policy, and for policies over integers with scales of their own for every token.
    Where keys are packed in blocks of tokens and a policy gives rows of different length, it is the most that
    they can take. A policy without a budget may keep everything. Where every token has a rank of its own, it
    is what tokens like the held-out ones take.

    Args:
        plan: the plan.
        tokens: length of the prompt.
        itemsize: bytes of a number in the model's dtype.
        latents: what the bytes of stored tokens are multiplied with, to ask for other ranks of the same form.
    """
    if plan.token_ranks is not None:
        # where each level begins and ends, and two indices of the sequence
        indices = len(plan.factors) * INDEX * (2 * len(plan.token_ranks.levels) + 2)
        return math.ceil(tokens * plan.bytes_per_token(itemsize) + indices)
    g, packed = plan.geometry, scheme_or_none(plan.bits)
    whole = plan.cache_bytes(itemsize, tokens)
    block = max(packed.keys.block, packed.values.block) if packed else 1
    layers = [
        _Layer(
            g["kv_heads"] // math.lcm(keys[0], values[0]),
            latents * (whole.latent_token_bytes(0, *keys) + whole.latent_token_bytes(1, *values)),
            2 * g["kv_heads"] * g["head_dim"] * itemsize,
        )
        for keys, values in plan.stored_shapes()
    ]
    lossless = packed is None and not plan.factors
    sinks, recent = plan.sinks, whole.recent_tokens
    if lossless and not plan.sinks and not plan.recent:
        recent = 0
    policy = None if plan.policy is None else policy_from_dict(plan.policy)
    if lossless and policy is None and not sinks and not recent:
        return tokens * whole.full_token_bytes  # transformers' own layers
    kept = tokens if policy is None else tokens_kept(policy, tokens)
    if kept is None:
        return _granted(policy, tokens)
    # blocks of tokens lie in rows as soon as there is a budget of tokens; see `EvictingLayer`
    unit = Budget.parse(policy.budget).unit if policy is not None and policy.budget is not None else ""
    if kept < tokens or (block > 1 and unit == "tokens"):
        return _in_rows(layers, policy, kept, min(tokens, sinks + recent), sinks, block)
    in_slots = max(0, tokens - recent) // block * block
    by_age = policy is None and (block > 1 or (recent > 0 and not lossless))
    total = 0.0
    for layer in layers:
        indices = INDEX * (3 if by_age else 2) + SINK_INDEX * sinks
        if policy is not None:
            indices += INDEX * (layer.rows + 1)
        total += in_slots * layer.stored + (tokens - in_slots + sinks) * layer.exact + indices
    return math.ceil(total)


def tokens_kept(policy: Policy, tokens: int) -> float | None:
    """How many tokens of a prompt each row keeps on average; None if the budget is in bytes."""
    if policy.budget is None:
        return tokens
    budget = Budget.parse(policy.budget)
    if budget.unit == "%":
        return budget.amount / 100 * tokens
    return min(budget.amount, tokens) if budget.unit == "tokens" else None


def _granted(policy: Policy | None, tokens: int) -> int:
    """The bytes that a policy's budget of bytes grants. Raises: LowkeyError without such a budget."""
    budget = policy and policy.budget and Budget.parse(policy.budget)
    if not budget:
        raise LowkeyError("policy: has no budget of bytes")
    return math.floor(budget.amount * (tokens if budget.unit == "bytes/token" else 1))


def _in_rows(
    layers: list[_Layer], policy: Policy | None, kept: float, window: int, sinks: int, block: int
) -> int:
    """The bytes of layers whose policy has evicted tokens."""
    score = SCORE if policy is not None and policy.stateful else 0
    rows = sum(layer.rows for layer in layers)
    # the allocator splits a whole number of entries over all rows, of which the window takes its part
    entries = max(0, round(kept * rows) - window * rows)
    total = 0.0
    for layer in layers:
        share = entries * layer.rows / rows
        entry = layer.stored / layer.rows + POSITION + score
        filled = layer.rows * (block - 1) * layer.stored / layer.rows
        indices = INDEX * (2 + layer.rows + 1) + SINK_INDEX * sinks
        exact = window * layer.exact + max(0, window - sinks) * layer.rows * score
        total += share * entry + filled + exact + indices
    return math.ceil(total)
