"""KQ-SVD, Palu, LoRC and ReCalKV against what they say they compute, from explicit matrices."""

from __future__ import annotations

import copy
import itertools
from functools import cache

import numpy as np
import pico
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import HEAD_DIM, feed, prompt
from torch import Tensor

import lowkey
from lowkey import Sample
from lowkey.cache.cache import cache_of
from lowkey.calibration.statistics import gather_statistics
from lowkey.core.head_groups import side_by_side
from lowkey.core.types import LowkeyError, head_blocks
from lowkey.methods import KQSVD, METHODS, CalibrationContext, LoRC, Palu, ReCalKV
from lowkey.methods import kqsvd as kq
from lowkey.methods import recalkv as recal
from lowkey.models import families
from lowkey.models.attention_interface import AttendingLayer, Incoming
from lowkey.ops.commuting import rotated_moment
from lowkey.ops.products import group_size, oblique_basis, reorder_heads
from lowkey.ops.rope import rotate
from lowkey.plan.plan import Plan
from lowkey.probes.layer_inputs import first_inputs, layer_inputs
from lowkey.probes.layer_probe import LayerProbe, LowRankReconstruction
from lowkey.storage.reconstruction import ReconstructionLayer

METHOD = {
    "kq-svd": KQSVD(),
    "kq-svd-averaged": KQSVD(outputs="averaged"),
    "kq-svd-weighted": KQSVD(weighting="outputs"),
    "kq-svd-4": KQSVD(group=4),
    "palu": Palu(),
    "palu-2": Palu(group=2),
    "lorc": LoRC(),
    "lorc-head": LoRC(scope="head"),
    "lorc-whitened": LoRC(whiten=True),
    "recalkv": ReCalKV(),
    "recalkv-2": ReCalKV(group=2),
}
DATA_FREE = ["lorc", "lorc-head"]
ON_DATA = ["palu", "palu-2", "lorc-whitened", "recalkv", "recalkv-2"]
MODELS = {
    "llama": {},
    "llama-mha": {},
    "llama-mqa": {},
    "qwen2": {"num_key_value_heads": 4},
    "qwen3": {},
    "gemma2": {},
    "phi3-partial": {},
}
RANKS = [4, 8, 16]
WINDOWS, HELD, LENGTH = 8, 2, 20
ROWS = prompt(LENGTH, batch=WINDOWS)
LAYER = 1
GROUPS = {"kq-svd-4": 4, "palu-2": 2, "recalkv-2": 2}
KV_HEADS = {name: families.geometry(pico.build(name, **MODELS[name])).kv_heads for name in MODELS}
SERVED = [
    (method, name)
    for method in METHOD
    for name in MODELS
    if (method not in DATA_FREE or name != "qwen3") and KV_HEADS[name] % GROUPS.get(method, 1) == 0
]


