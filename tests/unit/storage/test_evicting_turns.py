"""Evicting caches over several turns and chunks, and while decoding."""

from __future__ import annotations

import copy

import pico
import pytest
import torch
from evicting_caches import LENGTH, PADS, evicting_cache, lengths, policy, record
from pico import attached, feed, generate, prompt

import lowkey
from lowkey.policies import SnapKV


def test_later_chunks_and_a_second_turn_are_evicted_too():
    model = attached("llama")
    cache = evicting_cache(model, SnapKV("20%", sinks=1, recent=2))
    for seed in range(3):
        feed(model, prompt(100, seed=seed), cache)
    assert sum(map(sum, lengths(cache, 0))) == round(0.2 * 300 * 12)
    assert (
        max(p.max() for p in cache.kept_positions(0)) == 299
        and min(p.min() for p in cache.kept_positions(0)) == 0
    )


@pytest.mark.parametrize("every", [8, 200])
def test_decoding_evicts_every_so_many_steps(every):
    model = attached("llama")
    cache = evicting_cache(model, SnapKV("32 tokens", sinks=1, recent=2, every=every))
    generate(model, prompt(60), 241, cache)
    wanted = 32 + 240 % every
    assert lengths(cache, 0) == [[wanted] * 4] * 3
    assert cache.nbytes() == cache.predicted_nbytes()


def test_while_decoding_the_smallest_keys_of_all_layers_stay():
    """Heads and layers of different length compete for one budget, by scores that are all negative."""
    model = attached("llama")
    cache = evicting_cache(
        model, policy("knorm", "12 tokens", allocator="global", sinks=2, recent=3, every=2)
    )
    logs = record(cache)
    held = [[set(range(40)) for _ in range(4)] for _ in logs]
    for seen in (40, 42, 44, 46):
        feed(
            model,
            prompt(seen, batch=1)[:, 0 if seen == 40 else seen - 2 :],
            cache,
            splits=[40] if seen == 40 else [1, 1],
        )
        always = {0, 1, seen - 3, seen - 2, seen - 1}
        keys = [torch.cat([entry[0] for entry in log], 2)[0] for log in logs]
        free = [
            (float(keys[i][j, p].norm()), i, j, p)
            for i, heads in enumerate(held)
            for j, tokens in enumerate(heads)
            for p in (tokens | {seen - 2, seen - 1}) - always
        ]
        held = [[set(always) for _ in range(4)] for _ in logs]
        for _, i, j, p in sorted(free)[: 12 * 12 - 12 * 5]:
            held[i][j].add(p)
        assert [[set(p.tolist()) for p in layer.kept_positions(0)] for layer in cache.evicting] == held
        assert cache.nbytes() == cache.predicted_nbytes()
    assert len({max(map(len, heads)) for heads in held}) > 1


def test_a_frozen_cache_collects_no_queries():
    """It evicts nothing that they could decide: it holds what one does that never evicts while decoding."""
    model, held = attached("llama"), []
    for every in (0, 100):
        cache = evicting_cache(model, SnapKV("32 tokens", every=every))
        feed(model, prompt(60), cache)
        cache.freeze()
        feed(model, prompt(10, seed=1), cache, splits=[1] * 10)
        held.append(cache.nbytes())
    assert held[0] == held[1]


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_queries_are_freed_after_every_eviction(name):
    """After every eviction of decoding the cache holds what it held after the first one."""
    model = attached("llama")
    cache = evicting_cache(model, policy(name, "32 tokens", every=2))
    feed(model, prompt(60), cache)
    held = cache.nbytes()
    for seed in (1, 2, 3):
        feed(model, prompt(2, seed=seed), cache, splits=[1, 1])
        assert cache.nbytes() == held


@pytest.mark.parametrize("allocator", ["uniform", "global"])
def test_two_live_caches_are_independent(allocator):
    """Fed in turns, each answers as if the other were not there."""
    model, ids, more = (
        attached("llama"),
        [prompt(60), prompt(60, seed=1)],
        [prompt(8, seed=2), prompt(8, seed=3)],
    )
    alone, together = [], [evicting_cache(model, SnapKV("25%", allocator)) for _ in range(2)]
    for a, b in zip(ids, more, strict=True):
        cache = evicting_cache(model, SnapKV("25%", allocator))
        feed(model, a, cache)
        alone.append(feed(model, b, cache, None, [1] * 8))
    for a, cache in zip(ids, together, strict=True):
        feed(model, a, cache)
    steps = [[feed(model, b[:, i : i + 1], c) for b, c in zip(more, together, strict=True)] for i in range(8)]
    for i, expected in enumerate(alone):
        assert torch.equal(torch.cat([s[i] for s in steps], 1), expected)


def test_a_copied_cache_continues_alone():
    model, ids = attached("llama"), prompt(60)
    cache = evicting_cache(model, SnapKV("25%", "ada"))
    feed(model, ids, cache)
    twin = copy.deepcopy(cache)
    more = prompt(5, seed=2)
    expected = feed(model, more, cache, None, [1] * 5)
    assert torch.equal(feed(model, more, twin, None, [1] * 5), expected)


def test_a_question_that_only_scores_is_not_stored():
    """It says what to keep; what is kept and the logits after it are those of the context."""
    model, context, question = attached("llama"), prompt(LENGTH), prompt(6, seed=1)
    cache = evicting_cache(model, SnapKV("20%", sinks=1, recent=2))
    cache.score_only(6)
    feed(model, torch.cat([context, question], 1), cache, PADS)
    assert cache.get_seq_length() == LENGTH
    assert sum(map(sum, lengths(cache, 1))) == round(0.2 * LENGTH * 12)
    assert max(int(p.max()) for p in cache.kept_positions(0, 1)) == LENGTH - 1
    cache.score_only(0)
    cache.freeze()
    feed(model, question, cache, PADS)
    assert max(int(p.max()) for p in cache.kept_positions(0, 1)) == LENGTH + 5
    assert sum(map(sum, lengths(cache, 1))) == round(0.2 * LENGTH * 12) + 6 * 12, "nothing was evicted again"


def test_what_a_question_looks_at_decides():
    model, context = attached("llama"), prompt(LENGTH)
    kept = []
    for seed in (1, 2):
        cache = evicting_cache(model, SnapKV("20%", sinks=1, recent=2, window=4))
        cache.score_only(4)
        feed(model, torch.cat([context, prompt(4, seed=seed)], 1), cache)
        kept.append(torch.cat(cache.kept_positions(1)).tolist())
    assert kept[0] != kept[1]


def test_bf16_keeps_its_dtype_and_answers():
    model = lowkey.attach(pico.build("qwen3").to(torch.bfloat16))
    cache = evicting_cache(model, SnapKV("25%", "ada"))
    out = feed(model, prompt(60), cache, None, [50, *[1] * 10])
    assert (
        out.dtype == torch.bfloat16
        and out.isfinite().all()
        and cache.evicting[0].keys.dtype == torch.bfloat16
    )
