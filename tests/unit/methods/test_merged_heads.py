"""Merging KV heads by singular value decomposition: which heads form a group, and what is lost."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pico
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merged_heads import (
    LAYER,
    LENGTH,
    RANKS,
    ROWS,
    WHOLE,
    data,
    kept,
    left,
    random,
    random_commuting,
    random_turn,
    seen,
)
from pico import HEAD_DIM, attached, feed, stock

from lowkey.core.types import LowkeyError, head_blocks
from lowkey.methods import MEA, KVHeadSVD
from lowkey.methods.kvheads import cheapest_groups, cosine_transform, pair_losses
from lowkey.models import families
from lowkey.models.attention_interface import attach
from lowkey.ops.bases import is_orthonormal
from lowkey.ops.rope import rotate

# -- every way to merge


@pytest.mark.parametrize("method", WHOLE)
def test_full_rank_gives_the_stock_logits(prepared, method, layout):
    bases = WHOLE[method].fit(*prepared(layout=layout), RANKS, 0)
    maps = dict.fromkeys(range(3), bases.at(HEAD_DIM, HEAD_DIM))
    out, reference = (
        feed(attached("llama"), ROWS, pico.lowrank(attached("llama"), maps, layout)),
        feed(stock("llama"), ROWS),
    )
    assert torch.allclose(out, reference, atol=5e-5)


@pytest.mark.parametrize(
    "method",
    [MEA("activations"), MEA("weights"), MEA("aligned"), KVHeadSVD(1), KVHeadSVD(1, keys="commuting")],
)
def test_a_model_with_a_single_head_is_left_as_it_is(prepared, method, layout):
    stats, probe = prepared("llama-mqa", layout)
    assert method.candidates(1, HEAD_DIM, RANKS) == [16]
    assert probe.held_out_error(method.fit(stats, probe, [16], 0).at(16, 16)) < 1e-5


@pytest.mark.parametrize("method", WHOLE)
def test_columns_are_orthonormal_and_cost_what_their_rank_says(prepared, method, layout):
    bases = WHOLE[method].fit(*prepared(layout=layout), RANKS, 0)
    for rank in WHOLE[method].candidates(4, HEAD_DIM, RANKS):
        f = bases.at(rank, rank)
        assert f.ranks == (rank, rank)
        assert is_orthonormal(f.k_down, 1e-5) and is_orthonormal(f.v_down, 1e-5)
        assert len(f.k_down) * f.k_down.shape[-1] == len(f.v_down) * f.v_down.shape[-1] == 4 * rank


@pytest.mark.parametrize("method", [m for m in WHOLE if "weights" not in m])  # theirs is of white inputs
def test_the_spectrum_adds_up_to_the_energy_that_is_kept(prepared, method):
    """On the moment that the basis is made from; energy rules read it."""
    stats, probe = prepared()
    bases = WHOLE[method].fit(stats, probe, RANKS, 0)
    for side, moment in (("keys", stats.keys_post), ("values", stats.values)):
        basis = getattr(bases, side)
        moment = in_groups(moment, bases.order, 4 // basis.merge)
        assert basis.spectrum.shape == (4 // basis.merge, HEAD_DIM)
        for rank in WHOLE[method].candidates(4, HEAD_DIM, RANKS):
            found = float(basis.spectrum[:, :rank].sum())
            assert math.isclose(found, kept(moment, basis.at(rank)[0]), rel_tol=1e-5)


def in_groups(moment, order, groups):
    """(G, t d, t d) of a joint moment whose heads are put in order first."""
    h = 4
    by_head = moment.view(h, HEAD_DIM, h, HEAD_DIM)
    order = torch.arange(h) if order is None else order
    return head_blocks(by_head[order][:, :, order].reshape(moment.shape), groups)


@pytest.mark.parametrize("method", WHOLE)
def test_fitting_twice_gives_the_same(prepared, method):
    a, b = (WHOLE[method].fit(*prepared(), RANKS, 0) for _ in range(2))
    assert all(
        torch.equal(getattr(a, s).at(r)[0], getattr(b, s).at(r)[0]) for s in ("keys", "values") for r in RANKS
    )


@pytest.mark.parametrize("name", ["qwen2", "phi3-partial", "gemma2", "llama-yarn", "qwen3"])
@pytest.mark.parametrize("method", ["layer", "commuting", "mea-aligned"])
def test_merging_beats_the_mean_in_other_families(prepared, name, method, layout):
    stats, probe = prepared(name, layout)
    ours, mean = (m.fit(stats, probe, [8, 16], 0) for m in (WHOLE[method], KVHeadSVD(basis="mean")))
    assert (
        probe.held_out_error(ours.at(16, 16))
        < 1e-5
        < probe.held_out_error(ours.at(8, 8))
        < probe.held_out_error(mean.at(8, 8))
    )


# -- KV heads by SVD


@pytest.mark.defines("methods", "kv-head-svd")
@pytest.mark.parametrize("rank", [4, 8, 12])
def test_keys_are_the_truncated_svd_of_the_activations(prepared, layout, rank):
    """Eckart-Young: no other projection to so many numbers leaves less."""
    found = seen()
    keys = found["keys_pre" if layout == "pre_rope" else "keys_post"]
    layer, grouped = (
        m.fit(*prepared(layout=layout), RANKS, 0)
        for m in (KVHeadSVD(whole=False), KVHeadSVD(keys="grouped", whole=False))
    )
    together, pairs = keys.flatten(1), keys.unflatten(1, (2, 2)).flatten(2)
    assert math.isclose(left(together, layer.keys.at(rank)[0][0]), tail(together, 4 * rank), rel_tol=1e-4)
    values = found["values"].unflatten(1, (2, 2)).flatten(2)
    for basis, x in ((grouped.keys, pairs), (grouped.values, values), (layer.values, values)):
        for group in range(2):
            assert math.isclose(
                left(x[:, group], basis.at(rank)[0][group]), tail(x[:, group], 2 * rank), rel_tol=1e-4
            )


def tail(x, rank):
    return float((np.linalg.svd(x.numpy(), compute_uv=False)[rank:] ** 2).sum())


def test_layer_maps_lose_less_than_group_or_commuting_maps(prepared, layout):
    keys = seen()["keys_pre" if layout == "pre_rope" else "keys_post"]
    losses = []
    for form in ("layer", "grouped", "commuting"):
        down = KVHeadSVD(keys=form).fit(*prepared(layout=layout), RANKS, 0).keys.at(8)[0]
        x = keys.unflatten(1, (len(down), -1)).flatten(2)
        losses.append(sum(left(x[:, g], m) for g, m in enumerate(down)))
    assert losses[0] < losses[1] < losses[2]


def test_commuting_maps_are_the_same_in_both_layouts(prepared):
    """Rotation does not change the Gram of complex numbers that turn alike."""
    a, b = (
        KVHeadSVD(keys="commuting").fit(*prepared(layout=layout), RANKS, 0).keys
        for layout in ("pre_rope", "post_rope")
    )
    assert torch.allclose(a.columns, b.columns, atol=1e-3) and torch.allclose(
        a.spectrum, b.spectrum, rtol=1e-4
    )


@pytest.mark.parametrize("method", ["commuting", "four", "similar", "mean"])
def test_decoding_merged_heads_is_attention_with_fewer_heads(prepared, layout, method):
    """The dense definition of a model with h / t heads: merged keys are rotated as they are, and no head is
    ever expanded.
    """
    f = (
        WHOLE[method]
        .fit(*prepared(layout=layout), RANKS, 0)
        .at(16 // WHOLE[method].group_of(4), 16 // WHOLE[method].group_of(4))
    )
    model, maps = attached("llama"), dict.fromkeys(range(3), f)
    ours = feed(model, ROWS, pico.lowrank(model, maps, layout), splits=[9] + [1] * 11)
    assert torch.allclose(ours, gqa_logits(f), atol=5e-5)


@torch.no_grad()
def gqa_logits(f):
    """The pico llama with every attention written out, head after head, over the merged heads of `f`."""
    model = stock("llama")
    cos, sin = families.rope(model, 0)(torch.arange(LENGTH).unsqueeze(0), torch.empty(0))
    hidden = model.model.embed_tokens(ROWS)
    order = range(4) if f.order is None else f.order.tolist()
    for block in model.model.layers:
        x, a = block.input_layernorm(hidden), block.self_attn
        q, k, v = (p(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        t, outs = 4 // len(f.k_down), [None] * 8
        for place, head in enumerate(order):
            group, members = place // t, [order[i] for i in range(place // t * t, place // t * t + t)]
            key = sum(
                k[:, m] @ f.k_down[group][i * HEAD_DIM : (i + 1) * HEAD_DIM] for i, m in enumerate(members)
            )
            value = sum(
                v[:, m] @ f.v_down[group][i * HEAD_DIM : (i + 1) * HEAD_DIM] for i, m in enumerate(members)
            )
            for own in (2 * head, 2 * head + 1):
                query = rotate(q[:, own] @ f.k_up[place].mT, cos[0], sin[0])
                scores = query @ rotate(key, cos[0], sin[0]).mT * HEAD_DIM**-0.5
                weights = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf).softmax(
                    -1
                )
                outs[own] = weights @ value @ f.v_up[place]
        hidden = hidden + a.o_proj(torch.cat(outs, -1))
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))


@pytest.fixture(scope="module")
def lopsided():
    """A model whose attention reads inputs of very different scales, which its weights do not show."""
    model = pico.build("llama-mha")
    for block in families.decoder_layers(model):
        block.input_layernorm.weight.data = torch.logspace(-1.5, 1, pico.HIDDEN)[torch.randperm(pico.HIDDEN)]
    return data(attach(model))


@pytest.mark.parametrize("keys", ["layer", "grouped", "commuting"])
def test_activations_tell_far_more_than_weights(lopsided, keys):
    """At half the heads; the paper's 13.6 against 808 (perplexity of LLaMA-2 7B before training)."""
    stats, probe = lopsided
    ours, weights = (
        KVHeadSVD(keys=keys, basis=basis).fit(stats, probe, [8, 16], 0)
        for basis in ("activations", "weights")
    )
    losses = [
        1 - kept(stats.values, block_diagonal(b.values.at(8)[0])) / float(stats.values.trace())
        for b in (ours, weights)
    ]
    assert losses[0] < 0.4 * losses[1]
    losses = [
        1 - kept(stats.keys_post, block_diagonal(b.keys.at(8)[0])) / float(stats.keys_post.trace())
        for b in (ours, weights)
    ]
    assert losses[0] < 0.8 * losses[1]
    assert probe.held_out_error(ours.at(8, 8)) < 0.85 * probe.held_out_error(weights.at(8, 8))


