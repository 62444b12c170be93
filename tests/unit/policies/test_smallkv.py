"""SmallKV: which tokens a small model's attention keeps, from transformers' own attention of both models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pico import attached, prompt, stock
from policy_contexts import SMALL, build
from small_pairs import attentions, eager_small, guided, matched, read, sets_of_most

from lowkey.core.types import LowkeyError
from lowkey.policies import H2O, SmallKVTokens, SnapKV
from lowkey.policies.base import EvictionContext

LENGTH, GROUPS = 60, 2
OPTIONS = {"matched_queries": 24, "matched_share": 0.2}


def by_hand(ids, budget, window, kernel):
    """Kept positions by layer, sequence and KV head, in loops over what each head of both models looks at."""
    own, small = attentions(stock("llama"), ids), attentions(eager_small(), ids)
    others = sets_of_most(small, OPTIONS["matched_queries"], OPTIONS["matched_share"])
    heads, n, kept = torch.cat(small, 1), ids.shape[1], []
    for layer in own:
        mine = sets_of_most([layer], OPTIONS["matched_queries"], OPTIONS["matched_share"])
        kept.append([])
        for b in range(len(ids)):
            maps = [matched(one, others[b]) for one in mine[b]]
            kept[-1].append([])
            for kv in range(layer.shape[1] // GROUPS):
                group = maps[kv * GROUPS : (kv + 1) * GROUPS]
                looked = heads[b, group][:, -window or None :].sum(1).mean(0)
                score = looked.clone()
                for j in range(n - window):
                    near = range(max(0, j - kernel // 2), min(n - window, j + kernel // 2 + 1))
                    score[j] = max(float(looked[i]) for i in near)
                free = sorted(range(2, n - 3), key=lambda j: -float(score[j]))[: budget - 5]
                kept[-1][-1].append(sorted([0, 1, *free, n - 3, n - 2, n - 1]))
    return kept


def kept(cache, rows):
    """Kept positions by layer, sequence and KV head."""
    return [
        [[p.tolist() for p in cache.kept_positions(i, b)] for b in range(rows)]
        for i in range(len(cache.layers))
    ]


@pytest.mark.defines("policies", "smallkv-tokens")
@pytest.mark.parametrize(("window", "kernel"), [(0, 1), (0, 3), (6, 1), (6, 5)])
def test_the_matched_heads_of_the_small_model_choose(window, kernel):
    ids = prompt(LENGTH)
    cache = guided(budget="24 tokens", window=window, kernel=kernel, **OPTIONS)
    read(cache, ids, LENGTH)
    assert kept(cache, 2) == by_hand(ids, 24, window, kernel)


def test_tokens_of_later_steps_are_scored_too():
    """Every 4 steps; what was dropped is gone, so that the definition chooses among what is left."""
    ids = prompt(LENGTH + 8, 1)
    cache = guided(budget="24 tokens", every=4, **OPTIONS)
    read(cache, ids, [LENGTH, *[1] * 8])
    small, held = torch.cat(attentions(eager_small(), ids), 1)[0], kept(cache, 1)
    first = guided(budget="24 tokens", **OPTIONS)
    read(first, ids[:, :LENGTH], LENGTH)
    for i, layer in enumerate(kept(first, 1)):
        maps = cache.layers[i].head_map[0].tolist()
        for kv, there in enumerate(layer[0]):
            for seen in (LENGTH + 4, LENGTH + 8):
                there = sorted({*there, *range(seen - 4, seen)})
                score = small[maps[kv * GROUPS : (kv + 1) * GROUPS], :seen].sum(1).mean(0)
                free = [j for j in there if 2 <= j < seen - 3]
                free = sorted(free, key=lambda j: -float(score[j]))[:19]
                there = sorted([0, 1, *free, seen - 3, seen - 2, seen - 1])
            assert held[i][0][kv] == there


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({"window": 8, "kernel": 7}, SnapKV("20 tokens", sinks=2, recent=3)),
        ({}, H2O("20 tokens", sinks=2, recent=3)),
    ],
)
def test_a_model_beside_itself_chooses_by_its_own_attention(options, other):
    """Every head is matched with itself, and tokens are those of SnapKV or H2O."""
    from lowkey import make_cache

    ids, model = prompt(LENGTH, 1), attached("llama")
    cache = guided(budget="20 tokens", beside=model, **options)
    read(cache, ids, LENGTH)
    heads = 8
    for i, layer in enumerate(cache.layers):
        assert layer.head_map[0].tolist() == list(range(i * heads, (i + 1) * heads))
    plain = make_cache(model, policy=other)
    model(ids, past_key_values=plain)
    assert kept(cache, 1) == kept(plain, 1)


def test_scores_are_taken_where_tokens_are():
    context = build(pad=2)
    small = torch.rand(2, 2, 3, 14, generator=torch.Generator().manual_seed(0))
    got = SmallKVTokens(**SMALL).score(replace(context, small=small))
    for b, h, s in context.valid.nonzero().tolist():
        at = int(context.positions[b, h, s])
        torch.testing.assert_close(got[b, h, s], small[b, h, :, at].mean())


def test_a_score_without_a_small_model_is_refused():
    context: EvictionContext = build()
    with pytest.raises(LowkeyError, match="needs a small model that reads along"):
        SmallKVTokens(**SMALL).score(context)
