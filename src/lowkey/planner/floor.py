"""What a model and its caches take on a GPU, and the least time that a decode step can take there.

All of it is arithmetic on a config: nothing is built, loaded or measured. A step reads every weight that it
needs once, and the cache of every sequence once. That takes at least their bytes over the bandwidth of the
memory. The floor leaves out arithmetic, the launch of kernels, what attention does beside reading,
activations, and the traffic between several GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from lowkey.attention import layer_costs, model_bytes_per_token
from lowkey.catalog import make_policy
from lowkey.core.budget import Budget
from lowkey.core.gpus import Gpu
from lowkey.core.stored_setting import EXPANDED, StoredSetting
from lowkey.core.types import Factors, LowkeyError
from lowkey.models import families
from lowkey.models.parameters import Parameters, count_parameters
from lowkey.plan.held_bytes import held_bytes
from lowkey.plan.plan import Plan
from lowkey.planner.candidates import plan_without_ranks
from lowkey.policies import PLANNED, policy_from_dict, policy_to_dict
from lowkey.policies.base import Policy
from lowkey.storage.budgets import check_window
from lowkey.storage.exact import DEFAULT_WINDOW, Exact
from lowkey.storage.packing import NO_BITS, scheme_or_none

IN_BYTES = ("bytes", "bytes/token")  # units of a budget that counts the whole cache


@dataclass(frozen=True)
class Workload:
    """A model that decodes several sequences at once.

    Args:
        config: of the model.
        dtype: of its weights and of its cache.
        context: tokens of every sequence.
        batch: number of sequences.
        weight_bits: bits of a weight, if they are not those of the dtype.
    """

    config: PreTrainedConfig
    dtype: torch.dtype
    context: int
    batch: int = 1
    weight_bits: float | None = None

    def __post_init__(self) -> None:
        longest = families.configured_positions(self.config)
        if longest is not None and self.context > longest:
            raise LowkeyError(
                f"context {self.context}: the model has {longest} positions; give at most that, or a config "
                "with scaled positions"
            )

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the cache."""
        return self.dtype.itemsize

    @property
    def weight_bytes(self) -> float:
        """Bytes of one weight."""
        return self.itemsize if self.weight_bits is None else self.weight_bits / 8


@dataclass(frozen=True)
class HeldBytes:
    """What one setting holds.

    Args:
        setting: its name.
        sequence: bytes of the cache of one sequence after a prompt of the whole context.
        maps: bytes of low-rank maps, which are held once and read once per step.
    """

    setting: str
    sequence: int
    maps: int = 0


def floor_of(work: Workload, stored: Sequence[HeldBytes], gpu: Gpu | None = None) -> dict:
    """Count weights, caches, reads and the floor of a step.

    Args:
        work: the model, its sequences and their length.
        stored: what each setting holds; the first is what the others are compared with.
        gpu: what it runs on; None to count bytes alone.

    Returns:
        What `lowkey cost --json` prints, without the name of the model.
    """
    parameters = count_parameters(work.config)
    weights = math.ceil(parameters.total * work.weight_bytes)
    return {
        "format": 1,
        "dtype": str(work.dtype).removeprefix("torch."),
        "weight_bits": 8 * work.weight_bytes,
        "context": work.context,
        "batch": work.batch,
        "gpu": gpu and {"name": gpu.name, "count": gpu.count, "memory_bytes": gpu.nbytes, "gbs": gpu.gbs},
        "parameters": parameters.total,
        "weights_bytes": weights,
        "weights_read_bytes": round(parameters.read(work.batch) * work.weight_bytes),
        "rows": [_row(work, each, stored[0], parameters, weights, gpu) for each in stored],
    }


