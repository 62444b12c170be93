"""Every kind of cache by name, fed, and compared in its bytes with what is reachable."""

from __future__ import annotations

from functools import partial

import pico
import reach
import torch
from dynamic_plans import make_plan
from evicting_caches import HEADS

from lowkey import make_cache
from lowkey.models import families
from lowkey.models.fingerprint import model_fingerprint
from lowkey.policies import POLICIES
from lowkey.storage.exact import Exact, SinkPoints, SinkRule

BUDGET = "20 tokens"
SMALL_WINDOW = Exact(3, 5)  # which that budget holds


def rule(model):
    """A sink rule of made-up points, for layers 1 and 2."""
    points = {i: SinkPoints(torch.zeros(1, 4, pico.HEAD_DIM), torch.full((1,), 3.0)) for i in (1, 2)}
    return SinkRule(points, (0,), 1, model_fingerprint(model))


def evicting(name, **options):
    """The policy with a budget of 20 tokens, and head scores."""
    return POLICIES[name](BUDGET, **options).with_head_scores(HEADS)


def scored(model, plan, name):
    """A cache with this policy, and with made-up gates if it learns."""
    return make_cache(model, plan, evicting(name), gates=pico.gates(model, evicting(name)))


def planned(model, **fields):
    """A low-rank plan of the model, with head scores where it has four KV heads."""
    return pico.plan(model, heads=HEADS if model.config.model_type == "llama" else {}, **fields)


def merged(model, **fields):
    """Keys of two heads together and values of all four, centred, in another order."""
    maps = {i: pico.merged_factors(4, 5, 9, 2, 4, seed=i) for i in families.geometry(model).compressible}
    return planned(model, factors=maps, orthonormal=False, sinks=3, recent=5, **fields)


FED = [name for name in POLICIES if name not in ("oracle", *pico.SMALL)]
REREAD = ("kvzip", "plan-kvzip", "attention-matching")  # they want lowkey.prefill, and no second turn
KINDS = {
    "stock": lambda m: make_cache(m),
    **{f"bits-{b}": partial(lambda b, m: make_cache(m, bits=b), b) for b in (8, 2, "kivi4", "hadamard4")},
    "plan": lambda m: make_cache(m, planned(m)),
    "plan-pre": lambda m: make_cache(m, planned(m, layout="pre_rope")),
    "plan-4": lambda m: make_cache(m, planned(m), bits=4),
    "plan-kivi": lambda m: make_cache(m, planned(m), bits="kivi2"),
    "plan-exact": lambda m: make_cache(m, planned(m, sinks=3, recent=5)),
    "exact": lambda m: make_cache(m, exact=Exact(4, 8)),
    "exact-prefill": lambda m: make_cache(m, planned(m), exact=Exact(4, 8, "exact")),
    "rule": lambda m: make_cache(m, bits=8, exact=Exact(4, 8, rule=rule(m))),
    **{name: partial(lambda n, m: scored(m, None, n), name) for name in FED},
    **{
        f"plan-{n}": partial(lambda n, m: scored(m, planned(m), n), n)
        for n in FED
        if n not in ("think", "attention-matching")
    },  # it takes no plan
    # rank x heads x tokens x bits
    "snapkv-kivi2": lambda m: make_cache(m, policy=evicting("snapkv"), bits="kivi2", exact=SMALL_WINDOW),
    "plan-h2o-4": lambda m: make_cache(m, planned(m, sinks=3, recent=5), evicting("h2o"), bits=4),
    "merged-snapkv-kivi4": lambda m: make_cache(
        m, merged(m), evicting("snapkv"), bits="kivi4", exact=SMALL_WINDOW
    ),
    "merged-pre-global-8": lambda m: make_cache(
        m, merged(m, layout="pre_rope"), evicting("snapkv", allocator="global"), bits=8
    ),
    "merged-pre-kivi2": lambda m: make_cache(m, merged(m, layout="pre_rope"), bits="kivi2"),
    "every-hadamard4": lambda m: make_cache(
        m, policy=evicting("h2o", every=3), bits="hadamard4", exact=SMALL_WINDOW
    ),
    "merged-chunk-8": lambda m: make_cache(m, merged(m), evicting("chunk-mean", chunk=3), bits=8),
    "chunk-kivi2": lambda m: make_cache(
        m, policy=evicting("chunk-mean", chunk=3, every=4), bits="kivi2", exact=SMALL_WINDOW
    ),
    "razor-4": lambda m: make_cache(m, planned(m, layout="pre_rope"), evicting("razor"), bits=4),
    "every": lambda m: make_cache(m, policy=evicting("h2o", every=2)),
    "every-global": lambda m: make_cache(m, policy=evicting("snapkv", every=3, allocator="global")),
    # what is not kept is held in fewer bits
    "mixed-4": lambda m: make_cache(m, policy=evicting("zipvl", rest="int2"), bits=4, exact=SMALL_WINDOW),
    "mixed-kivi": lambda m: make_cache(
        m, policy=evicting("snapkv", rest="kivi2", allocator="ada"), bits="kivi4", exact=SMALL_WINDOW
    ),
    "mixed-merged-pre": lambda m: make_cache(
        m, merged(m, layout="pre_rope"), evicting("h2o", rest="int4"), bits=8, exact=SMALL_WINDOW
    ),
    "mixed-every": lambda m: make_cache(m, policy=evicting("h2o", every=3, rest="kivi4")),
    "every-matching": lambda m: make_cache(
        m,
        policy=evicting("attention-matching", queries="prompt", every=3, allocator="global", ridge=1.0),
    ),
    "matching": lambda m: make_cache(
        m,
        policy=evicting("attention-matching", queries="prompt", references=8, keys="pursuit"),
        exact=SMALL_WINDOW,
    ),
    "think-global": lambda m: make_cache(m, policy=evicting("think", allocator="global")),
    "dynamic": lambda m: make_cache(
        m, make_plan("gemma2" if m.config.model_type == "gemma2" else "llama", "post_rope")
    ),
    "dynamic-pre": lambda m: make_cache(
        m, make_plan("gemma2" if m.config.model_type == "gemma2" else "llama", "pre_rope")
    ),
}
SLIDING = ["stock", "bits-8", "plan", "snapkv", "every-global", "dynamic"]
CASES = [(kind, "llama") for kind in KINDS] + [(kind, "gemma2") for kind in SLIDING]


def can_be_saved(cache):
    """Not if it was put together by hand, nor if every token has a rank of its own."""
    return cache.origin is not None and not (cache.origin.plan and cache.origin.plan.token_ranks)


@torch.no_grad()
def feed(model, cache, ids):
    """Logits of `ids` over the cache."""
    return model(ids, past_key_values=cache).logits


def agree(cache, what):
    """Assert that reported, predicted and reachable bytes are equal; returns them."""
    found = reach.held(cache)
    assert (found, found) == (cache.nbytes(), cache.predicted_nbytes()), what
    return found
