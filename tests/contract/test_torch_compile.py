"""Compiled models and attention (`torch.compile`) give the same logits over every kind of cache."""

from __future__ import annotations

import pytest
import torch
from cache_kinds import CASES, KINDS, agree, feed
from pico import attached, prompt, tokenizer
from reach import storages

import lowkey
from lowkey.models.attention_interface import attention


@torch.no_grad()
def logits(model, cache, steps):
    out = [model(prompt(30, batch=1), past_key_values=cache).logits]
    return torch.cat(
        out + [model(prompt(1, batch=1, seed=i), past_key_values=cache).logits for i in range(steps)], 1
    )


def test_compiled_attention_equals_eager_over_evicting_caches():
    """What a decoder layer does with a cache, by itself: a whole model takes long to compile."""
    torch._dynamo.reset()
    plain, compiled = (KINDS["every-global"](attached("llama")) for _ in range(2))
    draw = torch.Generator().manual_seed(0)

    def attend(cache, query, keys, values, layer):
        keys, values = cache.update(keys, values, layer)
        return attention(torch.nn.Identity(), query, keys, values, None, scaling=0.25)[0]

    fast = torch.compile(attend, backend="eager")
    try:
        for length in (30, 1, 1):
            for layer in range(3):
                query, keys, values = (torch.randn(1, h, length, 16, generator=draw) for h in (8, 4, 4))
                assert torch.equal(
                    fast(compiled, query, keys, values, layer), attend(plain, query, keys, values, layer)
                )
        assert agree(compiled, "compiled") == plain.nbytes()
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["stock", "bits-8", "plan-exact", "snapkv", "every-global", "razor", "dynamic"]
)
def test_a_compiled_model_gives_the_same_over_every_cache(kind):
    torch._dynamo.reset()
    model = attached("llama")
    expected = logits(model, KINDS[kind](model), 3)
    cache = KINDS[kind](model)
    try:
        assert (logits(torch.compile(model, backend="eager"), cache, 3) - expected).abs().max() < 1e-5
        agree(cache, "compiled")
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
def test_fullgraph_is_refused_with_the_reason():
    torch._dynamo.reset()
    model = attached("llama")
    try:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="leave out fullgraph"):
            logits(torch.compile(model, backend="eager", fullgraph=True), KINDS["snapkv"](model), 1)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_no_cache_keeps_a_tensor_that_it_was_given(kind, family):
    """In mode `reduce-overhead` these are memory of a CUDA graph, which its next replay overwrites."""
    model = attached(family)
    cache, given = KINDS[kind](model), []
    update = cache.update

    def noted(keys, values, *args, **kwargs):
        given.extend((keys, values))
        return update(keys, values, *args, **kwargs)

    cache.update = noted
    policy = cache.origin.policy_in_use if cache.origin else None
    for length in (40, 1, 1, 1, 5, 1):
        ids = prompt(length, batch=1)
        if policy is not None and policy.needs_second_pass and not cache.get_seq_length():
            lowkey.prefill(model, tokenizer(), cache, ids)
        else:
            feed(model, cache, ids)
        assert given
        held = storages(list(cache.layers))
        assert not set(held) & {x.untyped_storage().data_ptr() for x in given}, length


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stock", "bits-8", "plan-exact", "snapkv"])
def test_reduced_overhead_gives_the_same(kind):
    torch._dynamo.reset()
    model = attached("llama")
    expected = logits(model, KINDS[kind](model), 5)
    cache = KINDS[kind](model)
    try:
        found = logits(torch.compile(model, mode="reduce-overhead"), cache, 5)
        assert (found - expected).abs().max() < 1e-4
        agree(cache, "compiled")
    finally:
        torch._dynamo.reset()
