"""Profiles of errors: ranks between those measured, energies, bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from error_surfaces import HEADS, ITEMSIZE, RANKS, bowl, decaying, full_bytes, profile

from lowkey.allocation.allocators import RANK_ALLOCATORS, Greedy, Pareto, Tail, Threshold, WeightedPareto
from lowkey.allocation.profile import Profile
from lowkey.core.types import LowkeyError

# -- tail


def tail_by_hand(side, rank, power):
    """The share of a head's energies to the power beyond the rank, in the mean over heads."""
    heads = torch.tensor(side, dtype=torch.float64) ** power
    return float((heads[:, rank:].sum(1) / heads.sum(1)).mean())


@pytest.mark.defines("rank allocators", "tail")
@pytest.mark.parametrize(("energy", "power"), [("singular", 0.5), ("squared", 1.0)])
@pytest.mark.parametrize("error", [0.05, 0.2, 0.4, 0.6])
def test_the_tail_rule_by_hand(energy, power, error):
    every = tuple(range(1, 9))
    p = replace(bowl(4), choices=every)
    expected = [
        tuple(next(r for r in every if tail_by_hand(side, r, power) <= error**2) for side in pair)
        for pair in p.spectra
    ]
    assert Tail(energy).under_error(p, error) == expected
    reached = max(
        tail_by_hand(side, r, power)
        for pair, ranks in zip(p.spectra, expected, strict=True)
        for side, r in zip(pair, ranks, strict=True)
    )
    assert Tail(energy).bounded_value(p, expected) == pytest.approx(reached**0.5)


def test_tail_under_bytes_takes_the_smallest_error_that_fits():
    p = replace(bowl(3), choices=tuple(range(1, 9)))
    levels = sorted(
        tail_by_hand(side, r, 0.5) ** 0.5 for pair in p.spectra for side in pair for r in range(9)
    )
    for share in (0.3, 0.55, 0.8):
        fits = (
            pairs
            for pairs in (Tail().under_error(p, level + 1e-9) for level in levels)
            if p.bytes_per_token(pairs) <= share * full_bytes(p)
        )
        assert Tail().under_bytes(p, share * full_bytes(p)) == next(fits)


def test_a_head_without_energy_has_no_tail():
    side = [[0.0] * 8, [4.0] + [0.0] * 7]
    p = profile([[[0.0] * 4] * 4], [(side, side)])
    assert Tail().under_error(p, 0.01) == [(2, 2)] and Threshold().under_error(p, 0.01) == [(2, 2)]


@pytest.mark.parametrize("name", ["threshold", "tail", "spectrum"])
def test_energy_rules_need_energies(name):
    p = profile(bowl().surface, [([[]], [[]])] * 3)
    for run in (
        lambda: RANK_ALLOCATORS[name]().under_bytes(p, full_bytes(p)),
        lambda: RANK_ALLOCATORS[name]().under_error(p, 0.1),
    ):
        with pytest.raises(LowkeyError, match=f"allocator '{name}'"):
            run()


# -- ranks that were not measured


EXACT = tuple(range(1, 9))


@pytest.mark.parametrize(("energy", "power"), [("squared", 1.0), ("singular", 0.5)])
def test_thresholds_give_exact_ranks_and_ask_for_their_errors(energy, power):
    p = replace(bowl(3), choices=EXACT)
    wanted = Threshold(0.05, energy).extra_pairs(p)
    for layer, pairs in enumerate(wanted):
        assert len(pairs) == 20
        for n, pair in enumerate(pairs):
            for side, rank in zip(p.spectra[layer], pair, strict=True):
                held = torch.tensor(side, dtype=torch.float64).pow(power)
                enough = [float(head[:rank].sum() / head.sum()) >= 1 - 0.05 * n - 1e-9 for head in held]
                fewer = [float(head[: rank - 1].sum() / head.sum()) >= 1 - 0.05 * n + 1e-9 for head in held]
                assert all(enough) and not all(fewer)


def test_a_threshold_stops_at_errors_measured_at_its_ranks():
    """What was measured there counts, not what lies between the errors of the surface."""
    p = replace(bowl(1), choices=EXACT)
    path = Threshold(0.1).extra_pairs(p)[0]
    wrong = path[3]
    points = [{pair: 0.9 if pair == wrong else 0.01 for pair in path}]
    assert Threshold(0.1).under_error(replace(p, extra_points=points), 0.5) == [path[2]]