def block_diagonal(maps):
    return torch.block_diag(*maps)


def test_weight_moments_are_those_of_white_inputs(prepared, layout):
    """Slow: every unit input is a token of its own, at every position; the bias is one more input of 1."""
    model = pico.build("qwen2")
    for block in families.decoder_layers(model):
        block.self_attn.k_proj.bias.data.normal_(generator=torch.Generator().manual_seed(0))
    stats, probe = data(attach(model), layout)
    a = families.decoder_layers(model)[LAYER].self_attn
    keys = (
        torch.cat([a.k_proj.weight.detach().mT, a.k_proj.bias.detach().unsqueeze(0)])
        .double()
        .unflatten(1, (2, HEAD_DIM))
    )
    cos, sin = (
        x[0, 0].double()
        for x in families.rope(model, LAYER)(torch.arange(LENGTH).unsqueeze(0), torch.empty(0))
    )
    moment = torch.zeros(32, 32, dtype=torch.float64)
    for c, s in zip(cos, sin, strict=True):
        x = (
            keys
            if layout == "pre_rope"
            else rotate(keys.transpose(0, 1), c.expand(len(keys), -1), s.expand(len(keys), -1)).transpose(
                0, 1
            )
        )
        moment += x.flatten(1).mT @ x.flatten(1) / LENGTH
    basis = KVHeadSVD(keys="grouped", basis="weights").fit(stats, probe, RANKS, 0).keys
    energy = np.linalg.eigvalsh(moment.numpy())[::-1].copy()
    assert np.allclose(basis.spectrum[0].numpy(), energy.reshape(16, 2).sum(1), rtol=1e-5, atol=1e-5)
    assert math.isclose(kept(moment, basis.at(8)[0][0]), energy[:16].sum(), rel_tol=1e-5)


