"""Evicting caches over pico models, with head scores made up for policies that need them."""

from __future__ import annotations

import pico
from pico import attached

import lowkey
from lowkey.cache.cache import EVICTING_LAYERS, cache_of
from lowkey.catalog import make_policy
from lowkey.heads.scores import BY_KIND
from lowkey.models import families
from lowkey.storage.cache_wide_eviction import CacheWideEviction
from lowkey.storage.codec import LowRank

PADS = [7, 0]
LENGTH = 120
HEADS = {kind: [[1.0, 2.0, 0.0, 5.0]] * 3 for kind in BY_KIND}


def evicting_cache(model, policy, layout=None, ranks=(pico.HEAD_DIM, pico.HEAD_DIM)):
    """A cache that evicts by this policy; with a layout, over random low-rank maps."""
    full = families.geometry(model).compressible
    cache_eviction, maps = CacheWideEviction(len(full)), pico.layer_factors(model, *ranks) if layout else {}
    learnt = pico.gates(model, policy)

    def build(i):
        rope = families.rope(model, i)
        codec = LowRank(maps[i], layout, rope) if layout else None
        layer = EVICTING_LAYERS[policy.layer](policy, rope, full.index(i), cache_eviction, codec)
        if learnt is not None:
            layer.gates = learnt.layers[full.index(i)]
        return layer

    return cache_of(model, build)


def policy(name, budget, **options):
    """A policy by name, with head scores."""
    return make_policy(name, budget, {k: str(v) for k, v in options.items()}).with_head_scores(HEADS)


def lengths(cache, row):
    """Number of kept tokens of a row, for every layer and KV head."""
    return [[len(p) for p in layer.kept_positions(row)] for layer in cache.evicting]


def record(cache):
    """Per layer, everything `attend` is given and gives: (keys, values, call, out)."""
    logs = []
    for layer in cache.evicting:
        log, attend = [], layer.attend

        def spy(keys, values, call, log=log, attend=attend):
            out = attend(keys, values, call)
            log.append((keys, values, call, out))
            return out

        layer.attend = spy
        logs.append(log)
    return logs


def made(policy=None, **kwargs):
    """A cache of the llama model, made by `make_cache`."""
    gates = pico.gates(attached("llama"), policy) if policy is not None else None
    return lowkey.make_cache(attached("llama"), policy=policy, gates=gates, **kwargs)
