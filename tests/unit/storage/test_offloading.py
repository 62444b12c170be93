"""Tokens in host memory: which come back, by loops over the small model's attention, and what they take."""

from __future__ import annotations

import pico
import pytest
import reach
import torch
from evicting_caches import record
from pico import HEAD_DIM, attached, prompt, stock
from small_pairs import attentions, eager_small, guided, read, small

import lowkey
from lowkey.core.types import LowkeyError
from lowkey.policies import POLICIES
from lowkey.storage.exact import Exact

LENGTH, KEPT, EVERY, GROUPS = 60, 20, 5, 2
OPTIONS = {"every": EVERY, "offload": True, "window": 4}


def test_every_eviction_chooses_of_all_tokens_ever_seen():
    """Sinks, recent ones and the best others are kept; some had been dropped, and are as they were."""
    ids = prompt(LENGTH + 40)
    cache, returned = guided(budget=f"{KEPT} tokens", **OPTIONS), 0
    logs = record(cache)
    read(cache, ids[:, :LENGTH], LENGTH)
    known = [[set(p.tolist()) for b in range(2) for p in layer.kept_positions(b)] for layer in cache.layers]
    weights = torch.cat(attentions(eager_small(), ids), 1)
    for seen in range(LENGTH + EVERY, LENGTH + 41, EVERY):
        read(cache, ids[:, seen - EVERY : seen], [1] * EVERY)
        for i, layer in enumerate(cache.layers):
            for row in range(8):
                b, kv = divmod(row, 4)
                group = layer.head_map[b].tolist()[kv * GROUPS : (kv + 1) * GROUPS]
                score = weights[b, group, seen - 4 : seen, :seen].sum(1).mean(0)
                order = sorted(range(seen), key=lambda j: (2 <= j < seen - 3, -float(score[j])))
                kept = set(layer.kept_positions(b)[kv].tolist())
                assert kept == set(order[:KEPT])
                returned += len(kept - known[i][row] - set(range(seen - EVERY, seen)))
                known[i][row] = kept
    assert returned > 10
    check_stored(cache, logs, LENGTH + 40)


def check_stored(cache, logs, seen):
    """Every token is in one place, with the keys and values that the model made."""
    for layer, log in zip(cache.layers, logs, strict=True):
        keys, values = (torch.cat([call[part] for call in log], 2) for part in (0, 1))
        for row in range(8):
            b, kv = divmod(row, 4)
            dense, places = set(range(layer.front_start, seen)), []
            for rows in (layer.rows, layer.host):
                a, z = rows.starts[row : row + 2].tolist()
                at = rows.positions[a:z].long()
                places += at.tolist()
                assert torch.equal(rows.keys[0][a:z, 0], keys[b, kv, at])
                assert torch.equal(rows.values[0][a:z, 0], values[b, kv, at])
            assert sorted([*places, *dense]) == list(range(seen))


def test_bytes_lie_in_a_column_of_their_own():
    """A token there takes a key, a value and its position."""
    ids, cache = prompt(LENGTH + 10), guided(budget="30%", **OPTIONS)
    plain = guided(budget="30%", every=EVERY, window=4)
    for piece in ids.split([40, *[1] * 10, 20], 1):
        read(cache, piece, piece.shape[1])
        read(plain, piece, piece.shape[1])
        assert reach.held(cache) == cache.nbytes() == cache.predicted_nbytes()
        moved = sum(len(layer.host_positions) for layer in cache.layers)
        assert cache.host_nbytes() == moved * (2 * HEAD_DIM * 4 + 4) + 3 * 9 * 8
        assert plain.host_nbytes() == 0
    kept = [sum(len(p) for b in (0, 1) for p in layer.kept_positions(b)) for layer in cache.layers]
    assert moved == 3 * 8 * (LENGTH + 10) - sum(kept)
    assert cache.nbytes() - cache.host_nbytes() == plain.nbytes()
    cache.reset()
    assert cache.nbytes() == cache.predicted_nbytes() == cache.host_nbytes() == 0


def test_sequences_are_copied_and_chosen_with_what_was_moved():
    ids = prompt(LENGTH)
    alone = [read(guided(budget="40%", **OPTIONS), row, [40, *[1] * 20])[:, 40:] for row in ids.split(1)]
    cache = guided(budget="40%", **OPTIONS)
    read(cache, ids[:, :40], 40)
    twin = cache.branch([1, 0, 1])
    rest = ids[[1, 0, 1], 40:]
    torch.testing.assert_close(read(twin, rest, [1] * 20), torch.cat([alone[i] for i in (1, 0, 1)]))
    assert reach.held(twin) == twin.nbytes() == twin.predicted_nbytes()


def test_a_failed_call_moves_nothing():
    ids = prompt(LENGTH, 1)
    cache, other = guided(budget="40%", **OPTIONS), guided(budget="40%", **OPTIONS)
    read(cache, ids[:, :40], 40)
    before = cache.nbytes(), cache.host_nbytes()
    with pytest.raises(ValueError, match="boom"), cache.reading(ids[:, 40:47]):
        raise ValueError("boom")
    with pytest.raises(LowkeyError), cache.reading(ids[:, 40:47]):
        attached("llama")(ids[:, 40:47].repeat(2, 1), past_key_values=cache)
    assert (cache.nbytes(), cache.host_nbytes()) == before
    last = read(cache, ids[:, 40:], [1] * 20)
    assert torch.equal(last, read(other, ids, [40, *[1] * 20])[:, 40:])


def test_a_full_budget_is_the_full_cache():
    ids = prompt(40)
    logits = read(guided(budget="100%", **OPTIONS), ids, [25, *[1] * 15])
    torch.testing.assert_close(logits, stock("llama")(ids).logits, rtol=1e-4, atol=1e-5)


def test_tokens_move_in_the_form_in_which_they_are_stored():
    model, policy = attached("llama"), POLICIES["smallkv-tokens"]("40%", **OPTIONS)
    plan = pico.plan(model, 8, 10)
    for options in ({"plan": plan, "bits": 8}, {"bits": 4}, {"plan": plan}):
        cache = lowkey.make_cache(model, policy=policy, small=small(), exact=Exact(2, 6), **options)
        read(cache, prompt(LENGTH, 1), [40, *[1] * 20])
        assert reach.held(cache) == cache.nbytes() == cache.predicted_nbytes() > cache.host_nbytes() > 0


@pytest.mark.parametrize(
    ("name", "budget", "bits", "says"),
    [
        ("smallkv-tokens", "64 KiB", None, "no number of bytes bounds it"),
        ("smallkv", "40%", None, "its second tier keeps values without keys"),
        ("smallkv-tokens", "40%", "kivi4", "use int4 or int8"),
    ],
)
def test_what_cannot_be_moved_is_refused_in_one_line(name, budget, bits, says):
    with pytest.raises(LowkeyError, match=says) as error:
        policy = POLICIES[name](budget, offload=True)
        lowkey.make_cache(attached("llama"), policy=policy, small=small(), bits=bits)
    assert "\n" not in str(error.value)
