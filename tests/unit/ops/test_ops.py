"""Tensor functions against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial

from lowkey.backends.stored import unpack_codes as unpack
from lowkey.ops.bases import is_orthonormal, orthonormal, principal
from lowkey.ops.quantize import dequantize, pack, quantize
from lowkey.ops.rope import rotate, unrotate
from lowkey.ops.stiefel import Predictor, RankedMatrices


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def eye(columns):
    return torch.eye(columns.shape[-1], dtype=columns.dtype).expand(*columns.shape[:-2], -1, -1)


# -- rope


def angles(width, scale=1.0, t=5):
    angle = torch.outer(torch.arange(t).float(), 100 ** -(torch.arange(width // 2) / width))
    both = torch.cat([angle, angle], dim=-1).unsqueeze(0)
    return scale * both.cos(), scale * both.sin()


@pytest.mark.parametrize("width", [8, 4], ids=["whole", "partial"])
@pytest.mark.parametrize("scale", [1.0, 1.3], ids=["plain", "scaled"])
def test_unrotate_undoes_rotate(width, scale):
    x, (cos, sin) = draw(2, 3, 5, 8), angles(width, scale)
    assert torch.allclose(unrotate(rotate(x, cos, sin), cos, sin), x, atol=1e-5)
    assert torch.allclose(rotate(unrotate(x, cos, sin), cos, sin), x, atol=1e-5)


def test_rotate_is_transformers_rotation():
    x, (cos, sin) = draw(2, 3, 5, 8), angles(8)
    assert torch.equal(rotate(x, cos.unsqueeze(1), sin.unsqueeze(1)), apply_rotary_pos_emb(x, x, cos, sin)[0])


def test_partial_rotate_is_transformers_partial_rotation():
    x, (cos, sin) = draw(2, 3, 5, 8), angles(4)
    assert torch.equal(rotate(x, cos.unsqueeze(1), sin.unsqueeze(1)), apply_partial(x, x, cos, sin)[0])


def test_position_zero_is_left_alone():
    x, (cos, sin) = draw(1, 1, 5, 8), angles(8)
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[:, :, 0], x[:, :, 0]) and not torch.allclose(
        turned[:, :, 1], x[:, :, 1], atol=1e-2
    )


# -- bases


def test_principal_reconstructs_sorted_and_orthonormal():
    x = draw(3, 40, 6, dtype=torch.float64)
    moment = x.mT @ x
    vectors, energy = principal(moment)
    assert torch.allclose(vectors.mT @ vectors, eye(vectors), atol=1e-10)
    assert torch.allclose(vectors @ energy.diag_embed() @ vectors.mT, moment, atol=1e-8)
    assert (energy.diff(dim=-1) <= 0).all()


def test_principal_fixes_the_signs():
    x = draw(40, 6, dtype=torch.float64)
    vectors, _ = principal(x.mT @ x)
    turn = torch.diag(torch.tensor([1.0, -1, 1, -1, 1, 1], dtype=torch.float64))
    other, _ = principal(turn @ x.mT @ x @ turn)
    largest = vectors.abs().argmax(0)
    assert (vectors[largest, range(6)] > 0).all() and (other.abs() - vectors.abs()).abs().max() < 1e-8


def test_energies_are_never_negative():
    x = draw(2, 6, dtype=torch.float64)
    assert (principal(x.mT @ x)[1] >= 0).all()  # rank 2: four eigenvalues are zero up to rounding


@pytest.mark.parametrize("rank", range(7))
def test_the_projectors_error_is_the_tail_of_the_energy(rank):
    """Eckart and Young."""
    x = draw(40, 6, dtype=torch.float64)
    vectors, energy = principal(x.mT @ x)
    kept = vectors[:, :rank]
    assert torch.allclose((x - x @ kept @ kept.T).square().sum(), energy[rank:].sum(), atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_other_projector_does_better(rank):
    x = draw(40, 6)
    vectors, _ = principal(x.mT @ x)

    def lost(basis):
        return (x - x @ basis @ basis.mT).square().sum()

    best = lost(vectors[:, :rank].float())
    assert all(best <= lost(orthonormal(draw(6, rank, seed=seed))) for seed in range(20))


def test_orthonormal_keeps_nested_spans():
    a = draw(2, 6, 4)
    q = orthonormal(a)
    assert torch.allclose(q.mT @ q, eye(q), atol=1e-5)
    for r in range(1, 5):
        span = q[..., :r]
        assert torch.allclose(span @ (span.mT @ a[..., :r]), a[..., :r], atol=1e-5)


def test_orthonormal_leaves_an_orthonormal_basis_alone():
    q = torch.linalg.qr(draw(2, 6, 4)).Q
    for signs in ([1, 1, 1, 1], [1, -1, 1, -1], [-1, -1, -1, -1]):
        basis = q * torch.tensor(signs)
        assert torch.allclose(orthonormal(basis), basis, atol=1e-5)


@pytest.mark.parametrize(("factor", "answer"), [(1.0, True), (1.001, False)])
def test_is_orthonormal(factor, answer):
    assert is_orthonormal(factor * orthonormal(draw(2, 6, 4))) is answer


# -- quantisation


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    groups=st.integers(1, 4),
    size=st.sampled_from([2, 8, 32]),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 999),
)
def test_the_error_is_at_most_half_a_step(bits, groups, size, scale, seed):
    x = scale * draw(3, groups * size, seed=seed)
    blocks = x.unflatten(-1, (groups, size))
    step = (blocks.amax(-1) - blocks.amin(-1)) / (2**bits - 1)
    error = (dequantize(quantize(x, bits, size)) - x).unflatten(-1, (groups, size)).abs().amax(-1)
    assert (error <= step / 2 * 1.001 + 1e-6 * scale).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_undone(bits):
    codes = torch.randint(0, 2**bits, (3, 5, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits), codes) and packed.dtype == torch.uint8


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_size(bits):
    packed = quantize(draw(3, 5, 64), bits, 32)
    assert packed.codes.nbytes == 3 * 5 * 64 * bits // 8
    assert packed.scale.nbytes == packed.low.nbytes == 3 * 5 * 2 * 4


@pytest.mark.parametrize("value", [0.0, 3.0, -1e4])
def test_a_constant_group_is_kept(value):
    x = torch.full((2, 8), value)
    assert torch.allclose(dequantize(quantize(x, 4, 8)), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_comes_back_has_the_dtype_that_went_in(dtype):
    x = draw(2, 16).to(dtype)
    back = dequantize(quantize(x, 8, 8))
    assert back.dtype == dtype and (back - x).abs().max() < 0.05


def test_a_constant_half_precision_group_gives_no_nan():
    """1e-8, the smallest scale, is zero in fp16."""
    assert dequantize(quantize(torch.ones(2, 8, dtype=torch.float16), 4, 8)).isfinite().all()


# -- the Stiefel manifold


def test_ranked_matrices_start_as_told_and_stay_orthonormal():
    start = orthonormal(draw(2, 6, 6))
    module = RankedMatrices(start, 3)
    index = torch.tensor([2, 0])
    assert torch.allclose(module(index), start.expand(2, 2, 6, 6), atol=1e-5)
    with torch.no_grad():
        module.shared.add_(draw(2, 6, 6, seed=1))
        module.departures.add_(draw(3, 2, 6, 6, seed=2))
    out = module(index)
    assert torch.allclose(out.mT @ out, eye(out), atol=1e-5)


def test_a_rank_moves_what_is_shared_and_its_own_departure_alone():
    module = RankedMatrices(orthonormal(draw(2, 6, 6)), 3)
    (module(torch.tensor([1])) * draw(2, 6, 6, seed=1)).sum().backward()
    assert (
        module.shared.grad.any()
        and module.departures.grad[1].any()
        and not module.departures.grad[[0, 2]].any()
    )


def test_a_predictor_is_orthonormal_one_network_per_head():
    module = Predictor(draw(3, 12), 6, 16, torch.Generator().manual_seed(0))
    out = module()
    assert out.shape == (3, 6, 6) and torch.allclose(out.mT @ out, eye(out), atol=1e-5)


def test_a_predictors_heads_are_apart():
    module = Predictor(draw(3, 12), 6, 16, torch.Generator().manual_seed(0))
    module()[0].sum().backward()
    assert all(not p.grad[1:].any() for p in module.parameters())


@pytest.mark.parametrize(
    "make, args",
    [
        (lambda: RankedMatrices(orthonormal(draw(2, 6, 6)), 3), (torch.arange(3),)),
        (lambda: Predictor(draw(2, 12), 6, 16, torch.Generator().manual_seed(0)), ()),
    ],
)
def test_every_parameter_is_trained(make, args):
    module = make()
    out = module(*args)
    (out * draw(*out.shape, seed=3)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in module.parameters())
