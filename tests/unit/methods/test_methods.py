"""Every method, over every allocator."""

from __future__ import annotations

from itertools import product

import pico
import pytest
import torch
from fitted_methods import HELD, LENGTH, RANKS, ROWS, TEXT, WINDOWS, prepared, stored_keys
from pico import HEAD_DIM, attached, feed, prompt, stock
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import lowkey
from lowkey import Sample
from lowkey.allocation.allocators import RANK_ALLOCATORS
from lowkey.allocation.profile import Profile
from lowkey.calibration.sensitivity import SIGNALS
from lowkey.core.head_groups import per_head_maps, side_by_side
from lowkey.core.types import LAYOUTS, Basis, LayerBases, head_blocks
from lowkey.methods import (
    KQSVD,
    MEA,
    METHODS,
    PCA,
    CalibrationContext,
    EigenAttention,
    FisherSVD,
    KVHeadSVD,
    KVLatent,
    LoRC,
    MatryoshkaKV,
    Method,
    Palu,
    ReCalKV,
    StiefAttention,
    StiefJoint,
)
from lowkey.methods import stiefattention as stief
from lowkey.models import families
from lowkey.ops.bases import is_orthonormal
from lowkey.plan.plan import Plan
from lowkey.probes.layer_inputs import layer_inputs
from lowkey.storage.codec import LowRank
from lowkey.storage.coded import CodedLayer

CHEAP = {
    "pca": PCA(),
    "pca-shared": PCA("shared", "shared"),
    "eigenattention": EigenAttention(),
    "eigenattention-code": EigenAttention(form="code", key_bases="per_head"),
    "stiefattention": StiefAttention("free", epochs=2),
    "stiefattention-per-head": StiefAttention("free", epochs=2, key_bases="per_head", value_bases="shared"),
    "stiefattention-mlp": StiefAttention("mlp", epochs=1),
    "kq-svd": KQSVD(),
    "kq-svd-outputs": KQSVD(weighting="outputs"),
    "fisher-svd": FisherSVD(),
    "stiefattention-joint": StiefJoint(steps=2),
    "palu": Palu(),
    "lorc": LoRC(),
    "recalkv": ReCalKV(),
    "kv-head-svd": KVHeadSVD(whole=False),
    "kv-head-svd-commuting": KVHeadSVD(keys="commuting"),
    "mea": MEA("activations"),
    "mea-aligned": MEA("aligned"),
    "kv-latent": KVLatent(),
    "kv-latent-data": KVLatent("data", "pca"),
    "matryoshka": MatryoshkaKV(steps=2),
}
ORTHONORMAL = [
    name for name, method in CHEAP.items() if not isinstance(method, KQSVD | MEA | FisherSVD | StiefJoint)
]
KV_HEADS = 4
BARE = {"sinks": 0, "recent": 0}  # no window of exact tokens, so that every token takes the same bytes


def found(method, data, layout, seed=0):
    """Of layer 1; a method that no layer is fitted for looks at the whole model."""
    if method.has_fit:
        return method.fit(*data, RANKS, seed)
    return method.tune({}, CalibrationContext(attached("llama"), ROWS, HELD, layout, RANKS, seed))[1]


@pytest.fixture(scope="module")
def fitted():
    """Bases by (method, layout), fitted once."""
    made = {}

    def fit(method, layout="post_rope", seed=0, again=False):
        if again or (method, layout, seed) not in made:
            data = prepared("llama", layout, 1)
            made[method, layout, seed] = data[1], found(CHEAP[method], data, layout, seed)
        return made[method, layout, seed]

    return fit


def test_every_method_is_tested():
    assert {type(m) for m in CHEAP.values()} == set(METHODS.values())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name):
    kind = METHODS[name]
    assert (
        issubclass(kind, Method)
        and kind.summary
        and kind.allocator in RANK_ALLOCATORS
        and kind.layout in LAYOUTS
    )
    assert kind() == kind() and hash(kind()) == hash(kind()), "options are frozen values"


