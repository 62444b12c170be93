"""KV-Latent: which channels are kept, and that rotation stays exact on them."""

from __future__ import annotations

import itertools
import math

import pico
import pytest
import torch
from fitted_methods import HELD, RANKS, ROWS, TEXT, prepared
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import HEAD_DIM, attached, feed, prompt, stock
from statistics_by_hand import activations

import lowkey
from lowkey import Sample
from lowkey.allocation.rank_grid import grid, multiples
from lowkey.calibration.recover import Recovery, recover
from lowkey.core.types import Basis, LowkeyError, head_blocks
from lowkey.methods import CalibrationContext, KVLatent, kvlatent
from lowkey.methods.kvlatent import (
    best_pairs,
    bit_reversed,
    evenly_spaced,
    nested_channels,
    strided_channels,
    strided_pairs,
)
from lowkey.models import families
from lowkey.models.attention_interface import Call
from lowkey.ops.rope import rotate
from lowkey.plan.plan import Plan
from lowkey.storage.codec import LowRank
from lowkey.storage.coded import CodedLayer

VARIANTS = {
    "stride": KVLatent(),
    "data": KVLatent(choose="data"),
    "pca": KVLatent(choose="data", values="pca"),
}


def channels(down: torch.Tensor) -> list[list[int]]:
    """Per head which channels the columns of a selection (h|1, d, r) pick, in their order; nothing else may
    be in it.
    """
    assert set(down.unique().tolist()) <= {0.0, 1.0} and bool((down.sum(1) == 1).all())
    return down.argmax(1).tolist()


def partners(turning: int, chosen: list[int]) -> bool:
    """Whether every rotary channel has come with its partner."""
    half = turning // 2
    return all((c + half if c < half else c - half) in chosen for c in chosen if c < turning)


