"""Kinds of storage that the contract of caches is tested over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pico
from pico import lowrank

from lowkey.models import families
from lowkey.storage.exact import Exact

PADS = [7, 0]
EXACTS = {
    "plain": Exact(),
    "sinks": Exact(sinks=3),
    "recent": Exact(recent=5),
    "both": Exact(sinks=4, recent=6),
    "prefill-exact": Exact(sinks=4, recent=6, prefill="exact"),
}


@dataclass(frozen=True)
class Kind:
    """A lossy cache; calling it builds one. tolerance: integers may round the other way after a sum in
    another order.
    """

    build: Callable
    tolerance: float = 1e-5

    def __call__(self, model):
        return self.build(model)


def merged(model, rank_k, rank_v):
    """Pairs of heads share a latent of keys, all heads one of values; in some order, and centred."""
    h = families.geometry(model).kv_heads
    return {
        i: pico.merged_factors(h, rank_k, rank_v, 2, h, seed=i) for i in families.geometry(model).compressible
    }


KINDS = {
    "post": Kind(lambda m: lowrank(m, pico.layer_factors(m, 6, 9), "post_rope")),
    "pre": Kind(lambda m: lowrank(m, pico.layer_factors(m, 6, 9, shared=True), "pre_rope")),
    "post-exact": Kind(
        lambda m: lowrank(m, pico.layer_factors(m, 6, 9, shared=True), "post_rope", Exact(3, 5))
    ),
    "pre-exact": Kind(lambda m: lowrank(m, pico.layer_factors(m, 6, 9), "pre_rope", Exact(3, 5))),
    "merged": Kind(lambda m: lowrank(m, merged(m, 6, 9), "post_rope", Exact(3, 5))),
    "merged-pre": Kind(lambda m: lowrank(m, merged(m, 6, 9), "pre_rope")),
    "8-bit": Kind(lambda m: pico.quantized(m, 8), 1e-3),
    "4-bit": Kind(lambda m: pico.quantized(m, 4), 1e-2),
}


def full(model, layout="post_rope", exact=None):
    """A low-rank cache of full rank."""
    return lowrank(model, pico.layer_factors(model), layout, exact)


def close(a, b, tolerance=1e-5):
    """Assert that two tensors agree, relative to the largest value."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))