@pytest.mark.parametrize("method", CHEAP)
def test_a_rank_is_so_many_numbers_per_head(fitted, method, layout):
    _, bases = fitted(method, layout)
    for rank in served(method):
        found = bases.at(rank, HEAD_DIM)
        t_k, t_v = found.merge
        assert found.ranks == (rank, HEAD_DIM)
        assert found.k_down.shape[1:] == (t_k * HEAD_DIM, t_k * rank) and found.k_up.shape[1:] == (
            t_k * rank,
            HEAD_DIM,
        )
        assert found.v_down.shape[1:] == (t_v * HEAD_DIM, t_v * HEAD_DIM) and found.v_up.shape[1:] == (
            t_v * HEAD_DIM,
            HEAD_DIM,
        )


@pytest.mark.parametrize("method", ORTHONORMAL)
def test_bases_are_orthonormal_at_every_rank(fitted, method, layout):
    _, bases = fitted(method, layout)
    for basis, rank in product((bases.keys, bases.values), served(method)):
        down, up = basis.at(rank)
        assert torch.equal(up, per_head_maps(down.mT, basis.merge)) and is_orthonormal(down, 1e-5)


@pytest.mark.parametrize("method", CHEAP)
def test_what_comes_back_is_a_projection(fitted, method, layout):
    """Compressing twice loses no more than once: up @ down is the identity of the latents."""
    _, bases = fitted(method, layout)
    for basis, rank in product((bases.keys, bases.values), served(method)):
        down, up = (x.double() for x in basis.at(rank))
        product_ = side_by_side(up, basis.merge) @ down
        assert torch.allclose(
            product_, torch.eye(product_.shape[-1], dtype=torch.float64).expand_as(product_), atol=1e-3
        )


def served(method):
    """Ranks that the method has, out of RANKS."""
    return CHEAP[method].candidates(KV_HEADS, HEAD_DIM, RANKS)


@pytest.mark.parametrize("method", CHEAP)
def test_a_full_rank_basis_gives_the_stock_logits(fitted, method, layout):
    model, (_, bases) = attached("llama"), fitted(method, layout)
    maps = dict.fromkeys(range(3), bases.at(HEAD_DIM, HEAD_DIM))
    out, reference = feed(model, ROWS, pico.lowrank(model, maps, layout)), feed(stock("llama"), ROWS)
    assert torch.allclose(out, reference, atol=5e-5)


@pytest.mark.parametrize("method", CHEAP)
def test_a_full_rank_basis_has_no_error_and_a_small_one_has(fitted, method, layout):
    probe, bases = fitted(method, layout)
    least = served(method)[0]
    assert (
        probe.held_out_error(bases.at(HEAD_DIM, HEAD_DIM))
        < 2e-5
        < probe.held_out_error(bases.at(least, least))
        < 1
    )


@pytest.mark.parametrize("method", CHEAP)
def test_a_seed_gives_the_same_bases(fitted, method):
    _, a = fitted(method)
    _, b = fitted(method, again=True)
    for side in ("keys", "values"):
        assert all(torch.equal(getattr(a, side).at(r)[0], getattr(b, side).at(r)[0]) for r in served(method))


@pytest.mark.parametrize("method", ["stiefattention", "stiefattention-mlp"])
def test_another_seed_gives_other_bases(fitted, method):
    (_, a), (_, b) = fitted(method), fitted(method, seed=1)
    assert not torch.equal(a.keys.at(8)[0], b.keys.at(8)[0])


def test_fitting_leaves_the_global_random_state_alone():
    data = prepared("llama", "post_rope", 1)
    before = torch.random.get_rng_state()
    for method in CHEAP.values():
        found(method, data, "post_rope")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("method", ["stiefattention", "stiefattention-per-head"])
