"""How a plan's KV heads share rows, which are what an eviction policy chooses tokens for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lowkey.storage.cache_wide_eviction import Shapes

if TYPE_CHECKING:  # that module imports the card, which imports this one
    from lowkey.plan.plan import Plan


def rows_of_heads(plan: Plan) -> tuple[tuple[int, ...], ...] | None:
    """For each layer, the row of each KV head: heads that share a latent share it. None without low rank."""
    if not plan.factors:
        return None
    heads, rows = plan.geometry["kv_heads"], []
    for i in plan.geometry["compressible"]:
        factors = plan.factors[i]
        order = torch.arange(heads) if factors.order is None else factors.order
        rows.append(tuple((order.argsort() // math.lcm(*factors.merge)).tolist()))
    return tuple(rows)


def stored_shapes_of_layers(plan: Plan) -> tuple[Shapes, ...] | None:
    """What is stored of each layer. None without low rank, where all layers are alike."""
    if not plan.factors:
        return None
    heads, shapes = plan.geometry["kv_heads"], dict(zip(plan.factors, plan.stored_shapes(), strict=True))
    return tuple(
        ((heads // keys[0], keys[1]), (heads // values[0], values[1]))
        for keys, values in (shapes[i] for i in plan.geometry["compressible"])
    )
