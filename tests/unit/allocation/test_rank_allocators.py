"""Allocators of ranks on made-up error surfaces, against brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from error_surfaces import FULL, HEADS, ITEMSIZE, RANKS, bowl, decaying, full_bytes, profile
from hypothesis import given, settings
from hypothesis import strategies as st

from lowkey.allocation.allocators import (
    RANK_ALLOCATORS,
    Greedy,
    Pareto,
    Threshold,
    UniformRanks,
    WeightedPareto,
)
from lowkey.allocation.profile import Profile
from lowkey.core.types import LowkeyError

every = pytest.mark.parametrize("name", RANK_ALLOCATORS)


def total(p, pairs):
    return sum(p.error(i, pair) for i, pair in enumerate(pairs))


def everything(p):
    return itertools.product(p.measured_pairs(), repeat=p.layer_count)


# -- budgets


@every
@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.01, 1.2), seed=st.integers(0, 20), layers=st.integers(1, 5))
def test_a_byte_budget_is_respected_or_refused(name, share, seed, layers):
    p = bowl(layers, seed)
    limit = share * full_bytes(p)
    try:
        pairs = RANK_ALLOCATORS[name]().under_bytes(p, limit)
    except LowkeyError:
        assert limit < p.bytes_per_token([(2, 2)] * layers) or name == "threshold"
        return
    assert p.bytes_per_token(pairs) <= limit and len(pairs) == layers


@every
def test_a_full_budget_keeps_full_rank_or_an_equal_error(name):
    p = bowl()
    pairs = RANK_ALLOCATORS[name]().under_bytes(p, full_bytes(p))
    assert total(p, pairs) == pytest.approx(0.0)


@every
def test_more_bytes_never_cost_quality(name):
    p = bowl()
    worst = [
        max(
            p.error(i, pair)
            for i, pair in enumerate(RANK_ALLOCATORS[name]().under_bytes(p, f * full_bytes(p)))
        )
        for f in (0.3, 0.5, 0.7, 0.9, 1.0)
    ]
    assert name == "greedy" or worst == sorted(worst, reverse=True)
    assert worst[-1] <= worst[0]


@every
def test_too_small_a_budget_is_refused_with_the_least_one(name):
    p = bowl()
    with pytest.raises(LowkeyError) as refusal:
        RANK_ALLOCATORS[name]().under_bytes(p, 50)
    text = str(refusal.value)
    assert len(text.splitlines()) == 1
    assert "50 bytes" in text and str(p.bytes_per_token([(2, 2)] * 3)) in text


@every
def test_the_least_budget_is_enough(name):
    p = bowl()
    assert RANK_ALLOCATORS[name]().under_bytes(p, p.bytes_per_token([(2, 2)] * 3)) == [(2, 2)] * 3


def test_the_least_budget_is_enough_for_weighted_layers():
    """Of twelve layers the first counts 1.5 times."""
    p = profile([[[0.3, 0.2, 0.1, 0.0]] * 4] * 12)
    assert WeightedPareto().under_bytes(p, p.bytes_per_token([(2, 2)] * 12)) == [(2, 2)] * 12


@every
def test_a_loose_error_budget_gives_the_least_ranks(name):
    assert RANK_ALLOCATORS[name]().under_error(bowl(), 1e6) == [(2, 2)] * 3


@every
def test_an_error_budget_that_nothing_fits_gives_full_rank(name):
    noisy = profile([[[0.5, 0.4, 0.3, 0.2]] * 4] * 2)  # full rank itself is at 0.2
    assert RANK_ALLOCATORS[name]().under_error(noisy, 1e-4) == [FULL] * 2


@pytest.mark.parametrize("name", ["pareto", "greedy", "threshold"])
@pytest.mark.parametrize("error", [0.02, 0.05, 0.1, 0.2])
def test_every_layer_stays_within_the_error_budget(name, error):
    p = bowl()
    assert all(
        p.error(i, pair) <= error for i, pair in enumerate(RANK_ALLOCATORS[name]().under_error(p, error))
    )


# -- uniform


@pytest.mark.defines("rank allocators", "uniform")
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_uniform_by_measurement_is_the_best_pair_for_all_layers(share):
    p = bowl()
    fitting = [q for q in p.measured_pairs() if p.bytes_per_token([q] * 3) <= share * full_bytes(p)]
    best = min(total(p, [q] * 3) for q in fitting)
    assert total(p, UniformRanks("measured").under_bytes(p, share * full_bytes(p))) == pytest.approx(best)


@pytest.mark.parametrize("error", [0.02, 0.1, 0.2])
def test_uniform_is_the_cheapest_pair_whose_largest_error_fits(error):
    p = bowl()
    for split in ("equal", "measured"):
        pairs = UniformRanks(split).under_error(p, error)
        fitting = [
            q
            for q in p.measured_pairs()
            if max(p.error(i, q) for i in range(3)) <= error and (split == "measured" or q[0] == q[1])
        ]
        assert len(set(pairs)) == 1 and sum(pairs[0]) == min(map(sum, fitting))


@pytest.mark.parametrize(("share", "rank"), [(0.25, 2), (0.3, 2), (0.74, 5), (0.75, 6), (0.9, 7), (1.0, 8)])
def test_uniform_ranks_need_no_measuring(share, rank):
    p = replace(bowl(), choices=tuple(range(1, 9)))
    assert UniformRanks().under_bytes(p, share * full_bytes(p)) == [(rank, rank)] * 3


# -- pareto


@pytest.mark.defines("rank allocators", "pareto")
@pytest.mark.parametrize("error", [0.02, 0.05, 0.1, 0.2])
def test_pareto_is_the_cheapest_pair_of_each_layer(error):
    p = bowl()
    for i, pair in enumerate(Pareto().under_error(p, error)):
        fitting = [q for q in p.measured_pairs() if p.error(i, q) <= error]
        cheapest = [q for q in fitting if sum(q) == min(map(sum, fitting))]
        assert pair in cheapest and p.error(i, pair) == min(p.error(i, q) for q in cheapest)


@pytest.mark.parametrize("share", [0.3, 0.45, 0.6, 0.75, 0.95])
def test_pareto_under_bytes_takes_the_smallest_error_that_fits(share):
    p, limit = bowl(), share * full_bytes(bowl())
    levels = sorted({p.error(i, q) for i in range(3) for q in p.measured_pairs()})
    best = next(
        pairs
        for pairs in (Pareto().under_error(p, level) for level in levels)
        if p.bytes_per_token(pairs) <= limit
    )
    assert Pareto().under_bytes(p, limit) == best


@pytest.mark.parametrize(
    ("layers", "raw"),
    [
        (10, [2, 1.75, 1.5, 1.25, 1, 1, 1.25, 1.5, 1.75, 2]),
        (8, [2, 1.75, 1.5, 1.25, 1.25, 1.5, 1.75, 2]),
        (5, [2, 1.75, 1.5, 1.75, 2]),
        (1, [2]),
    ],
)
def test_the_papers_weights_are_mirrored_and_have_mean_one(layers, raw):
    weights = WeightedPareto().weights(layers)
    assert weights == pytest.approx([w * layers / sum(raw) for w in raw])
    assert sum(weights) / layers == pytest.approx(1.0)


@pytest.mark.defines("rank allocators", "weighted-pareto")
def test_weighted_pareto_divides_the_error_budget_by_the_weight():
    p = profile(bowl(1).surface * 12)  # twelve equal layers
    pairs, weights = WeightedPareto().under_error(p, 0.08), WeightedPareto().weights(12)
    assert pairs == [Pareto().under_error(profile(p.surface[:1]), 0.08 / w)[0] for w in weights]
    assert sum(pairs[0]) > sum(pairs[6])


# -- greedy


@pytest.mark.defines("rank allocators", "greedy")
@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_optimal_on_convex_separable_errors(seed):
    """At each budget that greedy itself meets exactly, no choice of that size has a smaller sum of errors."""
    p = bowl(2, seed)
    best = {}
    for pairs in everything(p):
        size = p.bytes_per_token(list(pairs))
        best[size] = min(best.get(size, torch.inf), total(p, pairs))
    for size, error in best.items():
        pairs = Greedy().under_bytes(p, size)
        assert p.bytes_per_token(pairs) == size and total(p, pairs) == pytest.approx(error)


def test_greedy_takes_the_step_of_least_error_per_byte():
    """Keys of layer 1 cost nothing: they go first, all the way; everything else stays."""
    dear = [[0.9, 0.8, 0.7, 0.6], [0.7, 0.6, 0.5, 0.4], [0.5, 0.4, 0.3, 0.2], [0.3, 0.2, 0.1, 0.0]]
    free_keys = [[0.3, 0.2, 0.1, 0.0]] * 4
    p = profile([dear, free_keys])
    assert Greedy().under_bytes(p, full_bytes(p) - 6 * HEADS * ITEMSIZE) == [FULL, (2, 8)]


def test_greedy_weighs_a_step_by_its_bytes():
    """Keys: 0.02 for two ranks, then 0.3 for four; values: 0.2 for two. The step of four is the cheaper one
    per byte.
    """
    keys, values = {8: 0.0, 6: 0.02, 2: 0.32}, {8: 0.0, 6: 0.2, 2: 0.9}
    p = Profile(
        (2, 6, 8),
        [[[keys[k] + values[v] for v in (2, 6, 8)] for k in (2, 6, 8)]],
        HEADS,
        ITEMSIZE,
        [decaying(0)],
    )
    assert Greedy().under_bytes(p, full_bytes(p) - 6 * HEADS * ITEMSIZE) == [(2, 8)]


# -- threshold


def by_hand(p, layer, error, step, energy):
    """Lower one threshold for keys and values until the layer's error is too large; keep what held before."""
    best = FULL
    for n in range(round(1 / step)):
        wanted = 1 - n * step
        pair = []
        for side in p.spectra[layer]:
            need = []
            for head in side:
                powers = torch.tensor(head, dtype=torch.float64).pow(0.5 if energy == "singular" else 1)
                need.append(next(r for r in RANKS if powers[:r].sum() >= wanted * powers.sum() - 1e-9))
            pair.append(max(need))
        if p.error(layer, tuple(pair)) > error:
            break
        best = tuple(pair)
    return best


@pytest.mark.defines("rank allocators", "threshold")
@pytest.mark.parametrize("energy", ["squared", "singular"])
@pytest.mark.parametrize("error", [0.0, 0.02, 0.05, 0.1, 0.3, 1.0])
def test_the_threshold_rule_by_hand(energy, error):
    p = bowl(4, seed=3)
    assert Threshold(0.05, energy).under_error(p, error) == [
        by_hand(p, i, error, 0.05, energy) for i in range(4)
    ]


@pytest.mark.parametrize(("energy", "rank"), [("squared", 2), ("singular", 4)])
def test_the_two_energies_by_hand(energy, rank):
    """Half of 16 + 7 lies in the first direction alone; half of 4 + 7 in the first three."""
    side = [[16.0] + [1.0] * 7]
    p = profile([[[0.0] * 4] * 4], [(side, side)])
    assert Threshold(0.5, energy).under_error(p, 1.0) == [(rank, rank)]


def test_the_threshold_rule_needs_spectra():
    """Without energies there is nothing to lower: silently taking the least rank would be wrong."""
    p = profile(bowl().surface, [([[]], [[]])] * 3)
    with pytest.raises(LowkeyError):
        Threshold().under_error(p, 0.1)
