"""Dynamic plans with random gates: every token is stored at a rank of its own."""

from __future__ import annotations

from functools import cache

import pico
import torch
from pico import HEAD_DIM, attached

from lowkey.calibration.dynamic import DynamicPlan
from lowkey.models import families
from lowkey.models.fingerprint import model_fingerprint
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
def make_plan(name: str, layout: str, level: int | None = None, shared: bool = False) -> DynamicPlan:
    """A dynamic plan of random maps and gates; `level` makes all gates choose one level."""
    model = attached(name)
    shape = families.geometry(model)
    gates = {i: random_gate(shape.kv_heads, i, level) for i in shape.compressible}
    geometry = {"kv_heads": shape.kv_heads, "head_dim": HEAD_DIM}
    about = {"share": 0.5, "divergence": 0.1, "training": {}, "geometry": geometry}
    factors = pico.layer_factors(model, shared=shared)
    return DynamicPlan(
        factors, gates, LEVELS, layout, **about, provenance={"model_sha256": model_fingerprint(model)}
    )


TEXT = "the cat sat on the mat. " * 40
