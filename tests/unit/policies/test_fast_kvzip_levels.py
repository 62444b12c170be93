"""Fast KVzip evicts after every chunk and every n steps, over the whole cache, in a layer or in a head."""

from __future__ import annotations

import pico
import pytest
import torch
from gates_by_hand import gate_scores, projected
from pico import attached, feed, prompt

import lowkey
from lowkey.policies import FastKVzip
from lowkey.policies.allocators import Ada

SINKS, RECENT, BUDGET, EVERY = 1, 2, 12, 4
CHUNKS, STEPS = [30, 30, 20], 9
LEVELS = {"pair": "global", "head": "uniform", "layer": Ada(0.0)}
GROUPS = {"pair": lambda i, j: 0, "head": lambda i, j: (i, j), "layer": lambda i, j: i}


@pytest.mark.parametrize("level", LEVELS)
def test_the_best_by_their_gates_stay_at_every_level(level):
    """Each token is scored once, by what its layer made of it; counts are exact."""
    # distinct tokens, since the first layer scores equal ones alike
    model, ids = attached("llama"), 1 + torch.randperm(pico.VOCAB - 1)[None, : sum(CHUNKS) + STEPS]
    policy = FastKVzip(f"{BUDGET} tokens", LEVELS[level], sinks=SINKS, recent=RECENT, every=EVERY)
    gates = pico.gates(model, policy)
    cache = lowkey.make_cache(model, policy=policy, gates=gates)
    held = {(i, j): {} for i in range(3) for j in range(4)}  # scores of the tokens of each head
    seen = 0
    for n, length in enumerate([*CHUNKS, *[1] * STEPS]):
        with projected(model) as logs, torch.no_grad():
            feed(model, ids[:, seen : seen + length], cache)
        for i, log in enumerate(logs):
            for j, row in enumerate(gate_scores(gates.layers[i], log[0][0])):
                held[i, j] |= {seen + t: float(s) for t, s in enumerate(row)}
        seen += length
        step = n + 1 - len(CHUNKS)
        if step <= 0 or step % EVERY == 0:
            best = {}
            for (i, j), tokens in held.items():
                free = [(s, t) for t, s in tokens.items() if SINKS <= t < seen - RECENT]
                best.setdefault(GROUPS[level](i, j), []).extend((s, t, i, j) for s, t in free)
            for group in best.values():
                heads = len({(i, j) for _, _, i, j in group})
                kept = sorted(group)[-heads * (BUDGET - SINKS - RECENT) :]
                for _, t, i, j in set(group) - set(kept):
                    del held[i, j][t]
        for i in range(3):
            found = [at.tolist() for at in cache.kept_positions(i)]
            assert found == [sorted(held[i, j]) for j in range(4)], (n, i)
        assert cache.nbytes() == cache.predicted_nbytes()


def test_what_the_next_eviction_scores_is_counted():
    """Queries of the steps since the last eviction wait for it; they are held and counted."""
    model, ids = attached("llama"), prompt(40 + 8, batch=1)
    policy = FastKVzip(f"{BUDGET} tokens", "global", sinks=SINKS, recent=RECENT, every=8)
    cache = lowkey.make_cache(model, policy=policy, gates=pico.gates(model, policy))
    feed(model, ids[:, :40], cache)
    for step in range(1, 9):
        feed(model, ids[:, 39 + step : 40 + step], cache)
        waiting = step % 8
        for layer in cache.evicting:
            queries = layer.recorded_queries
            assert queries.numel() == waiting * 8 * pico.HEAD_DIM
            assert any(t is queries for t in layer.held_tensors())
        assert cache.nbytes() == cache.predicted_nbytes()
