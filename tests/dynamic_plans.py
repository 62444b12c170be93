"""Dynamic plans with random gates: every token is stored at a rank of its own."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pico
import torch
from pico import HEAD_DIM, attached

from lowkey.core import files
from lowkey.models import families
from lowkey.plan.plan import Plan
from lowkey.plan.token_ranks import TokenRanks
from lowkey.storage.bucketed import Gate

LEVELS = (16, 8, 4, 2)
WIDTH = 6  # of the gates' hidden layer
LENGTH = 24


def random_gate(heads: int, seed: int, level: int | None = None) -> Gate:
    """One that gives tokens all kinds of levels, or always the same."""
    draw = torch.Generator().manual_seed(seed)
    width = 2 * heads * HEAD_DIM
    out, bias = torch.randn(WIDTH, len(LEVELS), generator=draw), torch.zeros(len(LEVELS))
    if level is not None:
        out, bias = 0 * out, torch.eye(len(LEVELS))[level]
    scale = torch.rand(2 * heads, HEAD_DIM, generator=draw) + 0.5
    return Gate(
        scale,
        torch.randn(width, WIDTH, generator=draw) * width**-0.5,
        torch.randn(WIDTH, generator=draw),
        out,
        bias,
    )


@cache
def make_plan(name: str, layout: str, level: int | None = None, shared: bool = False) -> Plan:
    """A dynamic plan of random maps and gates; `level` makes all gates choose one level."""
    model = attached(name)
    shape = families.geometry(model)
    gates = {i: random_gate(shape.kv_heads, i, level) for i in shape.compressible}
    return pico.plan(
        model,
        layout=layout,
        factors=pico.layer_factors(model, shared=shared),
        method={"name": "dynakv", "parameters": {}},
        allocator={"name": "none", "parameters": {}},
        token_ranks=TokenRanks(gates, LEVELS, 0.5, 0.1, {"target": 0.5}),
    )


def former_folder(folder: Path, plan: Plan) -> Path:
    """The plan as `lowkey dynamic` wrote it while such plans were folders of a kind of their own."""
    tensors = {}
    for i, gate in plan.token_ranks.gates.items():
        tensors |= {f"{i}.k_down": plan.factors[i].k_down, f"{i}.v_down": plan.factors[i].v_down}
        tensors |= {
            f"{i}.gate.scale": gate.scale,
            f"{i}.gate.hidden": gate.hidden,
            f"{i}.gate.hidden_bias": gate.hidden_bias,
            f"{i}.gate.out": gate.out,
            f"{i}.gate.out_bias": gate.out_bias,
        }
    with files.replacing_folder(folder) as temporary:
        about = {
            "format": 1,
            "method": "dynakv",
            "budget": plan.budget,
            "layout": plan.layout,
            "levels": [16, 8, 4, 2],
            "share": plan.token_ranks.share,
            "divergence": plan.token_ranks.divergence,
            "training": plan.token_ranks.training,
            "geometry": plan.geometry,
            "provenance": plan.provenance,
            "layers": [0, 1, 2],
            "bytes_per_token": {"float32": 1536.0, "bfloat16": 768.0},
            "tensors_sha256": files.write_tensors(
                temporary / "dynaplan.safetensors", tensors, "dynamic-plan"
            ),
        }
        files.write_json(temporary / "dynaplan.json", about, "dynamic-plan")
    return folder


TEXT = "the cat sat on the mat. " * 40