@cache
def model_of(name: str):
    """Biases are random, norms too."""
    model = pico.build(name, **MODELS[name])
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("_proj.bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=0.5, std=0.5, generator=generator)
    return lowkey.attach(model)


@cache
def exact_logits(name: str) -> Tensor:
    model = copy.deepcopy(model_of(name))
    model.set_attn_implementation("eager")
    return feed(model, ROWS)


@cache
def statistics_of(name: str):
    return gather_statistics(model_of(name), ROWS[:-HELD].split(4))


@cache
def prepared(name: str, layout: str, layer: int = LAYER):
    """(statistics, probe) of one layer, as calibration makes them."""
    model = model_of(name)
    return statistics_of(name)[layer], LayerProbe.of(
        model, layer, layout, dict(layer_inputs(model, ROWS, 4))[layer], HELD
    )


@cache
def fitted(method: str, name: str, layout: str, layer: int = LAYER):
    return METHOD[method].fit(*prepared(name, layout, layer), RANKS, 0)


class Recorder(AttendingLayer):
    """Keeps what a layer hands to its cache, and the query."""

    def update(self, keys, values):
        return (incoming := Incoming(self, keys, values)), incoming

    def attend(self, keys, values, call):
        self.keys, self.values, self.call = keys, values, call
        return torch.zeros_like(call.query[..., : values.shape[-1]])


@cache
def recorded(name: str, layout: str, layer: int = LAYER) -> dict[str, Tensor]:
    """(b, h, t, d) keys and values and (b, h, g, t, d) queries of the fitting windows, in fp64; keys and
    queries as the layout has them.
    """
    _, probe = prepared(name, layout, layer)
    seen = Recorder()
    with torch.no_grad():
        probe.run(probe.inputs[: probe.training_count], seen)
    keys, query = seen.keys, seen.call.query
    if layout == "pre_rope":
        cos, sin = probe.rope(torch.arange(LENGTH).unsqueeze(0), keys)
        keys, query = (
            rotate(x, cos if x is keys else cos.unsqueeze(1), -(sin if x is keys else sin.unsqueeze(1)))
            for x in (keys, query)
        )
    return {"keys": keys.double(), "values": seen.values.double(), "queries": query.double()}


def rows_of(x: Tensor) -> Tensor:
    """(b, h, t, d) -> (h, b t, d)"""
    return x.transpose(0, 1).flatten(1, 2)


def joint_rows(x: Tensor) -> Tensor:
    """(b, h, t, d) -> (b t, h d)"""
    return x.transpose(1, 2).flatten(0, 1).flatten(1)


def rebuilt(x: Tensor, basis, rank: int, order: Tensor | None = None) -> Tensor:
    """(b t, h d) through the maps of a rank, group by group; heads in their own order before and after."""
    down, up = (m.double() for m in basis.at(rank))
    h = x.shape[1] // HEAD_DIM
    order = torch.arange(h) if order is None else order
    heads = x.unflatten(1, (h, HEAD_DIM))[:, order]
    groups = heads.unflatten(1, (-1, basis.merge)).flatten(2)
    maps = (down @ side_by_side(up, basis.merge)).expand(groups.shape[1], -1, -1)
    out = torch.stack([groups[:, g] @ m for g, m in enumerate(maps)], 1)
    return out.unflatten(2, (basis.merge, HEAD_DIM)).flatten(1, 2)[:, order.argsort()].flatten(1)


# -- all of them


def test_all_are_registered():
    assert {METHODS[name] for name in ("kq-svd", "palu", "lorc", "recalkv")} == {
        type(m) for m in METHOD.values()
    }


@pytest.mark.parametrize(("method", "name"), SERVED)
def test_full_rank_gives_the_stock_logits(method, name, layout):
    model = model_of(name)
    full = families.geometry(model).compressible
    maps = {i: fitted(method, name, layout, i).at(HEAD_DIM, HEAD_DIM) for i in full}
    out, reference = feed(model, ROWS, pico.lowrank(model, maps, layout)), exact_logits(name)
    assert torch.allclose(out, reference, atol=1e-4), float((out - reference).abs().max())


@pytest.mark.parametrize("name", ["llama", "llama-mha", "qwen2"])
@pytest.mark.parametrize("method", METHOD)
def test_lower_ranks_cost_the_bytes_that_were_predicted(method, name, layout):
    model = model_of(name)
    past = pico.lowrank(
        model, {i: fitted(method, name, layout, i).at(4, 8) for i in range(pico.LAYERS)}, layout
    )
    feed(model, ROWS[:2], past, splits=[13, 1, 6])
    heads, offsets = families.geometry(model).kv_heads, 2 * 2 * 8 * pico.LAYERS
    assert (
        past.nbytes() == past.predicted_nbytes() == 2 * LENGTH * heads * (4 + 8) * 4 * pico.LAYERS + offsets
    )


@pytest.mark.parametrize("method", METHOD)
def test_a_smaller_rank_has_a_larger_error(method, layout):
    _, probe = prepared("llama", layout)
    bases = fitted(method, "llama", layout)
    full, half, least = (probe.held_out_error(bases.at(r, r)) for r in (16, 8, 4))
    assert full < 1e-5 < half < least < 1


@pytest.mark.parametrize("method", METHOD)
def test_fitting_again_gives_the_same(method, layout):
    first, again = fitted(method, "llama", layout), METHOD[method].fit(*prepared("llama", layout), RANKS, 0)
    for a, b in ((first.keys, again.keys), (first.values, again.values)):
        assert all(torch.equal(x, y) for x, y in zip(a.at(8), b.at(8), strict=True)) and torch.equal(
            a.spectrum, b.spectrum
        )


@pytest.mark.parametrize("method", METHOD)
def test_signs_are_settled(method):
    """A solver may turn any column round; the largest entry of each is positive."""
    bases = fitted(method, "llama", "pre_rope")
    for basis in (bases.keys, bases.values):
        largest = basis.columns.gather(-2, basis.columns.abs().argmax(-2, keepdim=True))
        assert bool((largest > 0).all())


@pytest.mark.parametrize("method", METHOD)
def test_spectra_have_one_energy_per_rank_and_fall(method, layout):
    bases = fitted(method, "llama-mha", layout)
    for basis in (bases.keys, bases.values):
        assert basis.spectrum.shape == (8 // basis.merge, HEAD_DIM)
        assert bool((basis.spectrum.diff(dim=-1) <= 1e-9 * basis.spectrum.amax()).all()) and bool(
            (basis.spectrum >= 0).all()
        )


@pytest.mark.parametrize("method", ON_DATA)
def test_the_spectrum_past_a_rank_is_the_error_on_the_calibration_data(method):
    bases, seen = fitted(method, "llama-mha", "pre_rope"), recorded("llama-mha", "pre_rope")
    for basis, name in ((bases.keys, "keys"), (bases.values, "values")):
        x = joint_rows(seen[name])
        error = (x - rebuilt(x, basis, 4, bases.order)).square().sum()
        assert torch.allclose(error, basis.spectrum[:, 4:].sum(), rtol=1e-4)


@pytest.mark.parametrize("name", ["palu", "lorc", "recalkv", "kq-svd"])
def test_a_plan_comes_out_saves_and_runs(tmp_path, name):
    model, chars = model_of("llama-mha"), "".join(chr(32 + (i * i + 7 * i) % 95) for i in range(900))
    plan = lowkey.calibrate(
        model, pico.tokenizer(), chars, method=METHODS[name](), budget="50%", sample=Sample(8, 24, batch=4)
    )
    assert plan.layout == METHODS[name].layout and plan.allocator["name"] == METHODS[name].allocator
    plan.save(tmp_path)
    past = lowkey.make_cache(model, plan=Plan.load(tmp_path, model))
    feed(model, ROWS, past, splits=[15, 1, 4])
    assert past.nbytes() == past.predicted_nbytes()


@given(heads=st.integers(1, 40))
def test_the_usual_group_is_lowered_to_the_largest_divisor(heads):
    t = group_size(heads, 4, 4)
    assert heads % t == 0 and t <= 4 and not any(heads % u == 0 for u in range(t + 1, min(4, heads) + 1))


@given(heads=st.integers(1, 40), wanted=st.integers(-2, 50))
def test_any_other_group_divides_the_heads_or_is_refused_with_the_divisors(heads, wanted):
    if wanted >= 1 and heads % wanted == 0:
        assert group_size(heads, wanted) == wanted
        return
    with pytest.raises(
        LowkeyError, match=f"group {wanted}: must divide the model's {heads} KV heads; choose one of 1(, |$)"
    ):
        group_size(heads, wanted)


@pytest.mark.parametrize(
    ("kind", "group"),
    [
        *((kind, group) for kind in (Palu, ReCalKV, KQSVD) for group in (3, 8)),
        (Palu, 0),
        (ReCalKV, 0),
        (KQSVD, -1),
    ],
)
def test_a_group_that_does_not_divide_the_heads_is_refused_before_anything_is_read(kind, group):
    with pytest.raises(LowkeyError, match=f"group {group}"):
        lowkey.calibrate(model_of("llama"), None, "", method=kind(group=group))


# -- KQ-SVD


def product_error(k: Tensor, q: Tensor, projector: Tensor) -> float:
    return float((k @ q.mT - k @ projector @ q.mT).norm())


def projector_of(basis, rank: int, head: int) -> Tensor:
    down, up = basis.at(rank)
    return down[head].double() @ up[head].double()


@pytest.mark.defines("methods", "kq-svd")
@pytest.mark.parametrize("rank", [1, 4, 8, 15])
def test_the_product_of_keys_and_queries_is_the_best_there_is(layout, rank):
    """The optimum is the truncated SVD of K Q^T itself; nothing else does better."""
    seen, basis = recorded("llama", layout), fitted("kq-svd", "llama", layout).keys
    generator = torch.Generator().manual_seed(0)
    for head, k in enumerate(rows_of(seen["keys"])):
        q = seen["queries"][:, head].transpose(0, 1).flatten(0, 2)
        ours = product_error(k, q, projector_of(basis, rank, head))
        optimum = np.linalg.svd((k @ q.mT).numpy(), compute_uv=False)
        assert ours == pytest.approx(float(np.sqrt((optimum[rank:] ** 2).sum())), rel=1e-4)
        others = [
            torch.linalg.eigh(m).eigenvectors[:, -rank:] for m in (k.mT @ k, k.mT @ k + q.mT @ q, q.mT @ q)
        ]
        for columns in others:
            assert ours < product_error(k, q, columns @ columns.mT)
        for _ in range(20):
            a, b = torch.randn(2, HEAD_DIM, rank, generator=generator, dtype=torch.float64)
            orthogonal = torch.linalg.qr(a).Q
            assert ours < product_error(k, q, orthogonal @ orthogonal.mT)
            assert ours < product_error(k, q, a @ torch.linalg.inv(b.mT @ a) @ b.mT)


def test_the_spectrum_of_keys_holds_the_squared_singular_values_of_the_product(layout):
    seen, basis = recorded("llama", layout), fitted("kq-svd", "llama", layout).keys
    for head, k in enumerate(rows_of(seen["keys"])):
        q = seen["queries"][:, head].transpose(0, 1).flatten(0, 2)
        expected = np.linalg.svd((k @ q.mT).numpy(), compute_uv=False)[:HEAD_DIM] ** 2
        assert np.allclose(basis.spectrum[head].numpy(), expected, rtol=1e-3, atol=1e-6 * expected[0])


def output_weights(name: str) -> Tensor:
    """(h, g, d, D), from values to the output."""
    model = model_of(name)
    shape, o = (
        families.geometry(model),
        families.decoder_layers(model)[LAYER].self_attn.o_proj.weight.detach().double(),
    )
    return o.mT.unflatten(0, (shape.kv_heads, shape.groups, HEAD_DIM))


@pytest.mark.parametrize("rank", [1, 4, 8, 15])
def test_values_times_output_weights_are_the_best_there_is(rank):
    """Of all g output weights side by side; their mean, as the published code has it, is never better for
    that and mostly worse.
    """
    values, weights = rows_of(recorded("llama", "post_rope")["values"]), output_weights("llama")
    stacked, averaged = (fitted(m, "llama", "post_rope").values for m in ("kq-svd", "kq-svd-averaged"))
    for head, v in enumerate(values):
        wide = torch.cat(list(weights[head]), 1)
        best, mean = (product_error(v, wide.mT, projector_of(b, rank, head)) for b in (stacked, averaged))
        optimum = np.linalg.svd((v @ wide).numpy(), compute_uv=False)
        assert best == pytest.approx(float(np.sqrt((optimum[rank:] ** 2).sum())), rel=1e-4)
        assert best < mean


def test_averaged_outputs_are_the_best_for_the_mean_of_the_output_weights():
    values, weights = rows_of(recorded("llama", "post_rope")["values"]), output_weights("llama")
    averaged = fitted("kq-svd-averaged", "llama", "post_rope").values
    for head, v in enumerate(values):
        optimum = np.linalg.svd((v @ weights[head].mean(0)).numpy(), compute_uv=False)
        found = product_error(v, weights[head].mean(0).mT, projector_of(averaged, 4, head))
        assert found == pytest.approx(float(np.sqrt((optimum[4:] ** 2).sum())), rel=1e-4)


def test_where_the_heads_of_a_group_attend_alike_the_mean_of_their_output_weights_is_right():
    """Then what they put out together is A V times the sum of their W_O, whatever A is."""
    values, weights = rows_of(recorded("llama", "post_rope")["values"]), output_weights("llama")
    stacked, averaged = (fitted(m, "llama", "post_rope").values for m in ("kq-svd", "kq-svd-averaged"))
    for head, v in enumerate(values):
        best, mean = (
            product_error(v, weights[head].sum(0).mT, projector_of(b, 4, head)) for b in (stacked, averaged)
        )
        assert mean < best


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_heads_in_one_latent_are_the_best_for_the_products_of_each_with_its_own_queries(rank, layout):
    """The optimum is the truncated SVD of all [K_h Q_h^T] beside one another; PCA of the joint keys does
    worse.
    """
    seen, bases = recorded("llama", layout), fitted("kq-svd-4", "llama", layout)
    queries = [seen["queries"][:, h].transpose(0, 1).flatten(0, 2) for h in range(4)]
    outputs = [torch.cat(list(w), 1).mT for w in output_weights("llama")]
    pca = Palu().fit(*prepared("llama", layout), RANKS, 0)
    for side, others in (("keys", queries), ("values", outputs)):
        x = joint_rows(seen[side])

        def products(rows: Tensor, others: list[Tensor] = others) -> Tensor:
            return torch.cat(
                [part @ y.mT for part, y in zip(rows.split(HEAD_DIM, 1), others, strict=True)], 1
            )

        optimum = np.linalg.svd(products(x).numpy(), compute_uv=False)[4 * rank :]
        ours, theirs = (float(products(x - rebuilt(x, getattr(b, side), rank)).norm()) for b in (bases, pca))
        assert ours == pytest.approx(float(np.sqrt((optimum**2).sum())), rel=1e-4) and ours < theirs


def loop_weights(
    query: Tensor, keys: Tensor, values: Tensor, output: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """c_m of one query head: query (t, d), keys and values (t, d), output (d, D)."""
    found = []
    for m, q in enumerate(query):
        scores = keys[: m + 1] @ q * scaling
        a = (scores if softcap is None else softcap * torch.tanh(scores / softcap)).softmax(0)
        o = sum(a[n] * values[n] for n in range(m + 1))
        found.append(sum(a[n] ** 2 * ((values[n] - o) @ output).square().sum() for n in range(m + 1)))
    return torch.stack(found)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3-partial"])
def test_weights_of_queries_are_those_of_a_loop(name, layout):
    """gemma2 caps its scores."""
    statistics, probe = prepared(name, layout)
    rotated, seen, weights = recorded(name, "post_rope"), recorded(name, layout), output_weights(name)
    config = model_of(name).config
    scaling = (getattr(config, "query_pre_attn_scalar", None) or HEAD_DIM) ** -0.5
    softcap = getattr(config, "attn_logit_softcapping", None)
    h, g = weights.shape[:2]
    expected = torch.zeros(h, HEAD_DIM, HEAD_DIM, dtype=torch.float64)
    for b, i, j in itertools.product(range(probe.training_count), range(h), range(g)):
        queries = rotated["queries"][b, i, j]
        c = loop_weights(
            queries, rotated["keys"][b, i], rotated["values"][b, i], weights[i, j], scaling, softcap
        )
        expected[i] += torch.einsum("t,td,te->de", c, seen["queries"][b, i, j], seen["queries"][b, i, j])
    found = kq.weighted_queries(probe, kq.grams(weights.mT))
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    direct = oblique_basis(statistics.keys(layout), expected, 1e-6)
    fit = KQSVD(weighting="outputs").fit(statistics, probe, RANKS, 0).keys
    for head in range(h):
        assert torch.allclose(projector_of(fit, 4, head), projector_of(direct, 4, head), atol=2e-2)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    keys=st.integers(1, 40),
    queries=st.integers(1, 40),
    decades=st.floats(0, 6),
    scale=st.floats(-8, 8),
)
def test_oblique_maps_invert_each_other_whatever_the_moments(seed, keys, queries, decades, scale):
    """Fewer keys or queries than channels, channels of very different size, moments of any size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, -decades, 12, dtype=torch.float64) * 10**scale
    k, q = (torch.randn(n, 12, generator=generator, dtype=torch.float64) * sizes for n in (keys, queries))
    basis = oblique_basis((k.mT @ k).unsqueeze(0), (q.mT @ q).unsqueeze(0), 1e-6)
    columns, rows = basis.columns[0].double(), basis.rows[0].double()
    assert torch.allclose(columns @ rows, torch.eye(12, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(columns.norm(dim=0), rows.norm(dim=1), rtol=1e-5), "balanced"
    assert float(columns.abs().max()) < 6e4, "fp16 holds them"


def test_moments_of_nothing_give_maps_all_the_same():
    zero = torch.zeros(2, 6, 6)
    basis = oblique_basis(zero, zero, 1e-6)
    assert torch.allclose(basis.columns @ basis.rows, torch.eye(6), atol=1e-5)


def test_maps_are_those_of_the_papers_cholesky_form():
    """A = L_K^{-T} U_r and B = L_K U_r; scaling changes neither the product nor what is kept."""
    seen, basis = recorded("llama", "post_rope"), fitted("kq-svd", "llama", "post_rope").keys
    for head, k in enumerate(rows_of(seen["keys"])):
        q = seen["queries"][:, head].transpose(0, 1).flatten(0, 2)
        lower_k, lower_q = (torch.linalg.cholesky(x.mT @ x) for x in (k, q))
        u = torch.linalg.svd(lower_k.mT @ lower_q).U[:, :5]
        expected = torch.linalg.solve(lower_k.mT, u) @ (lower_k @ u).mT
        assert torch.allclose(projector_of(basis, 5, head), expected, atol=1e-3)


# -- Palu


@pytest.mark.defines("methods", "palu")
@pytest.mark.parametrize("rank", [2, 4, 9])
@pytest.mark.parametrize("t", [1, 2, 4])
def test_a_whitened_svd_of_the_weights_is_pca_of_what_they_make(t, rank):
    """Cholesky of X^T X and the SVD of S^T W, as the paper computes it; only in a model without biases is it
    the same.
    """
    statistics, probe = prepared("llama", "pre_rope")
    bases, seen = Palu(group=t).fit(statistics, probe, RANKS, 0), recorded("llama", "pre_rope")
    attention = families.decoder_layers(probe.model)[LAYER].self_attn
    with torch.no_grad():
        x = (
            families.attention_input(probe.model, LAYER, probe.inputs[: probe.training_count])
            .flatten(0, 1)
            .double()
        )
    s = torch.linalg.cholesky(x.mT @ x)
    for basis, linear, name in (
        (bases.keys, attention.k_proj, "keys"),
        (bases.values, attention.v_proj, "values"),
    ):
        assert basis.merge == t
        groups = linear.weight.detach().double().mT.split(t * HEAD_DIM, dim=1)  # (D, t d) each
        low = []
        for w in groups:
            u, singular, vt = torch.linalg.svd(s.mT @ w, full_matrices=False)
            down = torch.linalg.solve(s.mT, u[:, : t * rank] * singular[: t * rank])
            low.append(x @ down @ vt[: t * rank])
        ours = rebuilt(joint_rows(seen[name]), basis, rank)
        assert torch.allclose(ours, torch.cat(low, 1), atol=2e-4 * float(ours.abs().max()))


# -- LoRC


def truncated(weight: Tensor, rank: int) -> Tensor:
    u, singular, vt = np.linalg.svd(weight.numpy(), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * singular[:rank]) @ vt[:rank])


@pytest.mark.defines("methods", "lorc")
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("scope", ["layer", "head"])
def test_lorc_is_the_truncated_svd_of_the_weights(scope, name):
    """With its bias as the weight of one more input."""
    model = model_of(name)
    bases = LoRC(scope=scope).fit(*prepared(name, "pre_rope"), RANKS, 0)
    h, attention = families.geometry(model).kv_heads, families.decoder_layers(model)[LAYER].self_attn
    for basis, linear in ((bases.keys, attention.k_proj), (bases.values, attention.v_proj)):
        w = linear.weight.detach().double().mT
        w = w if linear.bias is None else torch.cat([w, linear.bias.detach().double().unsqueeze(0)])
        parts = w.split(w.shape[1] if scope == "layer" else HEAD_DIM, dim=1)
        expected = torch.cat([truncated(p, 5 * (h if scope == "layer" else 1)) for p in parts], 1)
        assert torch.allclose(rebuilt(w, basis, 5), expected, atol=1e-4)


def test_lorc_reads_no_data(layout):
    statistics, probe = prepared("llama", layout)
    other, _ = prepared("llama", layout, 2)
    a, b = (LoRC().fit(s, probe, RANKS, 0) for s in (statistics, other))
    assert torch.equal(a.keys.columns, b.keys.columns) and torch.equal(a.values.columns, b.values.columns)


def test_whitened_lorc_is_better_on_the_data_and_is_palu_over_all_heads(layout):
    statistics, probe = prepared("llama", layout)
    plain, whitened, palu = (
        m.fit(statistics, probe, RANKS, 0) for m in (LoRC(), LoRC(whiten=True), Palu(group=4))
    )
    assert torch.equal(whitened.keys.columns, palu.keys.columns) and torch.equal(
        whitened.values.columns, palu.values.columns
    )
    seen = recorded("llama", layout)
    for side in ("keys", "values"):
        x = joint_rows(seen[side])
        errors = [float((x - rebuilt(x, getattr(b, side), 5)).norm()) for b in (whitened, plain)]
        assert errors[0] < errors[1]


@pytest.mark.parametrize("scope", ["layer", "head"])
def test_lorc_refuses_keys_of_which_the_weights_say_nothing(scope):
    with pytest.raises(LowkeyError, match="whiten=true"):
        LoRC(scope=scope).fit(*prepared("qwen3", "pre_rope"), RANKS, 0)


@pytest.mark.parametrize("name", ["llama", "phi3-partial"])
def test_white_inputs_rotated_to_every_position(name):
    """The moment that LoRC takes under `post_rope`, from rows rotated one position after another."""
    probe = prepared(name, "post_rope")[1]
    rows = torch.randn(2, 7, 1, HEAD_DIM, generator=torch.Generator().manual_seed(0))  # (head, row, 1, d)
    cos, sin = (1.3 * x[0] for x in probe.rope(torch.arange(30).unsqueeze(0), rows))  # scaled as YaRN does
    joint = rows[:, :, 0].transpose(0, 1).flatten(1).double()
    total = torch.zeros(2 * HEAD_DIM, 2 * HEAD_DIM, dtype=torch.float64)
    for p in range(30):
        moved = (
            rotate(rows, cos[:, p : p + 1], sin[:, p : p + 1])[:, :, 0].transpose(0, 1).flatten(1).double()
        )
        total += moved.mT @ moved
    assert torch.allclose(rotated_moment(joint.mT @ joint, HEAD_DIM, cos[0], sin[0]), total / 30, atol=1e-5)


def test_rotated_keys_get_the_basis_of_white_keys_at_every_position_of_a_window():
    _, probe = prepared("qwen2", "post_rope")
    basis = LoRC().fit(*prepared("qwen2", "post_rope"), RANKS, 0).keys
    linear = families.decoder_layers(probe.model)[LAYER].self_attn.k_proj
    # (D + 1, h d): of each input alone, and of none
    keys = torch.cat([linear.weight.detach().mT, linear.bias.detach().unsqueeze(0)])
    cos, sin = (x[0] for x in probe.rope(torch.arange(LENGTH).unsqueeze(0), keys))
    heads = keys.unflatten(1, (4, HEAD_DIM)).transpose(0, 1).unsqueeze(2).expand(-1, -1, LENGTH, -1)
    everywhere = rotate(heads, cos, sin).transpose(0, 1).transpose(1, 2).flatten(0, 1).flatten(1).double()
    kept = (everywhere @ basis.columns[0, :, : 4 * 5].double()).square().sum()
    assert float(kept) == pytest.approx(
        float((np.linalg.svd(everywhere.numpy(), compute_uv=False)[: 4 * 5] ** 2).sum()), rel=1e-5
    )


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
    weights = families.projections(probe.model, LAYER).k
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
def test_calibration_is_the_papers_alternation_in_the_compressed_stream(name, layout):
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


def test_on_the_uncompressed_stream_the_whitened_svd_is_optimal_already():
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
