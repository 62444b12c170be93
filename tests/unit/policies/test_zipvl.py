"""ZipVL in whole caches: how many tokens a layer keeps, which ones, and what decoding adds."""

from __future__ import annotations

import pytest
import torch
from evicting_caches import made, record
from pico import attached, prompt, stock
from score_definitions import mixed_bits

import lowkey
from lowkey.catalog import make_policy

LAYERS, HEADS, GROUP = 3, 4, 2


def probes_of(positions, newest, drawn):
    """The newest queries, and others by the hash of their position."""
    last = max(1, round(len(positions) * newest))
    others = sorted(positions[:-last], key=mixed_bits)
    return sorted({*positions[-last:], *others[: round(len(positions) * drawn)]})


def important(paid, probes, stays, tau):
    """By equations 6 to 9: {position}, from the attention (heads, probes, positions) of one layer.

    What stays in any case is kept besides, and its mass does not count.
    """
    c = {j: float(paid[:, :, j].sum()) for j in range(paid.shape[2]) if j not in stays}
    whole, held, p = sum(c.values()), 0.0, 0
    for weight in sorted(c.values(), reverse=True):
        p, held = p + 1, held + weight
        if held >= tau * whole:
            break
    normalised = {j: c[j] / sum(q >= j for q in probes) for j in c}
    return set(stays) | set(sorted(normalised, key=lambda j: -normalised[j])[:p])


@pytest.mark.defines("policies", "zipvl")
@pytest.mark.parametrize("tau", [0.3, 0.7])
@torch.no_grad()
def test_the_count_follows_from_mass_and_the_set_from_the_mean(tau):
    n, ids = 60, prompt(60, batch=2)
    policy = make_policy("zipvl", None, {"tau": str(tau), "sinks": "2", "recent": "4"})
    cache = made(policy)
    lowkey.prefill(attached("llama"), None, cache, ids)
    probes = probes_of(list(range(n)), 0.05, 0.05)
    assert len(probes) == 6
    counts = set()
    for row in range(2):
        layers = stock("llama")(ids[row : row + 1], output_attentions=True).attentions
        for i, weights in enumerate(layers):
            wanted = important(weights[0].double()[:, probes], probes, [0, 1, *range(56, 60)], tau)
            assert all(set(at.tolist()) == wanted for at in cache.kept_positions(i, row))
            counts.add(len(wanted))
    assert len(counts) > 1, "layers keep different numbers of tokens"


@torch.no_grad()
def test_what_was_kept_stays_and_new_tokens_are_chosen():
    """Every n steps the tokens that came since are scored by probes among their queries."""
    n, every, sinks, recent, tau = 50, 20, 2, 4, 0.6
    model, ids = attached("llama"), prompt(n + every, batch=1)
    given = {"tau": tau, "sinks": sinks, "recent": recent, "every": every, "random_probes": 0.1}
    cache = made(make_policy("zipvl", None, {k: str(v) for k, v in given.items()}))
    model(ids[:, :n], past_key_values=cache)
    before = [set(cache.kept_positions(i)[0].tolist()) for i in range(LAYERS)]
    keys = [layer_keys(cache, i, n) for i in range(LAYERS)]
    logs = record(cache)
    for t in range(n, n + every):
        model(ids[:, t : t + 1], past_key_values=cache)
    probes = probes_of(list(range(n, n + every)), 0.05, 0.1)
    dropped = 0
    for i, log in enumerate(logs):
        whole = torch.cat([keys[i], *(k for k, *_ in log)], 2).double()
        there = sorted(before[i] | set(range(n, n + every)))
        paid = torch.zeros(HEADS * GROUP, len(probes), n + every, dtype=torch.float64)
        for a, p in enumerate(probes):
            query, seen = log[p - n][2].query[0, :, :, 0].double(), [t for t in there if t <= p]
            logits = torch.einsum("hgd,hsd->hgs", query, whole[0][:, seen]) * log[0][2].scaling
            paid[:, a, seen] = logits.softmax(-1).flatten(0, 1)
        # what lies in rows was chosen before; the window's tokens of the prompt have had no choice yet
        chosen = {p for p in before[i] if p < n - recent_window(cache)}
        stays = chosen | {0, 1} | set(range(n + every - recent, n + every))
        absent = set(range(n + every)) - set(there)
        wanted = important(paid, probes, sorted(stays | absent), tau) - absent
        assert all(set(at.tolist()) == wanted for at in cache.kept_positions(i))
        assert before[i] <= wanted
        dropped += n + every - len(wanted | set(range(n)))
    assert dropped


def recent_window(cache):
    """How many of the newest tokens were no part of the rows when the prompt had been read."""
    return cache.evicting[0].exact.recent


def layer_keys(cache, i, n):
    """The keys (1, h, n, d) that a layer holds, by position; zeros for those that it does not."""
    layer = cache.evicting[i]
    out = torch.zeros(1, HEADS, n, layer.recent_k.shape[-1])
    keys, row = layer.rows.keys[0][:, 0], 0
    starts = layer.rows.starts.tolist()
    for row in range(HEADS):
        at = layer.rows.positions[starts[row] : starts[row + 1]].long()
        out[0, row, at] = keys[starts[row] : starts[row + 1]]
    recent = layer.recent_k.shape[2]
    if recent:
        out[:, :, n - recent :] = layer.recent_k
    return out


def test_a_budget_and_the_allocator_go_together():
    assert make_policy("zipvl", "25%", {}).allocator == "layer-mass"
    assert make_policy("zipvl", None, {}).allocator == "mass-share"
    assert make_policy("zipvl", None, {"tau": "0.9"}).resolved_allocator().tau == 0.9


@torch.no_grad()
def test_all_heads_of_a_layer_keep_the_same_tokens():
    cache = made(make_policy("zipvl", "30%", {"protected_mass": "true"}))
    attached("llama")(prompt(80, batch=1), past_key_values=cache)
    for i in range(LAYERS):
        kept = [set(at.tolist()) for at in cache.kept_positions(i)]
        assert len(set.union(*kept)) - len(set.intersection(*kept)) <= 1  # a token that not all heads get
