"""What a cache says it holds is what it keeps alive, found by following references, for every kind of cache
and in every state.
"""

from __future__ import annotations

import copy
from functools import partial

import pico
import pytest
import reach
import torch
import variants
from pico import attached, prompt
from test_bucketed import make_plan
from test_evicting import HEADS

import lowkey
from lowkey import load_cache, make_cache
from lowkey.calibration.dynamic import make_dynamic_cache
from lowkey.models.fingerprint import model_fingerprint
from lowkey.policies import POLICIES
from lowkey.storage.exact import Exact, SinkPoints, SinkRule

BUDGET = "20 tokens"
LENGTH = 60


def rule(model):
    points = {i: SinkPoints(torch.zeros(1, 4, pico.HEAD_DIM), torch.full((1,), 3.0)) for i in (1, 2)}
    return SinkRule(points, (0,), 1, model_fingerprint(model))


def evicting(name, **options):
    return POLICIES[name](BUDGET, **options).with_head_scores(HEADS)


def planned(model, **fields):
    return pico.plan(model, heads=HEADS if model.config.model_type == "llama" else {}, **fields)


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
    **{name: partial(lambda n, m: make_cache(m, policy=evicting(n)), name) for name in POLICIES},
    **{
        f"plan-{n}": partial(lambda n, m: make_cache(m, planned(m), evicting(n)), n)
        for n in POLICIES
        if n != "think"
    },
    "every": lambda m: make_cache(m, policy=evicting("h2o", every=2)),
    "every-global": lambda m: make_cache(m, policy=evicting("snapkv", every=3, allocator="global")),
    "think-global": lambda m: make_cache(m, policy=evicting("think", allocator="global")),
    "dynamic": lambda m: make_dynamic_cache(
        m, make_plan("gemma2" if m.config.model_type == "gemma2" else "llama", "post_rope")
    ),
    "dynamic-pre": lambda m: make_dynamic_cache(
        m, make_plan("gemma2" if m.config.model_type == "gemma2" else "llama", "pre_rope")
    ),
}
SLIDING = ["stock", "bits-8", "plan", "snapkv", "every-global", "dynamic"]
CASES = [(kind, "llama") for kind in KINDS] + [(kind, "gemma2") for kind in SLIDING]


class Interrupt(BaseException):
    """Like Ctrl-C: no `Exception`."""


@torch.no_grad()
def feed(model, cache, ids):
    return model(ids, past_key_values=cache).logits


def fill(model, cache, length=LENGTH, seed=0):
    ids = prompt(length, batch=1, seed=seed)
    if cache.origin and cache.origin.policy and cache.origin.policy.needs_second_pass:
        lowkey.prefill(model, pico.tokenizer(), cache, ids)
    else:
        feed(model, cache, ids)


def interrupted(model, cache, ids, layer=1):
    """A forward pass that ends behind the attention of this layer."""

    def stop(*_):
        raise Interrupt

    handle = model.get_decoder().layers[layer].mlp.register_forward_pre_hook(stop)
    try:
        with pytest.raises(Interrupt):
            feed(model, cache, ids)
    finally:
        handle.remove()


def agree(cache, what):
    found = reach.held(cache)
    assert (found, found) == (cache.nbytes(), cache.predicted_nbytes()), what
    return found


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_what_is_held_is_what_is_said(kind, name, tmp_path):
    model = attached(name)
    cache = KINDS[kind](model)
    assert agree(cache, "fresh") == 0
    fill(model, cache)
    agree(cache, "after the prompt")
    for _ in range(20):
        feed(model, cache, prompt(1, batch=1))
    agree(cache, "after steps")
    if cache.origin is not None:
        cache.save(tmp_path / "cache")
        assert agree(load_cache(tmp_path / "cache", model), "loaded") == cache.nbytes()
    twin = copy.deepcopy(cache)
    assert agree(twin, "copied") == cache.nbytes()
    assert not set(reach.storages(twin, reach.MAPS)) & set(reach.storages(cache, reach.MAPS))
    if kind not in ("kvzip", "plan-kvzip"):  # they want another call for a second turn
        feed(model, cache, prompt(7, batch=1, seed=1))
    agree(cache, "after a second turn")
    assert (
        agree(twin, "the copy, when the other went on") == cache.nbytes()
        or cache.get_seq_length() != twin.get_seq_length()
    )
    cache.reset()
    assert agree(cache, "reset") == 0


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_an_interrupt_is_counted_and_then_undone(kind, name):
    """Between layers, where a cache cannot know of it before it is asked: until then what it keeps alive is
    in the count.
    """
    model = attached(name)
    cache = KINDS[kind](model)
    if "kvzip" not in kind:
        interrupted(model, cache, prompt(LENGTH, batch=1))
        agree(cache, "interrupted prompt")
        assert cache.get_seq_length() == 0 and agree(cache, "undone") == 0
    fill(model, cache)
    before = cache.nbytes(), reach.held(cache)
    for length in (1, 5):
        interrupted(model, cache, prompt(length, batch=1))
        agree(cache, f"interrupted turn of {length}")
        assert [layer.get_seq_length() for layer in cache.layers] == [LENGTH] * 3
        assert (cache.nbytes(), agree(cache, "undone")) == before


