"""Maps of heads that commute with rotary position embeddings."""

from __future__ import annotations

import cmath
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merged_heads import kept, random, random_commuting

from lowkey.ops import commuting
from lowkey.ops.bases import is_orthonormal
from lowkey.ops.rope import rotate

SHAPES = [(2, 8, 8), (3, 8, 4), (4, 4, 4), (1, 6, 4), (2, 6, 0)]  # t, d, rotary


def turned_by_hand(x, rotary, position):
    """(n, d) at one position, channel pair after channel pair, as complex numbers."""
    out = x.clone()
    for f in range(rotary // 2):
        turn = cmath.exp(1j * position * 100.0 ** (-2 * f / rotary))
        for row in range(len(x)):
            z = complex(x[row, f], x[row, f + rotary // 2]) * turn
            out[row, f], out[row, f + rotary // 2] = z.real, z.imag
    return out


@pytest.mark.parametrize(("t", "d", "rotary"), SHAPES)
def test_every_merged_head_can_be_rotated_like_a_head(t, d, rotary):
    x = random(6, t * d) @ random(t * d, t * d, seed=1)
    columns, _ = commuting.commuting_basis((x.mT @ x).unsqueeze(0), t, rotary)
    for position, j in itertools.product([0, 1, 2, 7, 100, 4095], range(t)):
        down = columns[0][:, j * d : (j + 1) * d]
        turned = torch.cat([turned_by_hand(head, rotary, position) for head in x.split(d, 1)], 1)
        assert torch.allclose(turned @ down, turned_by_hand(x @ down, rotary, position), atol=1e-9)
        assert commuting.commutes(down, rotary)


@pytest.mark.parametrize(("t", "d", "rotary"), SHAPES)
def test_no_commuting_basis_holds_more(t, d, rotary):
    x = random(40, t * d) @ random(t * d, t * d, seed=1)
    moment = x.mT @ x
    columns, energy = commuting.commuting_basis(moment.unsqueeze(0), t, rotary)
    assert is_orthonormal(columns, 1e-5) and bool((energy.diff() <= 1e-9).all())
    for j in range(1, t + 1):
        ours = kept(moment, columns[0][:, : j * d])
        assert math.isclose(ours, float(energy[0, :j].sum()), rel_tol=1e-9)
        others = [kept(moment, random_commuting(t, d, rotary, seed)[:, : j * d]) for seed in range(20)]
        assert ours >= max(others) * (1 - 1e-9)
        if j < t:
            assert ours > max(others)


@pytest.mark.parametrize(("t", "d", "rotary"), SHAPES)
def test_the_energy_is_that_of_the_complex_svd(t, d, rotary):
    x, q = random(40, t, d) @ random(d, d, seed=1), rotary // 2
    joint = x.flatten(1)
    z = torch.complex(x[..., :q], x[..., q:rotary]).numpy()
    values = [np.linalg.svd(z[:, :, f], compute_uv=False) ** 2 for f in range(q)]
    rest = np.linalg.svd(x[..., rotary:].flatten(1).numpy(), compute_uv=False) ** 2
    expected = sum(values) + rest.reshape(t, -1).sum(1) if rotary < d else sum(values)
    _, energy = commuting.commuting_basis((joint.mT @ joint).unsqueeze(0), t, rotary)
    assert np.allclose(energy[0].numpy(), expected)


def test_a_map_that_commutes_is_told_from_one_that_does_not():
    for t, d, rotary in SHAPES[:-1]:
        ours = random_commuting(t, d, rotary, 0)[:, :d]
        assert commuting.commutes(ours, rotary) and commuting.commutes(ours.float(), rotary)
        spoilt = ours.clone()
        spoilt[0, 0] += 1e-3
        assert not commuting.commutes(spoilt, rotary)
        swapped = ours[:, torch.arange(d).roll(1)]
        assert not commuting.commutes(swapped, rotary)
    assert commuting.commutes(random(4, 6, 6), 0), "nothing turns"


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 3), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_nearest_commuting_map_is_a_projection(t, pairs, rest, seed):
    d = 2 * pairs + rest
    a, b = random(t, d, d, seed=seed), random(t, d, d, seed=seed + 1)
    near, other = commuting.nearest_commuting(a, 2 * pairs), commuting.nearest_commuting(b, 2 * pairs)
    assert torch.allclose(commuting.nearest_commuting(near, 2 * pairs), near)
    assert abs(float(((a - near) * other).sum())) < 1e-9 * d**2, "what is left out stands on all that commute"


@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_turning_is_the_best_rotation_that_commutes(pairs, rest, seed):
    d, rotary = 2 * pairs + rest, 2 * pairs
    a = random(d, d, seed=seed)
    ours = commuting.commuting_procrustes(a, rotary)
    assert is_orthonormal(ours, 1e-5) and commuting.commutes(ours, rotary)
    others = [float((random_commuting(1, d, rotary, seed + i) * a).sum()) for i in range(20)]
    assert float((ours * a).sum()) >= max(others) - 1e-9


def test_a_head_without_energy_is_not_turned():
    assert torch.equal(commuting.commuting_procrustes(torch.zeros(4, 4), 4), torch.eye(4))


@pytest.mark.parametrize("rotary", [8, 4])
def test_the_moment_of_rotated_heads_is_its_mean_over_positions(rotary):
    x, angles = random(5, 2, 8), random(7, rotary // 2, seed=1)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    expected = torch.zeros(16, 16, dtype=torch.float64)
    for c, s in zip(cos, sin, strict=True):
        turned = rotate(x.transpose(0, 1), c.expand(5, -1), s.expand(5, -1)).transpose(0, 1).flatten(1)
        expected += turned.mT @ turned / len(cos)
    assert torch.allclose(commuting.rotated_moment(x.flatten(1).mT @ x.flatten(1), 8, cos, sin), expected)
