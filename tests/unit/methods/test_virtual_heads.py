"""MEA: KV heads as mixtures of fewer virtual heads."""

from __future__ import annotations

import math

import numpy as np
import pico
import pytest
import torch
from merged_heads import LAYER, RANKS, WHOLE, data, kept, left, random, random_commuting, random_turn, seen
from pico import HEAD_DIM, attached

from lowkey.backends import naive
from lowkey.methods import MEA, mea
from lowkey.models import families
from lowkey.models.attention_interface import attach
from lowkey.models.projections import projections
from lowkey.ops import aligning, commuting
from lowkey.storage.codec import LowRank


@pytest.mark.parametrize("count", [1, 2, 3])
def test_eigenvectors_of_the_gram_keep_the_most_energy(prepared, layout, count):
    found, bases = seen(), MEA("activations").fit(*prepared(layout=layout), RANKS, 0)
    for basis, x in (
        (bases.keys, found["keys_pre" if layout == "pre_rope" else "keys_post"]),
        (bases.values, found["values"]),
    ):
        ours = left(x.flatten(1), basis.at(4 * count)[0][0])
        gram = np.einsum("nhd,ngd->hg", x.numpy(), x.numpy())
        assert math.isclose(ours, np.linalg.eigvalsh(gram)[: 4 - count].sum(), rel_tol=1e-4)
        for seed in range(20):
            other = np.kron(torch.linalg.qr(random(4, count, seed=seed)).Q.numpy(), np.eye(HEAD_DIM))
            assert ours < left(x.flatten(1), torch.from_numpy(other))


@pytest.mark.defines("methods", "mea")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_weights_are_the_papers_svd_over_the_head_axis(prepared, count):
    """Eq. 36-38: U, S, V of the (d D, h) matrix of flattened projections; virtual heads are U times S V^T."""
    stats, probe = prepared()
    bases, weights = MEA("weights").fit(stats, probe, RANKS, 0), projections(probe.model, LAYER)
    for basis, heads in ((bases.keys, weights.k), (bases.values, weights.v)):
        flat = heads.flatten(1).mT.double().numpy()
        u, s, v = np.linalg.svd(flat, full_matrices=False)
        paper = u[:, :count] @ (s[:count, None] * v[:count])
        down = basis.at(4 * count)[0][0].double()
        # (D, h d): the projections, down and up again
        ours = heads.double().flatten(0, 1).mT @ down @ down.mT
        assert np.allclose(
            ours.unflatten(1, (4, -1)).permute(2, 0, 1).numpy(), unflat(paper, heads.shape), atol=1e-5
        )


def unflat(flat, shape):
    """(d D, h) as (d, D, h) -> (d, D, h) with D before h: what `ours` is permuted to."""
    return flat.reshape(shape[1], shape[2], shape[0])