def test_training_does_not_end_above_its_pca_start(fitted, method, layout):
    """At the middle ranks, on the held-out windows: the error that picks the epoch."""
    probe, bases = fitted(method, layout)
    options = CHEAP[method]
    data = prepared("llama", layout, 1)
    start = PCA(options.key_bases, options.value_bases).fit(*data, RANKS, 0)
    assert probe.held_out_error(bases.at(8, 8)) <= probe.held_out_error(start.at(8, 8)) + 1e-7


def test_training_that_goes_astray_ends_at_its_pca_start():
    """The best epoch is kept, and the start counts as one."""
    data = prepared("llama", "post_rope", 1)
    start, astray = (
        m.fit(*data, RANKS, 0) for m in (PCA("shared", "per_head"), StiefAttention("free", epochs=2, lr=10.0))
    )
    assert data[1].held_out_error(astray.at(8, 8)) <= data[1].held_out_error(start.at(8, 8)) + 1e-7


def test_training_lowers_the_error():
    data = prepared("llama", "post_rope", 1)
    start, trained = (
        m.fit(*data, RANKS, 0)
        for m in (PCA("shared", "per_head"), StiefAttention("free", epochs=80, patience=80, lr=5e-3))
    )
    seen = torch.arange(data[1].training_count)
    assert data[1].held_out_error(trained.at(8, 8)) < 0.98 * data[1].held_out_error(start.at(8, 8))
    assert float(data[1].errors(seen, trained.at(4, 4)).mean()) < 0.9 * float(
        data[1].errors(seen, start.at(4, 4)).mean()
    )


# -- each method's own definition


@pytest.mark.defines("methods", "pca")
def test_pca_keeps_the_most_energy(layout):
    stats, probe = prepared("llama", layout, 1)
    bases = PCA(key_bases="per_head").fit(stats, probe, RANKS, 0)
    moment = stats.keys(layout)
    energy = torch.linalg.eigvalsh(moment).flip(-1)
    down = bases.keys.at(4)[0].double()
    kept = (down.mT @ moment @ down).diagonal(dim1=1, dim2=2).sum(-1)
    assert torch.allclose(kept, energy[:, :4].sum(-1), rtol=1e-6)
    assert torch.allclose(bases.keys.spectrum, energy.clamp_min(0), rtol=1e-6, atol=1e-8)


@pytest.mark.defines("methods", "eigenattention")
def test_eigenattention_stacks_keys_and_queries_of_all_heads(layout):
    stats, probe = prepared("llama", layout, 1)
    basis = EigenAttention().fit(stats, probe, RANKS, 0).keys
    stacked = (stats.keys(layout) + stats.queries(layout)).sum(0)
    down = basis.at(4)[0][0].double()
    assert basis.columns.shape[0] == 1
    assert torch.allclose(
        (down.mT @ stacked @ down).trace(), torch.linalg.eigvalsh(stacked).flip(0)[:4].sum(), rtol=1e-6
    )


def test_eigenattention_in_the_codes_form_is_pca_of_keys(layout):
    data = prepared("llama", layout, 1)
    code, pca = (m.fit(*data, RANKS, 0).keys.columns for m in (EigenAttention(form="code"), PCA("shared")))
    assert torch.equal(code, pca)


