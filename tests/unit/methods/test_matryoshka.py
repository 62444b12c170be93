"""MatryoshkaKV: its start, its rotations, and what training through the model does to held-out text."""

from __future__ import annotations

import copy
from dataclasses import replace

import pico
import pytest
import torch
import torch.nn.functional as F
from fitted_methods import prepared, stored_keys
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import HEAD_DIM, attached, feed, prompt, stock

from lowkey.core.types import LowkeyError
from lowkey.methods import CalibrationContext, MatryoshkaKV
from lowkey.methods import matryoshka as module
from lowkey.methods.matryoshka import CayleyBasis, cayley, evaluated_ranks
from lowkey.models import families
from lowkey.ops.bases import is_orthonormal
from lowkey.probes import model_probe

RANKS = [2, 4, 8, 16]
# a cycle, which can be learnt
ROWS = torch.stack([torch.arange(48).add(i).mul(5).remainder(23).add(1) for i in range(12)])
HELD = 4


def context(layout="post_rope", name="llama", **changes) -> CalibrationContext:
    return CalibrationContext(attached(name), ROWS, HELD, layout, RANKS, 0, **changes)


def fitted(method: MatryoshkaKV, layout="post_rope", name="llama"):
    layers = families.geometry(attached(name)).compressible
    return {i: method.fit(*prepared(name, layout, i), RANKS, 0) for i in layers}


def loss_at(bases, rank: int, kl: float, name="llama", layout="post_rope") -> float:
    """The training loss of the held-out windows at one rank everywhere, written out: one window and one token
    after another.
    """
    model, total = attached(name), 0.0
    maps = model_probe.reconstructions(model, {i: b.at(rank, rank) for i, b in bases.items()}, layout)
    with torch.no_grad():
        for row in ROWS[-HELD:]:
            ours, theirs = (
                model_probe.logits(model, row[None], maps)[0],
                model(row[None], use_cache=False).logits[0],
            )
            p, q = theirs.softmax(-1), ours.softmax(-1)
            divergence = sum(float((p[t] * (p[t] / q[t]).log()).sum()) for t in range(len(row))) / len(row)
            total += kl * divergence + (1 - kl) * float(F.cross_entropy(ours[:-1], row[1:]))
    return total / HELD


# -- the map


@settings(max_examples=30, deadline=None)
@given(d=st.integers(1, 12), seed=st.integers(0, 99), scale=st.floats(0.01, 10))
def test_cayley_gives_a_rotation(d, seed, scale):
    a = scale * torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q = cayley(a - a.mT)
    assert torch.allclose(q.mT @ q, torch.eye(d, dtype=torch.float64), atol=1e-10)
    assert torch.linalg.det(q) == pytest.approx(1.0)
    inverse = torch.linalg.inv(torch.eye(d, dtype=torch.float64) + a - a.mT)
    assert torch.allclose(q, (torch.eye(d, dtype=torch.float64) - a + a.mT) @ inverse, atol=1e-9)


def test_cayley_of_nothing_is_the_identity_and_can_leave_it():
    a = torch.zeros(3, 4, 4, requires_grad=True)
    q = cayley(a - a.mT)
    assert torch.equal(q, torch.eye(4).expand(3, 4, 4))
    (gradient,) = torch.autograd.grad((q * torch.arange(16.0).view(4, 4)).sum(), a)
    assert gradient.abs().max() > 1


def test_masked_columns_equal_a_smaller_basis(layout):
    """Zeroed columns rebuild what a basis of fewer columns does, window by window."""
    basis = MatryoshkaKV().fit(*prepared("llama", layout, 1), RANKS, 0).keys
    side = CayleyBasis(basis, torch.device("cpu"))
    with torch.no_grad():
        side.a += 0.3 * torch.randn(side.a.shape, generator=torch.Generator().manual_seed(0))
        down, up = side.maps(torch.tensor([4, 16]))
    turned = side.basis(basis)
    assert down.shape == up.shape == (2, 4, HEAD_DIM, HEAD_DIM)
    for i, r in enumerate((4, 16)):
        short, back = turned.at(r)
        assert torch.allclose(down[i] @ up[i], short @ back, atol=1e-5)


# -- the start


def test_the_start_is_the_pca_of_centred_keys(layout):
    basis = MatryoshkaKV().fit(*prepared("llama", layout, 1), RANKS, 0).keys
    keys = stored_keys(layout)
    centred = keys - keys.mean(0)
    assert torch.allclose(basis.mean.double(), keys.mean(0), atol=1e-5)
    for head in range(keys.shape[1]):
        energies = torch.linalg.svdvals(centred[:, head]).square()
        assert torch.allclose(basis.spectrum[head], energies, rtol=1e-3, atol=1e-4 * float(energies.max()))
        kept = (centred[:, head] @ basis.columns[head, :, :4].double()).square().sum()
        assert kept == pytest.approx(float(energies[:4].sum()), rel=1e-4)