@pytest.mark.parametrize("basis", ["weights", "activations", "aligned"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_mixed_scores_equal_recomposed_heads_and_paper_sums(prepared, basis, count):
    """Eq. 10-11: virtual heads are einsum("nhd,hg->ngd", components, W); only then does attention begin."""
    f = MEA(basis).fit(*prepared(), RANKS, 0).at(4 * count, 4 * count)
    k, v, q = (
        random(2, 4, *s, seed=i).float()
        for i, s in enumerate([(9, HEAD_DIM), (9, HEAD_DIM), (2, 3, HEAD_DIM)])
    )
    positions = torch.arange(9).expand(2, -1)
    rope = families.rope(attached("llama"), LAYER)
    outs = []
    for absorb in (True, False):
        codec = LowRank(f, "post_rope", rope, absorb)
        segment = codec.segment(q, *codec.encode(k, v, positions), positions, positions)
        assert (segment.keys.shape[1] == 1) == absorb, "one set of components, or every head recomposed"
        outs.append(naive.attend([segment], 0.25))
    assert torch.allclose(*outs, atol=1e-5)
    if basis != "aligned":
        mixings = [down[0].view(4, HEAD_DIM, count, HEAD_DIM)[:, 0, :, 0] for down in (f.k_down, f.v_down)]
        keys, values = (virtual(x, w) for x, w in zip((k, v), mixings, strict=True))
        weights = (torch.einsum("bhgtd,bhsd->bhgts", q, keys) * 0.25).softmax(-1)
        assert torch.allclose(outs[0], torch.einsum("bhgts,bhsd->bhgtd", weights, values), atol=1e-5)


def virtual(heads, mixing):
    components = torch.einsum("bhsd,hc->bcsd", heads, mixing)
    return torch.einsum("bcsd,ch->bhsd", components, mixing.mT)


@pytest.mark.parametrize("name", ["llama", "llama-mha", "qwen3", "phi3-partial", "llama-yarn"])
def test_aligned_heads_never_lose_more_than_heads_as_they_are(prepared, name, layout):
    stats, probe = prepared(name, layout)
    ranks = MEA().candidates(stats.heads, HEAD_DIM, [2 * i for i in range(1, 9)])
    aligned, plain = (MEA(b).fit(stats, probe, ranks, 0) for b in ("aligned", "activations"))
    for side, moment in (
        ("keys", stats.keys_pre if layout == "pre_rope" else stats.keys_post),
        ("values", stats.values),
    ):
        for rank in ranks[:-1]:
            ours, theirs = (kept(moment, getattr(b, side).at(rank)[0][0]) for b in (aligned, plain))
            assert ours >= theirs * (1 - 1e-6)
            assert ours > 1.005 * theirs, "alignment has something to gain in random heads"


def test_aligned_keys_commute_with_rotation(prepared):
    for name, rotary in (("llama", 16), ("phi3-partial", 8)):
        stats, probe = prepared(name)
        basis = MEA("aligned").fit(stats, probe, [4, 8, 16], 0).keys
        assert basis.exact
        for rank, down in basis.exact:
            assert all(commuting.commutes(head, rotary) for head in down[0].split(HEAD_DIM, 1)), (
                f"{name} at rank {rank}"
            )


@pytest.fixture(scope="module", params=["post_rope", "pre_rope"])
def copies(request):
    """All heads are one head, values turned by any rotation and keys by one phase per frequency."""
    model = pico.build("llama")
    for i, block in enumerate(families.decoder_layers(model)):
        a = block.self_attn
        for h in range(4):
            k, v = (p.weight.data.view(4, HEAD_DIM, -1) for p in (a.k_proj, a.v_proj))
            k[h] = random_commuting(1, HEAD_DIM, HEAD_DIM, 10 * i + h).float() @ k[0]
            v[h] = random_turn(10 * i + h).float() @ v[0]
    return data(attach(model), request.param)


def test_rotated_copies_of_a_head_merge_only_when_aligned(copies):
    stats, probe = copies
    errors = {
        b: probe.held_out_error(MEA(b).fit(stats, probe, [4, 8, 16], 0).at(4, 4))
        for b in ("weights", "activations", "aligned")
    }
    assert errors["aligned"] < 1e-4 and min(errors["weights"], errors["activations"]) > 0.1


def test_rotated_copies_have_all_energy_in_one_component(copies):
    spectrum = MEA("aligned").fit(*copies, [4, 8, 16], 0).values.spectrum
    assert float(spectrum[:, :4].sum() / spectrum.sum()) > 1 - 1e-6 and bool((spectrum >= 0).all())


def by_heads(x):
    """Joint moments (h, h, d, d) of (n, h, d)."""
    return torch.einsum("nhi,ngj->hgij", x, x)


def test_aligning_does_not_spoil_sums_of_two_heads():
    """Turned to one gauge they would need a little more than two components."""
    x = torch.einsum("ncd,ch->nhd", random(300, 2, 6) @ random(6, 6, seed=1), random(2, 4, seed=2))
    basis = mea.aligned_basis(by_heads(x), [1, 2, 3], 0)
    assert left(x.flatten(1), basis.columns[0][:, :12]) < 1e-6 * float(x.square().sum())
    assert left(x.flatten(1), dict(basis.exact).get(3, basis.columns[..., :12])[0]) < 1e-6 * float(
        x.square().sum()
    )


@pytest.mark.parametrize("rotary", [0, HEAD_DIM])
def test_every_sweep_keeps_more_energy_and_aligns_heads(prepared, rotary):
    blocks = by_heads(seen()["keys_post"])
    turns = torch.eye(HEAD_DIM, dtype=torch.float64).repeat(4, 1, 1)
    mixing, first = aligning.best_mixing(blocks, turns, 2)
    held = first
    for _ in range(5):
        turns = aligning.realign(blocks, turns, mixing, rotary)
        (mixing, more), before = aligning.best_mixing(blocks, turns, 2), held
        assert more >= before * (1 - 1e-12)
        held = more
    assert held > 1.05 * first
    start = aligning.best_mixing(
        blocks,
        commuting.commuting_procrustes(
            blocks[:, int(aligning.head_gram(blocks).diagonal().argmax())], rotary
        ),
        2,
    )[1]
    assert aligning.align_heads(blocks, 2, rotary)[2] > 1.01 * start


def test_fitting_leaves_the_global_random_state_alone(prepared):
    stats, probe = prepared()
    before = torch.random.get_rng_state()
    for method in WHOLE.values():
        method.fit(stats, probe, RANKS, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