@pytest.mark.defines("methods", "stiefattention")
def test_stiefattention_trains_on_the_layers_output_error(monkeypatch):
    """arXiv:2601.21686: the error of each rank, for keys and values apart.

    It is the mean over tokens of ||out - out_r|| / ||out||, where out_r is the layer's output with keys
    (values) k D D^T.
    """
    layer, rank, trained = 1, 8, []
    monkeypatch.setattr(
        StiefAttention, "_train", lambda self, modules, loss, *rest: trained.append((modules[0], loss))
    )
    method = StiefAttention("mlp", key_bases="per_head", value_bases="per_head")
    method.fit(*prepared("llama", "post_rope", layer), [rank, HEAD_DIM], 0)
    ids, windows = ROWS[:-HELD], torch.arange(WINDOWS - HELD)
    with torch.no_grad():
        exact = stock("llama")(ids, output_hidden_states=True).hidden_states[layer + 1]
        for side, (predictor, loss) in enumerate(trained):
            down = predictor()[..., :rank]
            assert torch.allclose(down.mT @ down, torch.eye(rank).expand(KV_HEADS, -1, -1), atol=1e-5)
            out = output_with(layer, side, down @ down.mT, ids)
            errors = (out - exact).norm(dim=-1) / exact.norm(dim=-1)
            assert float(loss(windows)) == pytest.approx(float(errors.mean()), rel=1e-4)
    assert len(trained) == 2


def output_with(layer, side, projector, ids):
    """What a layer makes of the stock model's states with its keys (side 0) or values (side 1) projected."""

    def attention(module, q, k, v, mask, *, scaling=None, softcap=None, **kwargs):
        if module.layer_idx == layer:
            k, v = (k @ projector, v) if side == 0 else (k, v @ projector)
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling)

    AttentionInterface.register("projected", attention)
    AttentionMaskInterface.register("projected", sdpa_mask)
    model = pico.build("llama")
    model.set_attn_implementation("projected")
    return model(ids, output_hidden_states=True, use_cache=False).hidden_states[layer + 1]


def test_the_predictor_gets_mean_and_variance_of_stored_keys(monkeypatch, layout):
    """arXiv:2601.21686: per-channel statistics of what is compressed; of rotated keys under `post_rope`."""
    told = []
    predictor = stief.Predictor
    monkeypatch.setattr(
        stief, "Predictor", lambda statistics, *rest: told.append(statistics) or predictor(statistics, *rest)
    )
    StiefAttention("mlp", key_bases="per_head", epochs=1).fit(*prepared("llama", layout, 1), [8, 16], 0)
    keys = stored_keys(layout)  # (n, h, d)
    both = torch.cat([keys.mean(0), keys.var(0, correction=0)], dim=1)
    assert torch.allclose(told[0], ((both - both.mean()) / both.std()).to(told[0]), atol=1e-3)


# -- the probe


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_inputs_recorded_layer_by_layer_are_the_models_own(name):
    ids = prompt(40, batch=3)  # longer than a sliding window
    with torch.no_grad():
        hidden = stock(name)(ids, output_hidden_states=True).hidden_states
    for i, inputs in layer_inputs(attached(name), ids, 2):
        assert torch.allclose(inputs, hidden[i], atol=1e-4), f"layer {i}"


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2"])
def test_the_probes_error_is_that_of_the_layers_output(name, layout):
    """Once more by hand: the layer's output in the whole model with only this layer compressed."""
    layer, model = 1, attached(name)
    _, probe = prepared(name, layout, layer)
    f = pico.factors(families.geometry(model).kv_heads, 5, 7)
    cache = lowkey.make_cache(model)
    cache.layers[layer] = CodedLayer(LowRank(f, layout, families.rope(model, layer)))
    ids = ROWS[-HELD:]
    with torch.no_grad():
        ours = model(ids, past_key_values=cache, output_hidden_states=True).hidden_states[layer + 1]
        exact = stock(name)(ids, output_hidden_states=True).hidden_states[layer + 1]
    expected = torch.stack(
        [(a - b).norm() / b.norm() for a, b in zip(ours.flatten(0, 1), exact.flatten(0, 1), strict=True)]
    ).mean()
    assert abs(probe.held_out_error(f) - float(expected)) < 1e-4


def test_the_held_out_windows_are_never_fitted_on():
    _, probe = prepared("llama", "post_rope", 1)
    drawn = torch.cat(list(probe.batches(4, torch.Generator().manual_seed(0))))
    assert sorted(drawn.tolist()) == list(range(WINDOWS - HELD))