def test_without_centring_it_is_plain_pca():
    bases = MatryoshkaKV(centred=False).fit(*prepared("llama", "post_rope", 1), RANKS, 0)
    moment = prepared("llama", "post_rope", 1)[0].keys("post_rope")
    down = bases.keys.at(4)[0].double()
    assert bases.keys.mean is None and bases.values.mean is None
    assert torch.allclose(
        (down.mT @ moment @ down).diagonal(dim1=1, dim2=2).sum(-1),
        torch.linalg.eigvalsh(moment)[:, -4:].sum(-1),
    )


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3-partial"])
@pytest.mark.parametrize("centred", [True, False])
def test_full_rank_gives_the_stock_logits(name, centred, layout):
    """Through a cache, with the means taken off and put back."""
    bases = fitted(MatryoshkaKV(centred=centred), layout, name)
    model, ids = attached(name), prompt(24)
    maps = {i: b.at(HEAD_DIM, HEAD_DIM) for i, b in bases.items()}
    assert all((f.k_mean is not None) == centred for f in maps.values())
    assert torch.allclose(
        feed(model, ids, pico.lowrank(model, maps, layout)), feed(stock(name), ids), atol=1e-4
    )


def test_a_mean_lowers_the_error_of_what_has_one():
    """Keys with a large constant part: rank 1 beside the mean beats rank 1 alone."""
    stats, probe = prepared("llama", "post_rope", 1)
    constant = 30.0 * torch.ones(4 * HEAD_DIM, dtype=torch.float64)
    shifted = stats.keys_post + stats.tokens * (
        torch.outer(constant, stats.keys_post_mean) + torch.outer(stats.keys_post_mean, constant)
    )
    stats = replace(
        stats,
        keys_post=shifted + stats.tokens * torch.outer(constant, constant),
        keys_post_mean=stats.keys_post_mean + constant,
    )
    keys = stored_keys("post_rope") + 30.0

    def error(method):
        basis = method.fit(stats, probe, RANKS, 0).keys
        x, (down, up) = keys.transpose(0, 1), (m.double() for m in basis.at(1))
        mean = 0 if basis.mean is None else basis.mean.double().unsqueeze(1)
        return float(((x - mean) @ down @ up + mean - x).square().sum())

    assert error(MatryoshkaKV()) < 0.99 * error(MatryoshkaKV(centred=False))


# -- training


@pytest.fixture(scope="module")
def tuned():
    """(start, end) by options, trained once."""
    made = {}

    def train(layout="post_rope", name="llama", **options):
        key = layout, name, *options.items()
        if key not in made:
            method = MatryoshkaKV(**{"steps": 40, "lr": 1e-2, **options})
            start = fitted(method, layout, name)
            made[key] = start, method.tune(start, context(layout, name))
        return made[key]

    return train


def test_tuning_lowers_the_loss_of_held_out_text(tuned, layout):
    start, end = tuned(layout)
    assert loss_at(end, 4, 0.25, layout=layout) < 0.97 * loss_at(start, 4, 0.25, layout=layout)


@pytest.mark.defines("methods", "matryoshka")
@pytest.mark.parametrize("kl", [0.0, 1.0])
def test_the_loss_is_what_the_option_says(kl):
    start = fitted(MatryoshkaKV())
    training = module._BasisTraining.of(start, context(), kl)
    judged = sum(loss_at(start, r, kl) for r in evaluated_ranks(RANKS)) * HELD
    assert training.held_out_loss() == pytest.approx(judged, rel=1e-4)


def test_more_divergence_in_the_loss_ends_nearer_to_the_original(tuned):
    _, near = tuned(kl=1.0)
    _, far = tuned(kl=0.0)
    assert loss_at(near, 4, 1.0) < loss_at(far, 4, 1.0) and loss_at(far, 4, 0.0) < loss_at(near, 4, 0.0)


def test_tuned_bases_are_orthonormal_and_exact_at_full_rank(tuned, layout):
    start, end = tuned(layout)
    model, ids = attached("llama"), prompt(24)
    for i, b in end.items():
        assert is_orthonormal(b.keys.columns, 1e-5) and is_orthonormal(b.values.columns, 1e-5)
        assert not torch.allclose(b.keys.columns, start[i].keys.columns, atol=1e-3)
        assert not torch.equal(b.values.mean, start[i].values.mean)
        assert b.keys.columns.dtype == torch.float32 and not b.keys.columns.requires_grad
    maps = {i: b.at(HEAD_DIM, HEAD_DIM) for i, b in end.items()}
    assert torch.allclose(
        feed(model, ids, pico.lowrank(model, maps, layout)), feed(stock("llama"), ids), atol=1e-4
    )


def test_training_sees_what_a_cache_of_the_bases_gives(tuned, layout):
    _, end = tuned(layout)
    model, ids = attached("llama"), prompt(24)
    maps = {i: b.at(4, 8) for i, b in end.items()}
    with torch.no_grad():
        trained = model_probe.logits(model, ids, model_probe.reconstructions(model, maps, layout))
    assert torch.allclose(trained, feed(model, ids, pico.lowrank(model, maps, layout)), atol=1e-5)


