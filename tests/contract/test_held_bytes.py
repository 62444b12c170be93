"""The bytes that a cache reports are those it keeps alive, found by following references."""

from __future__ import annotations

import copy
from functools import partial

import pico
import pytest
import reach
import torch
import variants
from cache_kinds import CASES, KINDS, REREAD, agree, can_be_saved, feed
from pico import attached, prompt

import lowkey
from lowkey import load_cache, make_cache
from lowkey.policies import POLICIES

LENGTH = 60


class Interrupt(BaseException):
    """Like Ctrl-C: no `Exception`."""


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


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_reported_bytes_are_those_kept_alive(kind, name, tmp_path):
    model = attached(name)
    cache = KINDS[kind](model)
    assert agree(cache, "fresh") == 0
    fill(model, cache)
    agree(cache, "after the prompt")
    for _ in range(20):
        feed(model, cache, prompt(1, batch=1))
    agree(cache, "after steps")
    if can_be_saved(cache):
        cache.save(tmp_path / "cache")
        assert agree(load_cache(tmp_path / "cache", model), "loaded") == cache.nbytes()
    twin = copy.deepcopy(cache)
    assert agree(twin, "copied") == cache.nbytes()
    assert not set(reach.storages(twin, reach.MAPS)) & set(reach.storages(cache, reach.MAPS))
    if kind not in REREAD:  # they want another call for a second turn
        feed(model, cache, prompt(7, batch=1, seed=1))
    agree(cache, "after a second turn")
    assert (
        agree(twin, "the copy, when the other went on") == cache.nbytes()
        or cache.get_seq_length() != twin.get_seq_length()
    )
    cache.reset()
    assert agree(cache, "reset") == 0


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_bytes_are_right_during_and_after_an_interrupt(kind, name):
    """Between layers, where a cache cannot know of it before it is asked: until then what it keeps alive is
    in the count.
    """
    model = attached(name)
    cache = KINDS[kind](model)
    if kind not in REREAD:
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
def test_bytes_of_our_own_attention_in_a_stock_cache(name):
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