@pytest.mark.parametrize("kind", ["plan", "dynamic", "rule", "bits-hadamard4", "plan-snapkv"])
def test_a_copy_shares_maps_and_holds_tokens_of_its_own(kind):
    """Also where gradients are recorded, whose tensors Python's deepcopy refuses."""
    model = attached("llama")
    cache = KINDS[kind](model)
    model(prompt(30, batch=1), past_key_values=cache)
    twin = copy.deepcopy(cache)
    assert (
        twin.nbytes() == cache.nbytes()
        and len({id(layer.forward_pass) for layer in (*twin.layers, *cache.layers)}) == 2
    )
    assert sum(reach.storages([twin, cache]).values()) == 2 * agree(cache, "copied") + reach.maps(cache)
    expected = feed(model, twin, prompt(5, batch=1))
    assert cache.get_seq_length() == 30 and torch.equal(feed(model, cache, prompt(5, batch=1)), expected)


@pytest.mark.parametrize("kind", ["plan", "plan-exact", "dynamic", "rule", "bits-hadamard4"])
def test_a_plans_maps_do_not_grow_with_the_prompt(kind):
    """What the count leaves out: maps of the plan (or gates, or sink points), once as saved and once as the
    model's dtype wants them.
    """
    model, sizes = attached("llama"), []
    for length in (1, 60):
        cache = KINDS[kind](model)
        fill(model, cache, length)
        sizes.append(reach.maps(cache))
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_our_own_attention_in_the_stock_form(name):
    """Parts of any width, empty ones too; a call that is interrupted is undone, and the next one is as if it
    had not been.
    """
    model = lowkey.attach(variants.build(name))
    cache, straight = make_cache(model), make_cache(model)
    for held in (cache, straight):
        feed(model, held, variants.ids(12))
        feed(model, held, variants.ids(1))
    agree(cache, "filled")
    interrupted(model, cache, variants.ids(3), layer=0)
    agree(cache, "interrupted")
    assert torch.equal(*(feed(model, held, variants.ids(3)) for held in (cache, straight)))
    assert agree(cache, "after a second turn") == straight.nbytes()


@pytest.mark.parametrize("kind", ["bits-8", "kivi8", "plan", "exact", "snapkv", "h2o", "think", "dynamic"])
def test_autocast_stores_keys_and_values_in_one_dtype(kind):
    """Keys that were rotated in fp32 come wider than values; SDPA casts both, and so does a cache."""
    model, stock = attached("llama"), pico.stock("llama")
    make = {
        "kivi8": lambda m: make_cache(m, bits="kivi8"),
        "plan": lambda m: make_cache(m, pico.plan(m, pico.HEAD_DIM, pico.HEAD_DIM)),
        **{
            name: partial(lambda n, m: make_cache(m, policy=POLICIES[n]("100%")), name)
            for name in ("snapkv", "h2o", "think")
        },
    }.get(kind, KINDS[kind if kind in KINDS else "plan"])
    cache, ids = make(model), prompt(LENGTH, batch=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        turns = [
            model(part, past_key_values=cache).logits for part in (ids[:, :40], ids[:, 40:41], ids[:, 41:])
        ]
        want = stock(ids).logits
    agree(cache, kind)
    if kind != "dynamic":
        assert (torch.cat(turns, 1) - want).abs().mean() < 0.1