def test_the_surface_is_the_held_out_error_of_every_pair(fitted):
    probe, bases = fitted("pca")
    surface = probe.surface(bases, RANKS, [8, 16])
    for i, k in enumerate(RANKS):
        for j, v in enumerate([8, 16]):
            assert surface[i][j] == probe.held_out_error(bases.at(k, v))


def test_a_probe_leaves_the_model_alone():
    model = attached("llama")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    StiefAttention("free", epochs=1).fit(*prepared("llama", "post_rope", 1), RANKS, 0)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# -- every basis with every allocator


@pytest.mark.parametrize("allocator", RANK_ALLOCATORS)
@pytest.mark.parametrize("method", CHEAP)
def test_every_basis_works_with_every_allocator(fitted, method, allocator):
    probe, bases = fitted(method)
    ranks, known = served(method), [b.spectrum for b in (bases.keys, bases.values)]
    if allocator in ("threshold", "tail", "spectrum") and None in [x if x is None else 0 for x in known]:
        pytest.skip("no energies")
    spectra = tuple([[]] if x is None else x.tolist() for x in known)
    signals = {name: [(1.0, 2.0), (3.0, 1.0)] for name in SIGNALS}
    profile = Profile(tuple(ranks), [probe.surface(bases, ranks, ranks)] * 2, 4, 4, [spectra] * 2, signals)
    limit = 0.6 * profile.bytes_per_token([(HEAD_DIM, HEAD_DIM)] * 2)
    pairs = RANK_ALLOCATORS[allocator]().under_bytes(profile, limit)
    assert len(pairs) == 2 and profile.bytes_per_token(pairs) <= limit
    assert all(k in ranks and v in ranks for k, v in pairs)
    assert isinstance(bases.at(*pairs[0]).ranks, tuple) and bases.at(*pairs[0]).ranks == pairs[0]


def test_a_rank_fitted_alone_replaces_the_nested_one():
    own = pico.orthonormal(1, 4, seed=3)
    basis = Basis(pico.orthonormal(1, 16, seed=0), exact=((4, own),))
    assert torch.equal(basis.at(4)[0], own) and torch.equal(basis.at(5)[0], basis.columns[..., :5])
    assert LayerBases(basis, basis).at(4, 5).ranks == (4, 5)


def test_head_blocks_are_the_diagonal_blocks():
    joint = torch.arange(36.0).view(6, 6)
    assert torch.equal(head_blocks(joint, 2), torch.stack([joint[:3, :3], joint[3:, 3:]]))


@pytest.mark.parametrize("method", CHEAP)
def test_every_method_becomes_a_plan_that_holds_what_it_says(method, tmp_path):
    """Calibrated, saved, loaded; fed in pieces, continued, with padded rows."""
    model, ids, pads = attached("llama"), prompt(30), [7, 0]
    sample = Sample(WINDOWS, LENGTH)
    plan = lowkey.calibrate(
        model,
        pico.tokenizer(),
        TEXT,
        method=CHEAP[method],
        budget="50%",
        allocator="greedy",
        sample=sample,
        **BARE,
    )
    assert plan.bytes_per_token(4) <= 0.5 * families.geometry(model).full_bytes_per_token(4)
    plan.save(tmp_path / "plan")
    caches = [lowkey.make_cache(model, plan=Plan.load(tmp_path / "plan", model)) for _ in range(2)]
    pieces = feed(model, ids, caches[0], pads, [20, 1, 9])
    assert torch.allclose(
        pico.real(pieces, pads), pico.real(feed(model, ids, caches[1], pads), pads), atol=1e-4
    )
    places = len(plan.factors) * 2 * 8 * len(ids)  # two row positions per layer
    for cache in caches:
        assert cache.nbytes() == cache.predicted_nbytes() == plan.bytes_per_token(4) * ids.numel() + places