def _row(
    work: Workload, each: HeldBytes, first: HeldBytes, parameters: Parameters, weights: int, gpu: Gpu | None
) -> dict:
    """The row of one setting."""
    cache = work.batch * each.sequence
    read = parameters.read(work.batch) * work.weight_bytes + each.maps + cache
    seconds = gpu and gpu.seconds(read)
    left = None if gpu is None else gpu.nbytes - weights - each.maps
    return {
        "setting": each.setting,
        "sequence_bytes": each.sequence,
        "cache_bytes": cache,
        "share_of_first": each.sequence / first.sequence if first.sequence else None,
        "maps_bytes": each.maps,
        "read_bytes": round(read),
        "step_ms": seconds and 1e3 * seconds,
        "tokens_per_second": seconds and work.batch / seconds,
        "sequences_that_fit": None if left is None else max(0, left // max(1, each.sequence)),
    }


def usual_settings(config: PreTrainedConfig) -> str:
    """What is compared if nothing is asked for, as text."""
    if families.stores_latents(config):
        return f"full,{EXPANDED}"
    if families.stores_own_form(config) or not families.configured_shapes(config).compressible:
        return "full"
    return f"full,int8,int4,kivi2,rank:50%,rank:50%+kivi4,{PLANNED}:10%"


def stored_bytes(work: Workload, setting: StoredSetting, plan: Plan | None = None) -> HeldBytes:
    """What a setting holds.

    Args:
        work: the model, its sequences and their length.
        setting: what is stored.
        plan: what the setting's folder holds, if it names one.

    Raises:
        LowkeyError: for a setting that the model or the policy does not allow, or a plan of another shape.
    """
    if setting.text == EXPANDED:
        return HeldBytes(EXPANDED, _expanded_bytes(work))
    if setting.is_full:
        return HeldBytes(setting.text, _full_bytes(work))
    shape = families.configured_geometry(work.config)
    if plan is not None:
        _check_shape(plan, shape, setting)
    made = _composed(setting, shape, plan)
    numbers = sum(f.static_numbers for f in made.factors.values())
    return HeldBytes(setting.text, _planned_bytes(work, made), numbers * work.itemsize)


def _full_bytes(work: Workload) -> int:
    """Bytes of one sequence in the cache of transformers."""
    config: Any = work.config.get_text_config()
    if families.stores_latents(config):
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        return work.context * config.num_hidden_layers * latent * work.itemsize
    if families.stores_own_form(config):
        return work.context * model_bytes_per_token(layer_costs(config), work.itemsize)
    rate = families.configured_shapes(config).full_bytes_per_token(work.itemsize)
    return work.context * rate + _sliding_bytes(work)


def _expanded_bytes(work: Workload) -> int:
    """Bytes of one sequence in a cache that holds the keys and values of all heads. Raises: LowkeyError."""
    config = work.config.get_text_config()
    if not families.stores_latents(config):
        raise LowkeyError(f"setting {EXPANDED!r}: is for a model that stores latents; give 'full'")
    width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return work.context * config.num_hidden_layers * config.num_attention_heads * width * work.itemsize


def _sliding_bytes(work: Workload) -> int:
    """Bytes of one sequence in the sliding layers."""
    layers = families.configured_sliding_layers(work.config)
    return sum(min(most, work.context) * numbers * work.itemsize for most, numbers in layers)


def _check_shape(plan: Plan, shape: families.Geometry, setting: StoredSetting) -> None:
    """Refuse a plan of another shape; a fingerprint needs weights. Raises: LowkeyError."""
    g = plan.geometry
    own = g["layers"], g["kv_heads"], g["head_dim"], tuple(g["compressible"])
    if own != (shape.layers, shape.kv_heads, shape.head_dim, shape.compressible):
        raise LowkeyError(
            f"setting {setting.text!r}: the plan is for {own[0]} layers of {own[1]} KV heads x {own[2]}, the "
            f"model has {shape.layers} of {shape.kv_heads} x {shape.head_dim}; give a plan of this model"
        )


def _composed(setting: StoredSetting, shape: families.Geometry, plan: Plan | None) -> Plan:
    """The plan that a setting means, as `make_cache` would understand it. Raises: LowkeyError."""
    policy = None if setting.policy is None else make_policy(setting.policy, setting.budget, {})
    written = None if policy is None else policy_to_dict(policy)
    if plan is None:
        made = plan_without_ranks(shape, setting.bits or NO_BITS, written, DEFAULT_WINDOW)
        if setting.rank is not None:
            packed = scheme_or_none(made.bits)
            recent = max(DEFAULT_WINDOW.recent, packed.recent if packed else 0)
            factors = dict.fromkeys(shape.compressible, _maps(shape, setting.rank))
            made = replace(made, factors=factors, sinks=DEFAULT_WINDOW.sinks, recent=recent)
    else:
        made = replace(plan, bits=setting.bits or plan.bits, policy=written or plan.policy)
    kept = None if made.policy is None else policy_from_dict(made.policy)
    if kept is not None:
        _check_policy(kept, made, setting)
    return made


def _maps(shape: families.Geometry, share: float) -> Factors:
    """Maps of one layer whose latents have a share of a head's width, without numbers."""
    rank = max(1, round(share * shape.head_dim))
    down = torch.empty(shape.kv_heads, shape.head_dim, rank, device="meta")
    return Factors(down, down.mT, down, down.mT)


def _check_policy(policy: Policy, plan: Plan, setting: StoredSetting) -> None:
    """Refuse a policy whose bytes cannot be counted. Raises: LowkeyError."""
    what = f"setting {setting.text!r}"
    if policy.needs_whole_keys:
        raise LowkeyError(
            f"{what}: the policy {policy.needs_whole_keys}, which is not counted here; measure it with "
            "lowkey eval"
        )
    if policy.reads_along:
        raise LowkeyError(
            f"{what}: the policy has a small model read along, whose cache is not counted here; measure it "
            "with lowkey eval"
        )
    if policy.budget is None:  # that of a plan need not have one
        raise LowkeyError(f"{what}: what the policy keeps depends on the text; measure it with lowkey eval")
    check_window(policy, Exact(plan.sinks, plan.recent))


def _planned_bytes(work: Workload, plan: Plan) -> int:
    """Bytes of one sequence under a plan, in all layers. Raises: LowkeyError for too small a budget."""
    policy = None if plan.policy is None else policy_from_dict(plan.policy)
    budget = None if policy is None or policy.budget is None else Budget.parse(policy.budget)

    def held(budget: Budget | None) -> int:
        own = plan if budget is None else replace(plan, policy={**(plan.policy or {}), "budget": str(budget)})
        return held_bytes(own, work.context, work.itemsize) + _sliding_bytes(work)

    if policy is None or budget is None or budget.unit not in IN_BYTES:
        return held(None)
    # such a budget bounds the whole cache, and the sequences of a batch share a total
    granted = budget.amount * work.context if budget.unit == "bytes/token" else budget.amount / work.batch
    always = max(policy.sinks, plan.sinks) + max(policy.recent, plan.recent)
    least = held(Budget(min(always, work.context), "tokens"))
    if granted < least:
        raise LowkeyError(
            f"budget {budget}: leaves a sequence of {work.context} tokens {math.floor(granted)} bytes, and "
            f"what is always kept takes {least}; give more"
        )
    return min(math.floor(granted), held(Budget(100, "%")))