@pytest.mark.parametrize("name", ["fisher", "condition", "depth", "uniform", "greedy"])
@pytest.mark.parametrize("share", [0.3, 0.47, 0.71, 0.93])
def test_byte_budgets_are_met_with_any_rank(name, share):
    p = replace(bowl(), choices=EXACT)
    pairs = RANK_ALLOCATORS[name]().under_bytes(p, share * full_bytes(p))
    left = share * full_bytes(p) / (HEADS * ITEMSIZE) - sum(map(sum, pairs))
    assert 0 <= left < {"fisher": 1, "greedy": 1, "condition": 2, "depth": 2, "uniform": 2 * 3}[name]


@pytest.mark.parametrize(
    "name", ["fisher", "condition", "depth", "uniform", "pareto", "weighted-pareto", "greedy"]
)
def test_error_budgets_are_held_at_measured_ranks(name):
    p = replace(bowl(), choices=EXACT)
    pairs = RANK_ALLOCATORS[name]().under_error(p, 0.1)
    assert {r for pair in pairs for r in pair} <= set(RANKS)
    assert RANK_ALLOCATORS[name]().bounded_value(p, pairs) <= 0.1


def test_greedy_goes_no_lower_than_what_was_measured():
    p = replace(bowl(), choices=EXACT)
    with pytest.raises(LowkeyError, match="the least that the ranks allow"):
        Greedy().under_bytes(p, p.bytes_per_token([(1, 1)] * 3))


@pytest.mark.parametrize("error", [0.02, 0.05, 0.1, 0.2])
def test_weights_of_weighted_pareto_are_in_what_it_bounds(error):
    p = bowl(3)
    weights = [w * 3 / 5.75 for w in (2.0, 1.75, 2.0)]
    pairs = WeightedPareto().under_error(p, error)
    worst = max(w * p.error(i, pair) for i, (w, pair) in enumerate(zip(weights, pairs, strict=True)))
    assert WeightedPareto().bounded_value(p, pairs) == pytest.approx(worst) and worst <= error
    assert Pareto().bounded_value(p, pairs) == max(p.error(i, pair) for i, pair in enumerate(pairs))


# -- the profile


def test_bytes_by_hand():
    assert bowl().bytes_per_token([(2, 4), (6, 8), (8, 8)]) == (2 + 4 + 6 + 8 + 8 + 8) * HEADS * ITEMSIZE


def test_errors_are_read_by_rank():
    p = profile([[[10 * k + v for v in RANKS] for k in RANKS]])
    assert p.error(0, (4, 6)) == 46


def test_errors_between_measured_ranks_are_bilinear():
    p = replace(profile([[[3 * k + 5 * v + k * v for v in RANKS] for k in RANKS]]), choices=EXACT)
    for k in EXACT:
        for v in EXACT:
            assert p.error(0, (k, v)) == pytest.approx(3 * k + 5 * v + k * v)
    assert p.is_measured(0, (4, 6)) and not p.is_measured(0, (4, 5))
    known = replace(p, extra_points=[{(4, 5): 7.0}])
    assert (
        known.error(0, (4, 5)) == 7.0
        and known.is_measured(0, (4, 5))
        and known.error(0, (5, 4)) == p.error(0, (5, 4))
    )


def test_what_was_measured_is_read_and_not_computed():
    p = bowl()
    assert all(
        p.error(i, (k, v)) == p.surface[i][a][b]
        for i in range(3)
        for a, k in enumerate(RANKS)
        for b, v in enumerate(RANKS)
    )


def test_one_rank_is_a_profile_too():
    p = Profile((8,), [[[0.25]]], HEADS, ITEMSIZE, [decaying(0)])
    assert p.error(0, (8, 8)) == 0.25 and p.full_pair == (8, 8) and p.selectable_ranks == (8,)


def test_spectrum_leaves_no_rank_below_its_share_of_the_even_one():
    """Of two layers one has all the energy: without a floor the other keeps the least rank, with one its
    share of the even rank.
    """
    ranks = tuple(range(1, 9))
    energies = [([[1.0] * 8], [[1.0] * 8]), ([[1e-9] * 8], [[1e-9] * 8])]
    p = Profile(ranks, [[], []], 1, 1, energies)
    for floor, least in ((0.0, 1), (0.5, 2), (0.75, 3), (1.0, 4)):
        found = RANK_ALLOCATORS["spectrum"](floor=floor).under_bytes(p, 16.0)  # rank 4 everywhere
        assert found[1] == (least, least)
        assert sum(map(sum, found)) == 16
