"""ReCalKV against explicit matrices: groups of similar heads, and the calibration of values."""

from __future__ import annotations

from functools import cache

import numpy as np
import pico
import pytest
import torch
from closed_forms import (
    HELD,
    LAYER,
    RANKS,
    ROWS,
    fitted,
    joint_rows,
    model_of,
    prepared,
    rebuilt,
    recorded,
    statistics_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import HEAD_DIM
from torch import Tensor

import lowkey
from lowkey.cache.cache import cache_of
from lowkey.calibration.statistics import gather_statistics
from lowkey.core.head_groups import side_by_side
from lowkey.core.types import head_blocks
from lowkey.methods import CalibrationContext, Palu, ReCalKV
from lowkey.methods import recalkv as recal
from lowkey.models import families
from lowkey.models.projections import projections
from lowkey.ops.products import reorder_heads
from lowkey.probes.layer_inputs import first_inputs, layer_inputs
from lowkey.probes.layer_probe import LayerProbe, LowRankReconstruction
from lowkey.storage.reconstruction import ReconstructionLayer

# -- ReCalKV


def slow_cka(x: Tensor, y: Tensor) -> float:
    """From the centred D x D Gram matrices, entry by entry."""
    n = len(x)
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    a, b = (centring @ (z @ z.mT) @ centring for z in (x, y))

    def hsic(p: Tensor, q: Tensor) -> float:
        return sum(float(p[i, j] * q[j, i]) for i in range(n) for j in range(n))

    return hsic(a, b) / (hsic(a, a) * hsic(b, b)) ** 0.5


def test_similarity_is_the_cka_of_whitened_weights():
    statistics, probe = prepared("llama", "pre_rope")
    weights = projections(probe.model, LAYER).k
    blocks = recal.whitened(weights, statistics.inputs)
    found = recal.cka(blocks)
    for i in range(4):
        for j in range(i, 4):
            assert float(found[i, j]) == pytest.approx(slow_cka(blocks[i], blocks[j]), rel=1e-6)
            gram = weights[i].double() @ statistics.inputs @ weights[j].double().mT
            assert torch.allclose(
                blocks[i].mT @ blocks[j], gram, rtol=1e-6, atol=1e-6 * float(gram.abs().max())
            )
    assert torch.allclose(found.diagonal(), torch.ones(4, dtype=torch.float64)) and torch.allclose(
        found, found.mT
    )


@given(h=st.sampled_from([1, 2, 4, 6, 8, 12]), wanted=st.integers(1, 6), seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_heads_fall_into_groups_of_one_size(h, wanted, seed):
    t = max(t for t in range(1, min(h, wanted) + 1) if h % t == 0)
    likeness = torch.rand(h, h, generator=torch.Generator().manual_seed(seed))
    groups = recal.grouped_by_similarity(likeness + likeness.mT, t)
    assert sorted(i for g in groups for i in g) == list(range(h)) and {len(g) for g in groups} == {t}
    if t > 1 and h > 1:
        both = (likeness + likeness.mT).fill_diagonal_(-1)
        i, j = divmod(int(both.argmax()), h)
        assert any(i in g and j in g for g in groups), "the most similar pair stays together"
    order = recal.order_of(groups)
    if order is not None:
        places = [set(order[k : k + t].tolist()) for k in range(0, h, t)]
        assert sorted(order.tolist()) == list(range(h)) and all(set(g) in places for g in groups)


def twins() -> torch.nn.Module:
    """Keys of heads 2 and 3 are those of heads 1 and 0, turned."""
    model = pico.build("llama")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in families.decoder_layers(model):
            w = block.self_attn.k_proj.weight.unflatten(0, (4, HEAD_DIM))
            for a, b in ((1, 2), (0, 3)):
                turn = torch.linalg.qr(torch.randn(HEAD_DIM, HEAD_DIM, generator=generator)).Q
                w[b] = turn @ w[a]
    return lowkey.attach(model)


def test_heads_that_are_the_same_but_turned_share_a_latent():
    """And then half the rank serves both exactly."""
    model = twins()
    statistics = gather_statistics(model, ROWS[:-HELD].split(4))[LAYER]
    probe = LayerProbe.of(model, LAYER, "pre_rope", dict(layer_inputs(model, ROWS, 4))[LAYER], HELD)
    bases = ReCalKV(group=2).fit(statistics, probe, RANKS, 0)
    assert bases.order.tolist() == [0, 3, 1, 2]
    neighbours = Palu(group=2).fit(statistics, probe, RANKS, 0)
    assert probe.held_out_error(bases.at(8, 16)) < 1e-5 < 1e-2 < probe.held_out_error(neighbours.at(8, 16))


def test_reordering_a_joint_moment_is_reordering_the_rows():
    x, order = torch.randn(9, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 0, 3, 1])
    moved = x.unflatten(1, (4, 3))[:, order].flatten(1)
    assert torch.allclose(reorder_heads(x.mT @ x, order, 4), moved.mT @ moved, atol=1e-5)


def test_reordered_keys_and_values_are_those_of_their_own_heads(layout):
    """With biases, at a rank that loses something: the order must be the same for maps and data, of keys and
    of values.
    """
    statistics, _ = prepared("qwen2", layout)
    bases, seen = fitted("recalkv-2", "qwen2", layout), recorded("qwen2", layout)
    assert bases.order is not None
    for side in ("keys", "values"):
        x, basis = joint_rows(seen[side]), getattr(bases, side)
        moved = x.unflatten(1, (4, HEAD_DIM))[:, bases.order].flatten(1)
        parts = moved.split(basis.merge * HEAD_DIM, 1)
        best = sum(
            float((np.linalg.svd(p.numpy(), compute_uv=False)[4 * basis.merge :] ** 2).sum()) for p in parts
        )
        assert float((x - rebuilt(x, basis, 4, bases.order)).square().sum()) == pytest.approx(best, rel=1e-4)
    assert torch.allclose(
        head_blocks(statistics.values, 4),
        head_blocks(reorder_heads(statistics.values, bases.order, 4), 4)[bases.order.argsort()],
    )


# -- ReCalKV: calibration of values


@cache
def context(name: str, layout: str) -> CalibrationContext:
    return CalibrationContext(model_of(name), ROWS, HELD, layout, RANKS, 0)


@cache
def calibrated(
    name: str, layout: str, iterations: int = 1, method: str = "recalkv-2", ranks: tuple[int, int] = (6, 5)
):
    """(factors before, after)"""
    start = {
        i: fitted(method, name, layout, i).at(*ranks) for i in families.geometry(model_of(name)).compressible
    }
    return start, ReCalKV(group=2, iterations=iterations).finish(start, context(name, layout))


@torch.no_grad()
def stream(name: str, layout: str, factors) -> dict[int, Tensor]:
    """Inputs of every layer's projections (n, D) in the whole model, each layer with its factors, over the
    fitting windows.
    """
    model = model_of(name)
    past = cache_of(
        model,
        lambda i: ReconstructionLayer(LowRankReconstruction(factors[i], layout, families.rope(model, i))),
    )
    hidden = model(ROWS[:-HELD], past_key_values=past, output_hidden_states=True).hidden_states
    return {i: families.attention_input(model, i, hidden[i]).flatten(0, 1).double() for i in factors}


def values_of(name: str, layer: int, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs with a 1 where there is a bias, and the weights (D, h d) that make values of them."""
    linear = families.decoder_layers(model_of(name))[layer].self_attn.v_proj
    w = linear.weight.detach().double().mT
    if linear.bias is None:
        return inputs, w
    return torch.cat([inputs, torch.ones(len(inputs), 1)], 1), torch.cat(
        [w, linear.bias.detach().double().unsqueeze(0)]
    )


def value_map(f) -> Tensor:
    """(h d, h d), heads in the model's order."""
    m = f.v_down[0].double() @ side_by_side(f.v_up, f.merge[1])[0].double()
    h = m.shape[0] // HEAD_DIM
    back = torch.arange(h) if f.order is None else f.order.argsort()
    return m.unflatten(0, (h, -1))[back].flatten(0, 1).unflatten(1, (h, -1))[:, back].flatten(1)


@pytest.mark.defines("methods", "recalkv")
@pytest.mark.parametrize("name", ["llama", "llama-mha", "qwen2", "qwen3", "gemma2"])
def test_calibration_is_the_papers_alternating_least_squares(name, layout):
    """R^T = W L^+ and L by least squares, from explicit inputs and weights; and it never raises the error."""
    start, found = calibrated(name, layout)
    for i, x in stream(name, layout, found).items():
        x, w = values_of(name, i, x)
        v = x @ w
        # any R^T with the start's column space: its own L is made by the least squares
        r = w @ value_map(start[i])
        up = torch.linalg.pinv(x @ r, rtol=1e-6) @ v
        expected = x @ (w @ torch.linalg.pinv(up, rtol=1e-6)) @ up
        assert torch.allclose(v @ value_map(found[i]), expected, atol=2e-3 * float(v.abs().max()))
        before, after = (float((v - v @ value_map(f[i])).norm()) for f in (start, found))
        assert after <= before * (1 + 1e-6)
        if i > min(found):
            assert after < before * (1 - 1e-5), "the stream is another one"


def test_keys_are_left_as_they_are(layout):
    start, found = calibrated("llama-mha", layout)
    for i, f in found.items():
        assert (
            torch.equal(f.k_down, start[i].k_down)
            and torch.equal(f.k_up, start[i].k_up)
            and torch.equal(f.order, start[i].order)
        )
        assert f.ranks == start[i].ranks == (6, 5) and f.v_up.shape == start[i].v_up.shape
        assert bool((f.v_down.gather(-2, f.v_down.abs().argmax(-2, keepdim=True)) > 0).all()), (
            "signs are settled"
        )


def test_whitened_svd_is_optimal_on_the_uncompressed_stream():
    """The first layer's inputs are embeddings, which nothing has touched; and so are the others' when keys
    and values pass unharmed.
    """
    start, found = calibrated("qwen2", "pre_rope")
    assert torch.allclose(value_map(found[0]), value_map(start[0]), atol=1e-4)
    for i, statistics in statistics_of("qwen2").items():
        f = fitted("recalkv-2", "qwen2", "pre_rope", i).at(6, 5)
        again = recal.calibrated(f, statistics.values, 3)
        assert torch.allclose(value_map(again), value_map(f), atol=1e-4)


def test_many_rounds_end_at_pca_of_the_values_in_the_stream():
    start, found = calibrated("llama-mha", "pre_rope", iterations=200)
    for i, x in stream("llama-mha", "pre_rope", found).items():
        x, w = values_of("llama-mha", i, x)
        v = x @ w
        best = float(np.sqrt((np.linalg.svd(v.numpy(), compute_uv=False)[8 * 5 :] ** 2).sum()))
        once = float((v - v @ value_map(start[i])).norm())
        assert float((v - v @ value_map(found[i])).norm()) == pytest.approx(
            best, rel=1e-3
        ) and best <= once * (1 + 1e-6)


def test_full_rank_needs_no_calibration_and_none_is_none():
    start, found = calibrated("llama", "pre_rope", ranks=(6, 16))
    assert all(found[i] is start[i] for i in start)
    start, found = calibrated("llama", "pre_rope", iterations=0)
    assert all(torch.equal(found[i].v_down, start[i].v_down) for i in start)


def test_calibration_leaves_the_model_alone():
    model = model_of("llama-mha")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    calibrated.__wrapped__("llama-mha", "pre_rope")
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_stream_starts_where_the_first_layer_does(name):
    model = model_of(name)
    with torch.no_grad():
        expected = model(ROWS, output_hidden_states=True).hidden_states[0]
    assert torch.equal(first_inputs(model, ROWS, 3), expected)