def test_tuning_twice_gives_the_same_bases(tuned):
    start, end = tuned()
    again = MatryoshkaKV(steps=40, lr=1e-2).tune(start, context())
    assert all(
        torch.equal(again[i].keys.columns, b.keys.columns)
        and torch.equal(again[i].values.mean, b.values.mean)
        for i, b in end.items()
    )
    other = MatryoshkaKV(steps=2, lr=1e-2).tune(start, replace(context(), seed=1))
    same = MatryoshkaKV(steps=2, lr=1e-2).tune(start, context())
    assert not torch.equal(other[1].keys.columns, same[1].keys.columns)


def test_training_that_goes_astray_ends_at_its_start():
    start = fitted(MatryoshkaKV())
    end = MatryoshkaKV(steps=3, lr=10.0, kl=1.0).tune(start, context())
    for i, b in end.items():
        assert torch.allclose(b.keys.columns, start[i].keys.columns, atol=1e-6) and torch.equal(
            b.keys.mean, start[i].keys.mean
        )


def test_no_steps_change_nothing():
    start = fitted(MatryoshkaKV())
    end = MatryoshkaKV(steps=0).tune(start, context())
    assert all(torch.allclose(end[i].keys.columns, b.keys.columns, atol=1e-6) for i, b in start.items())


def test_ranks_are_drawn_for_every_layer_side_and_window():
    training = module._BasisTraining.of(fitted(MatryoshkaKV()), context(), 0.25)
    ranks = training.draw_ranks(5, torch.Generator().manual_seed(0))
    assert ranks.shape == (3, 2, 5) and set(ranks.flatten().tolist()) == set(RANKS)
    assert len({tuple(r.tolist()) for r in ranks.flatten(0, 1)}) == 6, (
        "every layer and side has ranks of its own"
    )


def test_held_out_windows_are_never_trained_on(monkeypatch):
    seen = []
    inside = module._BasisTraining.loss

    def watched(self, rows, ranks):
        if torch.is_grad_enabled():
            seen.append(rows)
        return inside(self, rows, ranks)

    monkeypatch.setattr(module._BasisTraining, "loss", watched)
    MatryoshkaKV(steps=3).tune(fitted(MatryoshkaKV()), context())
    training = {tuple(r.tolist()) for r in ROWS[:-HELD]}
    assert len(seen) == 3 and all(tuple(r.tolist()) in training for rows in seen for r in rows)


def test_the_model_is_left_alone(tuned):
    model = attached("llama")
    before = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    MatryoshkaKV(steps=2).tune(fitted(MatryoshkaKV()), context())
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_window_has_ranks_of_its_own(layout):
    """Two windows in one pass, at other ranks, are two passes."""
    start = fitted(MatryoshkaKV(), layout)
    training = module._BasisTraining.of(start, context(layout), 0.25)
    ranks = torch.tensor([4, 16]).expand(3, 2, 2)
    with torch.no_grad():
        both = model_probe.logits(
            attached("llama"),
            ROWS[:2],
            model_probe.reconstructions(attached("llama"), training.factors(ranks), layout),
        )
        for j in range(2):
            maps = {i: b.at(int(ranks[0, 0, j]), int(ranks[0, 1, j])) for i, b in start.items()}
            one = model_probe.logits(
                attached("llama"),
                ROWS[j : j + 1],
                model_probe.reconstructions(attached("llama"), maps, layout),
            )
            assert torch.allclose(both[j], one[0], atol=1e-4)


def test_a_half_precision_model_is_tuned_too():
    model = copy.deepcopy(attached("llama")).to(torch.bfloat16)
    start = fitted(MatryoshkaKV())
    end = MatryoshkaKV(steps=4, lr=1e-2).tune(start, replace(context(), model=model))
    assert all(
        b.keys.columns.dtype == torch.float32 and is_orthonormal(b.keys.columns, 1e-5) for b in end.values()
    )


def test_sliding_layers_stay_as_they_are(tuned):
    start, end = tuned(name="gemma2", steps=2)
    assert sorted(end) == sorted(start) == [1, 2]


@pytest.mark.parametrize(
    ("ranks", "expected"), [([2, 4, 8, 16], [2, 4, 8]), ([16], [16]), (list(range(2, 18, 2)), [2, 8, 14])]
)
def test_a_few_lower_ranks_judge(ranks, expected):
    assert evaluated_ranks(ranks) == expected


@pytest.mark.parametrize(
    "options", [{"kl": -0.1}, {"kl": 1.5}, {"steps": -1}, {"lr": 0.0}, {"lr": float("nan")}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(LowkeyError, match=next(iter(options))):
        MatryoshkaKV(**options)


def test_means_cost_no_bytes_per_token():
    """Latents of rank r per head and token, as with any other basis: 3 layers, 4 heads, 2 rows, fp32."""
    model, bases = attached("llama"), fitted(MatryoshkaKV())
    long, short = (pico.lowrank(model, {i: b.at(4, 8) for i, b in bases.items()}) for _ in range(2))
    feed(model, prompt(24), long), feed(model, prompt(12), short)
    assert long.nbytes() - short.nbytes() == 3 * 2 * 4 * 12 * (4 + 8) * 4
