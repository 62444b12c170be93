"""ZipVL in whole caches: how many tokens a layer keeps, which ones, and what decoding adds."""

from __future__ import annotations

import pytest
import torch
from evicting_caches import made, record
from pico import attached, build, feed, padding, prompt, real, stock
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from zipvl_by_hand import important, probes_of

import lowkey
from lowkey.catalog import make_policy
from lowkey.core.types import LowkeyError

LAYERS, HEADS, GROUP = 3, 4, 2


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


# -- a prompt in which only important tokens attend


def sparse_by_hand(model, ids, pads, tau, sinks=2, recent=4):
    """Logits of the model whose attention is that of equations 6 to 9, layer by layer, in fp64."""

    def attention(module, q, k, v, mask, scaling=None, **kwargs):
        out, length = torch.zeros_like(q), q.shape[2]
        for row, pad in enumerate(pads):
            n = length - pad
            query, keys, values = (x[row, :, pad:].double() for x in (q, k, v))
            keys, values = (x.repeat_interleave(len(query) // len(x), 0) for x in (keys, values))
            logits = query @ keys.mT * scaling
            logits = logits.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
            probes = probes_of(list(range(n)), 0.05, 0.05)
            stays = [*range(sinks), *range(n - recent, n)]
            at = sorted(important(logits.softmax(-1)[:, probes], probes, stays, tau))
            among = logits[:, at][:, :, at].softmax(-1) @ values[:, at]
            out[row, :, [pad + t for t in at]] = among.to(out.dtype)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("sparse-by-hand", attention)
    AttentionMaskInterface.register("sparse-by-hand", sdpa_mask)
    model.set_attn_implementation("sparse-by-hand")
    mask, positions = padding(pads, ids.shape[1])
    return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


@pytest.mark.parametrize(("rest", "bits"), [("drop", None), ("int2", None), ("int2", 4)])
@torch.no_grad()
def test_only_important_tokens_attend_in_a_sparse_prefill(rest, bits):
    ids, pads, tau = prompt(60, batch=2), [9, 0], 0.5
    given = {"tau": tau, "sinks": 2, "recent": 4, "sparse_prefill": "true", "rest": rest}
    policy = make_policy("zipvl", None, {k: str(v) for k, v in given.items()})
    cache = made(policy, bits=bits, exact=lowkey.Exact(2, 4))
    ours = feed(attached("llama"), ids, cache, pads)
    assert cache.nbytes() == cache.predicted_nbytes()
    theirs = sparse_by_hand(build("llama"), ids, pads, tau)
    torch.testing.assert_close(real(ours, pads), real(theirs, pads), atol=2e-4, rtol=0)
    dense = feed(attached("llama"), ids, made(make_policy("zipvl", "100%", {})), pads)
    assert (real(ours, pads) - real(dense, pads)).abs().max() > 0.05
    step = feed(attached("llama"), prompt(1, seed=2), cache, pads)  # steps attend to all that is held
    assert bool(step.isfinite().all()) and cache.get_seq_length() == 61


def test_a_sparse_prefill_of_all_tokens_is_a_dense_one():
    ids, model = prompt(40, batch=2), attached("llama")
    sparse = made(make_policy("zipvl", None, {"tau": "1", "sparse_prefill": "true"}))
    dense = made(make_policy("zipvl", "100%", {}))
    a, b = (feed(model, ids, cache, [7, 0], [30, 10]) for cache in (sparse, dense))
    torch.testing.assert_close(real(a, [7, 0]), real(b, [7, 0]), atol=1e-5, rtol=0)


def test_an_interrupted_sparse_prefill_changes_nothing():
    cache = made(make_policy("zipvl", None, {"tau": "0.5", "sparse_prefill": "true"}))
    model = attached("llama")

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.get_decoder().layers[1].mlp.register_forward_pre_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            feed(model, prompt(40), cache)
    finally:
        handle.remove()
    assert cache.get_seq_length() == 0 and cache.nbytes() == cache.predicted_nbytes() == 0
    assert all(layer.kept_of_chunk is None for layer in cache.evicting)


@pytest.mark.parametrize("options", [{"allocator": "layer-mass"}, {"recent": "0", "allocator": "uniform"}])
def test_a_sparse_prefill_needs_a_choice_at_once(options):
    with pytest.raises(LowkeyError, match="sparse_prefill of ZipVL"):
        make_policy("zipvl", "30%", {"sparse_prefill": "true"} | options)
