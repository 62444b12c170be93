"""Every form x packing x window x budget of tokens: attention over what is stored, against fp64 by hand.

What each head keeps is taken from the cache. How it is stored is worked out here from the keys and values
that the layers were given: in the latents of its heads, rounded in groups, exact where it is a sink or
recent.
"""

from __future__ import annotations

import itertools

import dense
import pico
import pytest
import reach
import torch
from evicting_caches import record
from packing_by_hand import BLOCK, FORMS, HEADS, TOLERANCE, D, group_size, hadamard, plan
from pico import attached, feed, prompt, real, stock

import lowkey
from lowkey import Exact
from lowkey.catalog import make_policy
from lowkey.core.types import LowkeyError, identity_factors
from lowkey.models import families

LENGTH, STEPS, PADS = 110, 6, [17, 0]
PACKINGS = ["none", "int8", "int4", "int2", "kivi8", "kivi4", "kivi2", "hadamard8", "hadamard4", "hadamard2"]
WINDOWS = {"no-window": Exact(), "window": Exact(3, 5)}
FAMILIES = ["llama", "gemma2", "qwen3", "gemma3_text"]  # of four KV heads; gemma2 has a soft cap
CASES = list(itertools.product(FORMS, PACKINGS, WINDOWS, ["100%", "30%"]))
# the family of each case: every packing and every form meets every family in every window at every budget
TURNS = [i + i // 4 + i // (4 * len(PACKINGS)) for i in range(len(CASES))]


def combined(model, form, packing, window, policy):
    return lowkey.make_cache(model, plan(model, form), policy, bits=packing, exact=window)


def snapkv(budget):
    return make_policy("snapkv", budget, {"sinks": "3", "recent": "5", "window": "8"})


def other(name, budget):
    """ada-kv keeps more tokens in some rows than in others; h2o holds a score of each token."""
    return make_policy(name, budget, {"sinks": "3", "recent": "5"})


def rounded(x, packing, by_channel):
    """(n, r) of one row, in the order in which it is stored, with blocks that end where they must."""
    if packing == "none":
        return x
    bits = int(packing[-1])
    if by_channel:
        return torch.cat([of_groups(part.mT, len(part), bits).mT for part in x.split(BLOCK)]) if len(x) else x
    return of_groups(x, group_size(x.shape[1], bits), bits)


def of_groups(x, size, bits):
    """(n, r), each `size` numbers of a row rounded to 2 ** bits even steps between their ends."""
    parts = []
    for part in x.split(size, 1):
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        step = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
        parts.append(((part - low) / step).round() * step + low)
    return torch.cat(parts, 1)


def side(x, down, up, mean, order, packing, by_channel, kept):
    """One sequence's keys or values (h, s, d) as they are read, NaN for tokens that their head dropped.

    kept: for each KV head of the model, lists of indices that are packed together.
    """
    t = down.shape[1] // D
    order = list(range(HEADS)) if order is None else order.tolist()
    turn = (
        hadamard(down.shape[2]).double()
        if packing.startswith("hadamard")
        else torch.eye(down.shape[2]).double()
    )
    out = torch.full_like(x, torch.nan)
    for g in range(HEADS // t):
        members = order[g * t : g * t + t]
        means = [mean[g * t + a].double() if mean is not None else torch.zeros(D).double() for a in range(t)]
        joint = torch.cat([x[j] - m for j, m in zip(members, means, strict=True)], 1)
        latent = joint @ down[g % len(down)].double() @ turn
        for a, j in enumerate(members):
            for index in kept[j]:
                stored = rounded(latent[index], packing, by_channel) @ turn
                out[j, index] = stored @ up[(g * t + a) % len(up)].double() + means[a]
    return out


def by_hand(model, layer, i, log, form, packing, window):
    """The output of the last step of one layer, (b, h, g, d)."""
    keys, values = (torch.cat([entry[k] for entry in log], 2).double() for k in (0, 1))
    call = log[-1][2]
    layout, maps = FORMS[form]
    f = maps(model)[i] if maps else identity_factors(D)
    seen = LENGTH + STEPS
    out = torch.empty(*call.query.shape[:3], D, dtype=torch.float64)
    for row, pad in enumerate(PADS):
        tokens = torch.arange(seen)
        turn = None
        k = keys[row]
        if layout == "pre_rope":
            turn = dense.rotations(model, i, (tokens - pad).clamp_min(0).unsqueeze(0), D)[0].double()
            k = (k.unsqueeze(-2) @ torch.linalg.inv(turn)).squeeze(-2)
        held = [(p + pad).tolist() for p in layer.kept_positions(row)]
        # once a policy has evicted, what came later is dense; blocks of dense tokens begin there
        dense_from = layer.front_start
        first = max(pad, dense_from)
        stop = seen - window.recent
        if packing.startswith("kivi"):
            stop = first + (stop - first) // BLOCK * BLOCK
        sinks = set(range(pad, pad + window.sinks))
        kept = []
        for index in held:
            old = [n for n in index if n < dense_from and n not in sinks]
            kept.append([old, [n for n in index if first <= n < stop]])
        kivi = packing.startswith("kivi")
        ks = side(k, f.k_down, f.k_up, f.k_mean, f.order, packing, kivi, kept)
        vs = side(values[row], f.v_down, f.v_up, f.v_mean, f.order, packing, False, kept)
        if turn is not None:
            ks = (ks.unsqueeze(-2) @ turn).squeeze(-2)
        for j, index in enumerate(held):
            exact = [n for n in index if n in sinks or n >= max(stop, first)]
            ks[j, exact], vs[j, exact] = keys[row, j, exact], values[row, j, exact]
            scores = call.query[row, j, :, 0].double() @ ks[j, index].mT * call.scaling
            if call.softcap:
                scores = call.softcap * torch.tanh(scores / call.softcap)
            out[row, j] = scores.softmax(-1) @ vs[j, index]
    return out


def check_a_step(form, packing, window, policy, family):
    """Its output is attention over what is stored, in every layer; bytes are those that are held."""
    model = attached(family)
    cache = combined(model, form, packing, WINDOWS[window], policy)
    logs = record(cache)
    feed(model, prompt(LENGTH), cache, PADS)
    feed(model, prompt(STEPS, seed=1), cache, PADS, [1] * STEPS)
    for layer in cache.evicting:
        del layer.attend  # the recorder, which holds what it saw
    assert reach.held(cache) == cache.nbytes() == cache.predicted_nbytes()
    window = WINDOWS[window]
    full = families.geometry(model).compressible
    for i, layer, log in zip(full, cache.evicting, logs, strict=True):
        for row, pad in enumerate(PADS):
            share = sum(len(p) for p in layer.kept_positions(row)) / HEADS / (LENGTH - pad)
            assert (str(policy.budget) == "100%") == (share > 1), (
                "all tokens and the steps, or about the budget"
            )
        expected = by_hand(model, layer, i, log, form, packing, window)
        out = log[-1][3][:, :, :, 0]
        tolerance = 5e-5 if packing == "none" else TOLERANCE[int(packing[-1])]
        assert (out - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(
    ("form", "packing", "window", "budget", "family"),
    [(*case, FAMILIES[turn % 4]) for case, turn in zip(CASES, TURNS, strict=True)],
    ids=str,
)
def test_a_step_is_attention_over_what_is_stored(form, packing, window, budget, family):
    check_a_step(form, packing, window, snapkv(budget), family)


@pytest.mark.parametrize(
    ("form", "packing", "policy", "family"),
    [
        (form, packing, policy, FAMILIES[(f + p + n) % 4])
        for f, form in enumerate(FORMS)
        for p, packing in enumerate(["int8", "kivi4"])
        for n, policy in enumerate(["ada-kv", "h2o"])
    ],
    ids=str,
)
def test_so_it_is_under_other_policies(form, packing, policy, family):
    check_a_step(form, packing, "window", other(policy, "30%"), family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", WINDOWS)
def test_full_rank_and_a_full_budget_are_stock(family, window):
    """Merged over heads, centred, in another order: all that is kept is what the model would have read."""
    model = attached(family)
    full = pico.merged_factors(HEADS, D, D, 2, 4)
    maps = dict.fromkeys(families.geometry(model).compressible, full)
    for layout in ("post_rope", "pre_rope"):
        made = pico.plan(model, factors=maps, layout=layout, orthonormal=False)
        cache = lowkey.make_cache(model, made, snapkv("100%"), exact=WINDOWS[window])
        ids = prompt(60)
        ours, theirs = feed(model, ids, cache, PADS, [40, 8, *[1] * 12]), feed(stock(family), ids, pads=PADS)
        assert (real(ours, PADS) - real(theirs, PADS)).abs().max() < 1e-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_full_budget_is_the_cache_without_a_policy(form, packing):
    """Prompt, a second turn, steps: a policy that evicts nothing changes nothing."""
    model, window = attached("llama"), Exact(3, 5)
    ids, splits = prompt(100), [70, 12, *[1] * 18]
    ours = feed(model, ids, combined(model, form, packing, window, snapkv("100%")), PADS, splits)
    theirs = feed(model, ids, combined(model, form, packing, window, None), PADS, splits)
    assert (real(ours, PADS) - real(theirs, PADS)).abs().max() < 1e-4


@pytest.mark.parametrize("form", ["merged", "merged-pre"])
def test_heads_that_share_a_latent_keep_the_same_tokens(form):
    model = attached("llama")
    cache = combined(model, form, "int4", Exact(3, 5), make_policy("snapkv", "30%", {"allocator": "ada"}))
    feed(model, prompt(LENGTH), cache, PADS)
    for layer in cache.evicting:
        kept = layer.kept_positions(0)
        assert all(torch.equal(kept[0], other) for other in kept)


def test_pooling_over_heads_is_the_mean_or_the_largest():
    model, counts = attached("llama"), []
    for pooling in ("mean", "max"):
        policy = make_policy("snapkv", "30%", {"head_pooling": pooling})
        cache = combined(model, "merged", "none", Exact(), policy)
        feed(model, prompt(LENGTH), cache, PADS)
        counts.append([layer.kept_positions(1)[0].tolist() for layer in cache.evicting])
    assert counts[0] != counts[1]


@pytest.mark.parametrize("form", ["plain", "post"])
def test_what_is_refused_says_why(form):
    model = attached("llama")
    with pytest.raises(LowkeyError, match="drops channels of the model's own keys"):
        combined(model, form, "int4", Exact(), make_policy("think", "30%", {}))