def test_the_mean_of_a_group_is_what_mean_pooling_keeps(prepared):
    f = KVHeadSVD(basis="mean").fit(*prepared(), RANKS, 0).at(8, 8)
    keys = seen()["keys_post"].float()
    latent = keys.unflatten(1, (2, 2)).flatten(2).transpose(0, 1) @ f.k_down
    assert torch.allclose(latent / 2**0.5, keys.unflatten(1, (2, 2)).mean(2).transpose(0, 1), atol=1e-5)
    rebuilt = latent[:, :, None] @ f.k_up.unflatten(0, (2, 2)).transpose(1, 2).flatten(2)[:, None]
    assert torch.allclose(
        rebuilt.squeeze(2)[..., :HEAD_DIM], keys.unflatten(1, (2, 2)).mean(2).transpose(0, 1), atol=1e-5
    )


@given(st.integers(1, 9))
def test_cosines_are_orthonormal_and_start_with_the_mean(t):
    found = cosine_transform(t)
    assert torch.allclose(found.mT @ found, torch.eye(t, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(found[:, 0], torch.full((t,), t**-0.5, dtype=torch.float64))


# -- which heads are grouped


def test_similar_heads_find_one_another():
    """Heads 0 and 3, and 1 and 2, carry the same numbers in other coordinates."""
    model = pico.build("llama")
    for block in families.decoder_layers(model):
        a = block.self_attn
        for linear, turns in (
            (a.k_proj, lambda i: random_commuting(1, HEAD_DIM, HEAD_DIM, i)),
            (a.v_proj, lambda i: random_turn(i)),
        ):
            heads = linear.weight.data.view(4, HEAD_DIM, -1)
            heads[3], heads[2] = turns(0).float() @ heads[0], turns(1).float() @ heads[1]
    stats, probe = data(attach(model))
    for form in ("layer", "grouped", "commuting"):
        similar, apart = (
            KVHeadSVD(keys=form, heads=how).fit(stats, probe, [8, 16], 0)
            for how in ("similar", "consecutive")
        )
        assert similar.order.tolist() == [0, 3, 1, 2]
        assert probe.held_out_error(similar.at(8, 8)) < 1e-4 < 0.02 < probe.held_out_error(apart.at(8, 8))


@given(st.sampled_from([(4, 2), (6, 2), (6, 3), (8, 4), (8, 2), (5, 1), (4, 4)]), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_no_exchange_of_heads_makes_the_groups_cheaper(shape, seed):
    h, t = shape
    cost = random(h, h, seed=seed).abs()
    cost = (cost + cost.mT).fill_diagonal_(0)
    order = cheapest_groups(cost, t).tolist()
    assert sorted(order) == list(range(h))

    def total(heads):
        return sum(
            float(cost[a, b]) for i in range(0, h, t) for a, b in itertools.combinations(heads[i : i + t], 2)
        )

    assert total(order) <= total(range(h)) + 1e-12
    for i, j in itertools.combinations(range(h), 2):
        other = list(order)
        other[i], other[j] = other[j], other[i]
        assert total(other) >= total(order) - 1e-6


@pytest.mark.parametrize("form", ["joint", "commuting", "mean"])
def test_a_pair_costs_what_merging_it_loses(prepared, form):
    moment = prepared()[0].keys_post
    cost = pair_losses(moment, 4, form, HEAD_DIM)
    assert torch.equal(cost, cost.mT) and not cost.diagonal().any()
    keys = seen()["keys_post"]
    for i, j in itertools.combinations(range(4), 2):
        a, b, q = keys[:, i], keys[:, j], HEAD_DIM // 2
        if form == "joint":
            lost = tail(torch.cat([a, b], 1), HEAD_DIM)
        elif form == "mean":
            lost = float((a - b).square().sum()) / 2
        else:
            pairs = torch.stack([torch.complex(x[:, :q], x[:, q:]) for x in (a, b)], 1).numpy()
            lost = sum(np.linalg.svd(pairs[:, :, f], compute_uv=False)[1] ** 2 for f in range(q))
        assert math.isclose(float(cost[i, j]), lost, rel_tol=1e-3)


# -- which ranks, and refusals


def test_whole_heads_are_removed_unless_any_rank_is_asked_for():
    ranks = [2, 4, 6, 8, 10, 12, 14, 16]
    assert KVHeadSVD().candidates(4, 16, ranks) == [8, 16]
    assert KVHeadSVD(4).candidates(4, 16, ranks) == [4, 8, 12, 16]
    assert KVHeadSVD(3).candidates(6, 16, [5, 6, 11, 12, 16]) == [6, 11, 16], (
        "a third of a head is 16/3 channels of each"
    )
    assert [KVHeadSVD(3).numbers_per_token(r, 6, 16) for r in (6, 11, 16)] == [2 * 16, 4 * 16, 6 * 16], (
        "which is what they take"
    )
    assert KVHeadSVD(whole=False).candidates(4, 16, ranks) == ranks
    assert KVHeadSVD(keys="commuting", whole=False).candidates(4, 16, ranks) == [8, 16]


def test_virtual_heads_come_whole():
    ranks = [2, 4, 6, 8, 10, 12, 14, 16]
    assert MEA().candidates(4, 16, ranks) == [4, 8, 12, 16]
    assert MEA().candidates(8, 16, ranks) == ranks
    assert MEA().candidates(1, 16, ranks) == [16]
    assert MEA().candidates(5, 16, list(range(1, 17))) == [4, 7, 10, 13, 16]
    assert [MEA().numbers_per_token(r, 5, 16) for r in (4, 7, 10, 13, 16)] == [16, 32, 48, 64, 80]


@pytest.mark.parametrize("group", [3, 8])
def test_groups_that_do_not_divide_are_refused_with_divisors(prepared, group):
    with pytest.raises(LowkeyError, match=rf"^group {group}: .* 4 KV heads; choose one of 2, 4$"):
        KVHeadSVD(group).fit(*prepared(), RANKS, 0)
    with pytest.raises(LowkeyError, match=rf"^group {group}: "):
        KVHeadSVD(group).candidates(4, 16, RANKS)


@pytest.mark.parametrize("method", [MEA("weights"), KVHeadSVD(basis="weights")])
@pytest.mark.parametrize("name", ["qwen3", "olmo2"])
def test_weights_say_nothing_of_keys_that_are_normed(prepared, method, name):
    with pytest.raises(LowkeyError, match=r"basis 'weights': .* use basis 'activations'") as refusal:
        method.fit(*prepared(name), [8, 16], 0)
    assert "\n" not in str(refusal.value)
