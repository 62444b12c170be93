"""SmallKV's three tiers: which tokens are in each, and what a step answers, in loops and double precision."""

from __future__ import annotations

import pytest
import torch
from evicting_caches import record
from pico import HEAD_DIM, attached, prompt, stock
from small_pairs import attentions, eager_small, guided, read

LENGTH, GROUPS, SINKS, RECENT = 60, 2, 2, 3
WHOLE, ALONE = 2 * HEAD_DIM * 4 + 4, HEAD_DIM * 4 + 4  # bytes of a token, and of a value without its key


def tiers(score, budget, share):
    """Positions of one head with keys, and of values alone: the best that the bytes of the budget hold."""
    n, values_share = len(score), int(share * budget)
    order = sorted(range(SINKS, n - RECENT), key=lambda j: -float(score[j]))
    with_keys = max(budget - values_share, SINKS + RECENT)
    while with_keys < budget and n - with_keys - 1 <= (budget - with_keys - 1) * WHOLE // ALONE:
        with_keys += 1  # all fit, so more of them have keys
    values = min((budget - with_keys) * WHOLE // ALONE, n - with_keys)
    middle = with_keys - SINKS - RECENT
    whole = [*range(SINKS), *order[:middle], *range(n - RECENT, n)]
    return sorted(whole), sorted(order[middle : middle + values])


@pytest.mark.defines("policies", "smallkv")
@pytest.mark.parametrize("mix", ["sum", "exact"])
@pytest.mark.parametrize(("budget", "share"), [(24, 0.25), (24, 1.0), (36, 0.5), (30, 0.0)])
def test_tiers_and_answers_are_those_of_the_definition(budget, share, mix):
    ids = prompt(LENGTH + 6)
    options = {"marginal": share, "mix": mix, "matched_queries": 24}
    cache = guided("smallkv", f"{budget} tokens", **options)
    read(cache, ids[:, :LENGTH], LENGTH)
    kept = [[layer.kept_positions(b) for b in range(2)] for layer in cache.layers]
    values_kept = [[layer.positions_of_values(b) for b in range(2)] for layer in cache.layers]
    logs = record(cache)
    read(cache, ids[:, LENGTH:], [1, 1, 4])  # the piece evicts again, but behind its answers
    small = torch.cat(attentions(eager_small(), ids), 1)
    for i, layer in enumerate(cache.layers):
        for b in range(2):
            maps = layer.head_map[b].tolist()
            for kv, values in enumerate(values_kept[i][b]):
                group = maps[kv * GROUPS : (kv + 1) * GROUPS]
                score = small[b, group, :LENGTH, :LENGTH].sum(1).mean(0)
                whole, alone = tiers(score, budget, share)
                assert values.tolist() == alone
                assert kept[i][b][kv].tolist() == whole
                check(logs[i], given(i, ids), b, kv, whole, alone, small[b, group], mix)


def given(layer, ids):
    """Keys and values of the prompt (b, h, t, d) as this layer gets them."""
    found = record(cache := guided(budget="100%"))
    read(cache, ids[:, :LENGTH], LENGTH)
    return found[layer][0][:2]


def check(log, known, b, kv, whole, alone, small, mix):
    """Every answer of one KV head behind the prompt, from the tokens that it may see."""
    keys, values = (x[b, kv].double() for x in known)
    for new_k, new_v, call, out in log:
        keys = torch.cat([keys, new_k[b, kv].double()])
        values = torch.cat([values, new_v[b, kv].double()])
        t, seen = new_k.shape[2], len(keys)
        for q in range(t):
            at = seen - t + q
            there = [*whole, *range(LENGTH, at + 1)]
            for g in range(GROUPS):
                query = call.query[b, kv, g, q].double()
                weights = (keys[there] @ query * call.scaling).softmax(0)
                weight = small[g, at, alone]
                wanted = weights @ values[there]
                wanted = wanted * (1 - weight.sum()) if mix == "exact" else wanted
                wanted = wanted + weight @ values[alone]
                torch.testing.assert_close(out[b, kv, g, q].double(), wanted, rtol=2e-4, atol=2e-5)


def test_the_exact_mix_of_a_model_beside_itself_loses_nothing():
    """Every token is in a tier, and the weights of values are the model's own; the sum adds too much."""
    ids, model = prompt(LENGTH + 10, 1), attached("llama")
    wanted, error = stock("llama")(ids).logits[:, LENGTH:], {}
    for mix in ("exact", "sum"):
        cache = guided("smallkv", "60%", beside=model, marginal=1.0, mix=mix)
        read(cache, ids[:, :LENGTH], LENGTH)
        layer = cache.layers[0]
        held = [
            len(p) + len(q)
            for p, q in zip(layer.kept_positions(0), layer.positions_of_values(0), strict=True)
        ]
        assert held == [LENGTH] * 4 and all(len(q) > 40 for q in layer.positions_of_values(0))
        found = read(cache, ids[:, LENGTH:], [1] * 10)
        error[mix] = float((found - wanted).detach().abs().max())
    assert error["exact"] < 1e-4 < 100 * error["exact"] < error["sum"]


def test_the_published_split_of_a_budget():
    """A budget of 20 % is 15 % of the tokens with keys, critical and recent, and about 10 % of values."""
    n = 400
    cache = guided("smallkv", "20%")
    read(cache, prompt(n, 1), n)
    layer = cache.layers[0]
    assert {len(p) for p in layer.kept_positions(0)} == {n * 15 // 100}
    assert {len(p) for p in layer.positions_of_values(0)} == {n * 5 // 100 * WHOLE // ALONE}


def test_values_go_when_their_turn_comes():
    """At every eviction a value without key stays, or is freed for one of a higher score."""
    ids, seen = prompt(LENGTH + 40, 1), LENGTH
    cache = guided("smallkv", "24 tokens", every=10)
    read(cache, ids[:, :seen], seen)
    known = [[set(p.tolist()) for p in layer.kept_positions(0)] for layer in cache.layers]
    alone = [[set(p.tolist()) for p in layer.positions_of_values(0)] for layer in cache.layers]
    small = torch.cat(attentions(eager_small(), ids), 1)[0]
    for seen in range(LENGTH + 10, LENGTH + 41, 10):
        read(cache, ids[:, seen - 10 : seen], [1] * 10)
        for i, layer in enumerate(cache.layers):
            maps = layer.head_map[0].tolist()
            for kv in range(4):
                score = small[maps[kv * GROUPS : (kv + 1) * GROUPS], :seen, :seen].sum(1).mean(0)
                there = known[i][kv] | set(range(seen - 10, seen))
                order = sorted(there, key=lambda j: (2 <= j < seen - 3, -float(score[j])))
                whole, rest = (
                    set(order[:18]),
                    sorted({*order[18:], *alone[i][kv]}, key=lambda j: -float(score[j])),
                )
                known[i][kv], alone[i][kv] = whole, set(rest[: 6 * WHOLE // ALONE])
                assert set(layer.kept_positions(0)[kv].tolist()) == known[i][kv]
                assert set(layer.positions_of_values(0)[kv].tolist()) == alone[i][kv]