def frequencies(d: int, theta: float = 10000.0) -> torch.Tensor:
    """Of the standard rotary embedding of dimension d."""
    return torch.tensor([theta ** (-2 * j / d) for j in range(d // 2)])


# -- strides


@pytest.mark.defines("methods", "kv-latent")
@pytest.mark.parametrize("d", [16, 24, 48, 64, 96, 128])
def test_a_stride_keeps_the_papers_channels_and_frequencies(d):
    """arXiv:2507.11273, Eq. 5 and appendix C: every s-th channel; and its pairs turn as those of a rotary
    embedding of dimension d/s.
    """
    strides = [s for s in range(2, d // 2 + 1) if (d // 2) % s == 0]
    basis = strided_pairs(d, d, [d // s for s in strides])
    for s in strides:
        (kept,) = channels(basis.at(d // s)[0])
        assert set(kept) == set(range(0, d, s)) and partners(d, kept)
        first = sorted(c for c in kept if c < d // 2)
        assert torch.allclose(frequencies(d)[first], frequencies(d // s))


@pytest.mark.parametrize(("name", "s"), [("llama", 2), ("llama", 4), ("qwen3", 2), ("gemma2", 4)])
def test_the_models_own_rotary_embedding_says_the_same(name, s):
    """Angles of the kept channels are those of a model whose heads have the smaller dimension."""
    positions = torch.arange(300).unsqueeze(0)
    (kept,) = channels(strided_pairs(HEAD_DIM, HEAD_DIM, [HEAD_DIM // s]).at(HEAD_DIM // s)[0])
    ours = [x[0, 0][:, sorted(kept)] for x in families.rope(attached(name), 1)(positions, torch.empty(0))]
    small = pico.build(name, head_dim=HEAD_DIM // s)
    angles = [x[0, 0] for x in families.rope(small, 1)(positions, torch.empty(0))]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, angles, strict=True))


@settings(max_examples=60, deadline=None)
@given(half=st.integers(1, 40), rest=st.integers(0, 40), seed=st.integers(0, 9))
def test_every_even_rank_keeps_whole_pairs(half, rest, seed):
    d, turning = 2 * half + rest, 2 * half
    ranks = [*range(2, d, 2), d]
    draw = torch.Generator().manual_seed(seed)
    chosen = [strided_pairs(d, turning, []), strided_pairs(d, turning, ranks)]
    chosen.append(best_pairs(*(torch.diag_embed(torch.rand(1, d, generator=draw)) for _ in "kq"), turning))
    for basis in chosen:
        assert sorted(channels(basis.columns)[0]) == list(range(d))
        for r in ranks:
            (kept,) = channels(basis.at(r)[0])
            assert len(set(kept)) == r and partners(turning, kept)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 70), count=st.integers(0, 70))
def test_evenly_spaced_channels(n, count):
    kept = evenly_spaced(n, min(n, count)).tolist()
    gaps = {b - a for a, b in zip(kept, [*kept[1:], n], strict=True)} if kept else set()
    assert (len(set(kept)) == min(n, count) and not gaps) or max(gaps) - min(gaps) <= 1
    assert sorted(bit_reversed(n)) == list(range(n))
    for i in range(n.bit_length()):
        multiples = list(range(0, n, 1 << i))
        assert sorted(bit_reversed(n)[: len(multiples)]) == multiples


def test_only_ranks_that_are_not_nested_are_held_alone():
    basis = strided_pairs(96, 96, [24, 32, 48, 96])
    assert [r for r, _ in basis.exact] == [32], "stride 3 is no part of stride 2"
    assert [r for r, _ in strided_pairs(128, 128, list(range(16, 129, 16))).exact] == [48, 80]


@pytest.mark.parametrize("rank", [4, 6, 8, 12])
def test_partial_rotary_keeps_both_channel_kinds_in_proportion(rank):
    kept = strided_channels(16, 8, rank).tolist()
    assert abs(sum(c < 8 for c in kept) - rank / 2) <= 1 and kept == sorted(kept)
    assert set(nested_channels(16, 8)[:8].tolist()) == {0, 2, 4, 6, 8, 10, 12, 14}


@pytest.mark.parametrize(("name", "width"), [("llama", 16), ("phi3-partial", 8), ("gemma3_text", 16)])
def test_the_width_of_the_rotary_embedding_is_the_models(name, width):
    layer = families.geometry(attached(name)).compressible[0]
    assert prepared(name, "post_rope", layer)[1].rotary_dim == width


# -- exactness


@pytest.mark.parametrize("method", VARIANTS)
def test_selection_commutes_with_rotation(method):
    """What is kept of a rotated key is the rotated form of what is kept."""
    bases = VARIANTS[method].fit(*prepared("llama", "post_rope", 1), RANKS, 0)
    rope, x = (
        families.rope(attached("llama"), 1),
        torch.randn(2, 4, 30, HEAD_DIM, generator=torch.Generator().manual_seed(0)),
    )
    cos, sin = rope(torch.arange(30).unsqueeze(0), x)
    for r in RANKS:
        down, up = bases.keys.at(r)
        assert torch.allclose(rotate(x, cos, sin) @ down @ up, rotate(x @ down @ up, cos, sin), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi3-partial", "qwen3"])
@pytest.mark.parametrize("method", VARIANTS)
def test_both_layouts_give_the_same_logits(method, name):
    model, ids = attached(name), prompt(24)
    found = []
    for layout in ("post_rope", "pre_rope"):
        bases = VARIANTS[method].fit(*prepared(name, layout, 1), [8, 16], 0)
        found.append(feed(model, ids, pico.lowrank(model, {i: bases.at(8, 8) for i in range(3)}, layout)))
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize("method", VARIANTS)
def test_scores_depend_on_relative_positions_alone(method):
    """At even ranks; half a pair does not, which is why they are the only candidates."""
    bases = VARIANTS[method].fit(*prepared("llama", "post_rope", 1), RANKS, 0)
    rope, draw = families.rope(attached("llama"), 1), torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 4, 1, HEAD_DIM, generator=draw) for _ in "qk")

    def score(rank, at):
        down, up = bases.keys.at(rank)
        turned = [rotate(x, *rope(torch.tensor([[p]]), x)) for x, p in ((q, at + 5), (k, at))]
        return (turned[0] @ down @ up @ turned[1].mT).flatten()

    assert all(torch.allclose(score(r, 0), score(r, 40), atol=1e-4) for r in RANKS)
    assert not torch.allclose(score(5, 0), score(5, 40), atol=1e-2)


@pytest.mark.parametrize("method", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "phi3-partial", "gemma2", "llama-mqa"])
def test_full_rank_gives_the_stock_logits(name, method, layout):
    model, ids = attached(name), prompt(24)
    layers = families.geometry(model).compressible
    maps = {i: VARIANTS[method].fit(*prepared(name, layout, i), [8, 16], 0).at(16, 16) for i in layers}
    assert torch.allclose(
        feed(model, ids, pico.lowrank(model, maps, layout)), feed(stock(name), ids), atol=5e-5
    )


# -- choosing by data


@pytest.mark.parametrize("name", ["llama", "phi3-partial", "qwen3"])
def test_the_data_choice_is_that_of_a_loop_over_tokens(name, layout):
    stats, probe = prepared(name, layout, 1)
    basis = KVLatent(choose="data").fit(stats, probe, RANKS, 0).keys
    seen, turning = activations(name, 1, ROWS[:-HELD]), probe.rotary_dim
    keys, queries = seen["keys_pre"], seen["queries_pre"]
    groups, half = queries.shape[1] // keys.shape[1], turning // 2
    for h, order in enumerate(channels(basis.columns)):
        scores = {}
        for j in range(half):
            rms_k = sum(float(k[h, j] ** 2 + k[h, j + half] ** 2) for k in keys) ** 0.5
            own = [q[i] for q in queries for i in range(h * groups, (h + 1) * groups)]
            scores[j] = rms_k * sum(float(q[j] ** 2 + q[j + half] ** 2) for q in own) ** 0.5
        found = [c for c in order if c < half]
        ranked = [scores[j] for j in found]
        assert sorted(found) == list(range(half)) and all(
            a >= b * (1 - 1e-4) for a, b in itertools.pairwise(ranked)
        )


def test_two_channels_that_do_not_turn_weigh_as_much_as_a_pair():
    # pairs (0, 2) and (1, 3); the others are single
    keys = torch.tensor([4.0, 1, 4, 1, 9, 0.1, 0.2, 5]).diag().unsqueeze(0)
    (order,) = channels(best_pairs(keys, torch.eye(8).unsqueeze(0), 4).columns)
    assert order == [0, 2, 4, 7, 1, 3, 6, 5], "squared scores 8 * 2, 9 + 5, 2 * 2, 0.2 + 0.1"


def test_heads_choose_for_themselves():
    """A pair that only one head uses."""
    keys = torch.ones(2, 8).diag_embed()
    keys[0, 1, 1] = keys[1, 3, 3] = 50.0
    first = [set(order[:2]) for order in channels(best_pairs(keys, torch.ones(2, 8).diag_embed(), 8).columns)]
    assert first == [{1, 5}, {3, 7}]


def test_data_loses_less_of_the_scores_than_stride():
    """Squared error of q . k over all pairs of calibration queries and keys, summed over heads."""
    stats, probe = prepared("llama", "post_rope", 1)
    k, q = stats.keys("post_rope"), stats.queries("post_rope")

    def error(choose):
        down, up = KVLatent(choose=choose).fit(stats, probe, RANKS, 0).keys.at(8)
        rest = torch.eye(HEAD_DIM).double() - (down @ up).double()
        return float((rest @ k @ rest.mT @ q).diagonal(dim1=1, dim2=2).sum())

    assert error("data") < error("stride")


# -- values


def error_of(basis: Basis, moment: torch.Tensor, rank: int) -> float:
    down, up = (m.double() for m in basis.at(rank))
    rest = torch.eye(HEAD_DIM).double() - down @ up
    return float((rest.mT @ moment @ rest).diagonal(dim1=1, dim2=2).sum())


@pytest.mark.parametrize("rank", [4, 8])
def test_pca_beats_strided_values_on_the_calibration_data(rank):
    stats, probe = prepared("llama", "post_rope", 1)
    moment = head_blocks(stats.values, stats.heads)
    strided, turned = (
        error_of(KVLatent(values=v).fit(stats, probe, RANKS, 0).values, moment, rank)
        for v in ("stride", "pca")
    )
    energies = torch.linalg.eigvalsh(moment)
    assert turned == pytest.approx(float(energies[:, : HEAD_DIM - rank].sum()), rel=1e-4)
    assert turned < 0.9 * strided


def test_strided_values_keep_every_sth_channel():
    values = KVLatent().fit(*prepared("llama", "post_rope", 1), RANKS, 0).values
    assert [sorted(*channels(values.at(r)[0])) for r in (4, 8)] == [
        list(range(0, 16, 4)),
        list(range(0, 16, 2)),
    ]


# -- candidates


def test_candidates_are_even():
    assert KVLatent().candidates(4, 72, multiples(72, 1)) == list(range(2, 73, 2))
    assert KVLatent(rope="aware").candidates(4, 72, multiples(72, 1)) == list(range(4, 73, 4))
    assert grid(8, KVLatent().candidates(4, 64, multiples(64, 1))) == list(range(8, 65, 8))
    assert KVLatent().candidates(4, 16, [3, 5, 16]) == [16], "the full rank is always one"


# -- frequency-aware rotation


def test_the_new_frequencies_are_those_of_the_paper():
    """d_qk = 64: exponents 16, 18, ..., 46, 48, 49, ..., 63 of 64."""
    exponents = -64 * torch.log(kvlatent.aware_frequencies(64, 10000.0)) / math.log(10000.0)
    assert torch.allclose(exponents, torch.tensor([*range(16, 48, 2), *range(48, 64)]).float(), atol=1e-3)
    assert all(len(kvlatent.aware_frequencies(r, 10000.0)) == r // 2 for r in range(4, 129, 4))


@pytest.fixture(scope="module")
def plans():
    """Half the channels in every layer, by frequencies of their own and by the model's."""
    made, sample = {}, Sample(8, 24)
    for how in ("aware", "kept"):
        method = KVLatent(rope=how)
        made[how] = lowkey.calibrate(
            attached("llama"),
            pico.tokenizer(),
            TEXT,
            method=method,
            budget="50%",
            sample=sample,
            rank_multiple=4,
            sinks=0,
            recent=0,
        )
    return made


def test_aware_plans_hold_as_much_and_come_back(plans, tmp_path):
    model, ids = attached("llama"), prompt(30)
    plans["aware"].save(tmp_path / "plan")
    plan, held = Plan.load(tmp_path / "plan", model), []
    assert torch.equal(plan.factors[1].frequencies, plans["aware"].factors[1].frequencies)
    for one in (plan, plans["kept"]):
        cache = lowkey.make_cache(model, plan=one)
        feed(model, ids, cache, [7, 0], [20, 1, 9])
        assert cache.nbytes() == cache.predicted_nbytes()
        held.append(cache.nbytes())
    assert held[0] == held[1]


@pytest.mark.parametrize("splits", [[30], [11, 1, 18], [1] * 30], ids=str)
def test_frequency_aware_attention_is_its_definition(plans, splits):
    """One layer by complex numbers: every kept pair turned back by the model's frequency and on by the new
    one, keys and queries alike.
    """
    model, f = attached("llama"), plans["aware"].factors[1]
    d, t, rank = HEAD_DIM, 30, f.ranks[0]
    g = torch.Generator().manual_seed(0)
    query, (keys, values) = torch.randn(2, 4, 2, t, d, generator=g), torch.randn(2, 2, 4, t, d, generator=g)
    layer, outs = CodedLayer(LowRank(f, "post_rope", families.rope(model, 1))), []
    for q, k, v in zip(*(x.split(splits, -2) for x in (query, keys, values)), strict=True):
        layer.update(k, v)
        outs.append(layer.attend(k, v, Call(q, None, None, 0.3, None)))
    theta = 10000.0 ** (-torch.arange(d // 2) * 2 / d)
    chosen = f.k_down[0].argmax(0)[: rank // 2]  # first members of the kept pairs
    assert torch.equal(f.k_down[0].argmax(0)[rank // 2 :], chosen + d // 2) and chosen.tolist() == sorted(
        chosen.tolist()
    )

    def turned(x):
        pairs = torch.complex(x[..., chosen], x[..., chosen + d // 2])
        angle = torch.arange(t).unsqueeze(1) * (f.frequencies - theta[chosen])
        return pairs * torch.polar(torch.ones_like(angle), angle)

    scores = (turned(query).conj() @ turned(keys).unsqueeze(2).mT).real * 0.3
    weights = scores.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    expected = weights @ (values @ f.v_down @ f.v_up).unsqueeze(2)
    assert torch.allclose(torch.cat(outs, 3), expected, atol=1e-5)


def test_aware_plans_can_be_trained_through(plans):
    how = Recovery((("distill", 6), ("ce", 6)), length=24, batch=2, lr=5e-3)
    found = recover(attached("llama"), pico.tokenizer(), plans["aware"], TEXT, settings=how)
    losses = [r["loss"] for r in found.losses]
    assert losses[5] < losses[0] and all(map(math.isfinite, losses))
    assert found.plan.factors[1].frequencies is not None


def test_aware_refuses_what_it_does_not_know():
    model = pico.build("llama", rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(LowkeyError, match="use rope=kept"):
        KVLatent(rope="aware").finish({}, CalibrationContext(model, ROWS, 1, "post_rope", [8, 16], 0))
