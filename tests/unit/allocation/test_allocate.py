"""Allocators on made-up error surfaces, against brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowkey.allocation.allocators import (
    RANK_ALLOCATORS,
    Condition,
    Depth,
    Fisher,
    Greedy,
    Pareto,
    Spectrum,
    Tail,
    Threshold,
    UniformRanks,
    WeightedPareto,
)
from lowkey.allocation.base import search_byte_budget
from lowkey.allocation.profile import Profile
from lowkey.core.types import LowkeyError

RANKS = (2, 4, 6, 8)
HEADS, ITEMSIZE = 3, 2
FULL = (8, 8)

every = pytest.mark.parametrize("name", RANK_ALLOCATORS)


def profile(surface, spectra=None, signals=None):
    layers = range(len(surface))
    measured = {name: [(1.0 + i % 3, 2.0 + i % 2) for i in layers] for name in ("fisher", "condition")}
    return Profile(
        RANKS, surface, HEADS, ITEMSIZE, spectra or [decaying(i) for i in layers], signals or measured
    )


def sensitive(pairs, name="fisher", ranks=RANKS):
    """A profile of no errors with one signal."""
    flat = [[[0.0] * len(ranks)] * len(ranks)] * len(pairs)
    return Profile(ranks, flat, HEADS, ITEMSIZE, [decaying(0)] * len(pairs), {name: pairs})


def decaying(seed):
    """Energies (heads, 8), largest first, of keys and of values."""
    energies = torch.rand(2, HEADS, 8, generator=torch.Generator().manual_seed(seed)).add(0.05).pow(2)
    return tuple(side.sort(descending=True).values.tolist() for side in energies)


def bowl(layers=3, seed=0):
    """Separable, decreasing and convex in each rank, zero at full rank, like errors of truncated energies."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(layers):
        # the first steps up help most
        drops = torch.rand(2, len(RANKS) - 1, generator=generator).sort(descending=True).values
        k, v = ([float(row[i:].sum()) / 10 for i in range(len(RANKS))] for row in drops)
        made.append([[a + b for b in v] for a in k])
    return profile(made)


def total(p, pairs):
    return sum(p.error(i, pair) for i, pair in enumerate(pairs))


def everything(p):
    return itertools.product(p.measured_pairs(), repeat=p.layer_count)


def full_bytes(p):
    return p.bytes_per_token([FULL] * p.layer_count)


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
def test_too_small_a_budget_is_refused_in_one_line_with_the_limit_and_the_least(name):
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


def test_the_least_budget_is_enough_for_layers_whose_errors_weigh_more():
    """Of twelve layers the first counts 1.5 times."""
    p = profile([[[0.3, 0.2, 0.1, 0.0]] * 4] * 12)
    assert WeightedPareto().under_bytes(p, p.bytes_per_token([(2, 2)] * 12)) == [(2, 2)] * 12


@every
def test_an_error_budget_that_everything_fits_gives_the_least_ranks(name):
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
def test_pareto_under_bytes_takes_the_smallest_error_budget_that_fits(share):
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


# -- by signals: fisher, condition and depth

SPLITS = {"fisher": Fisher(), "condition": Condition(), "depth": Depth()}
by_signal = pytest.mark.parametrize("name", SPLITS)
numbers = st.floats(0, 1e6, allow_subnormal=False)
signals = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6).filter(
    lambda pairs: any(x for pair in pairs for x in pair)
)
grids = st.sampled_from([(2, 4, 6, 8), (16, 32, 48, 64, 80, 96, 112, 128), (3, 8, 9, 20), (128,)])
even_grids = st.sampled_from([(2, 4, 6, 8), (1, 2, 3, 4, 5), (16, 32, 48, 64), (128,)])
shares = st.floats(0.05, 1.2)


def split(name, pairs, ranks, share):
    """The profile, the limit in bytes and the ranks; None where the rule refuses, which only too small a
    budget gives it reason to.
    """
    p = sensitive(pairs, name, ranks)
    full, least = (p.bytes_per_token([(r, r)] * p.layer_count) for r in (ranks[-1], ranks[0]))
    try:
        return p, share * full, SPLITS[name].under_bytes(p, share * full)
    except LowkeyError:
        assert share * full < least
        return p, share * full, None


@by_signal
@settings(max_examples=200, deadline=None)
@given(pairs=signals, ranks=grids, share=shares)
def test_ranks_by_signal_stay_within_the_bytes(name, pairs, ranks, share):
    p, limit, found = split(name, pairs, ranks, share)
    if found is not None:
        assert p.bytes_per_token(found) <= limit and len(found) == p.layer_count
        assert all(r in ranks for pair in found for r in pair)


@by_signal
@settings(max_examples=200, deadline=None)
@given(pairs=signals, ranks=grids, share=shares)
def test_no_step_that_fits_is_left(name, pairs, ranks, share):
    """One matrix for fisher; the two of a layer together for the others, which give them the same rank."""
    p, limit, found = split(name, pairs, ranks, share)
    if found is None:
        return
    for r in (r for pair in found for r in pair if r < ranks[-1]):
        step = ranks[ranks.index(r) + 1] - r
        assert p.bytes_per_token(found) + (step if name == "fisher" else 2 * step) * HEADS * ITEMSIZE > limit


@by_signal
@settings(max_examples=200, deadline=None)
@given(pairs=signals, ranks=even_grids, one=shares, other=shares)
def test_more_bytes_never_buy_fewer_ranks(name, pairs, ranks, one, other):
    (p, _, less), (_, _, more) = (split(name, pairs, ranks, share) for share in sorted((one, other)))
    if less is not None:
        assert p.bytes_per_token(less) <= p.bytes_per_token(more)


@settings(max_examples=100, deadline=None)
@given(value=st.floats(1e-9, 1e9), layers=st.integers(1, 6), ranks=even_grids, share=shares)
def test_equal_fisher_information_gives_equal_ranks_up_to_one_step(value, layers, ranks, share):
    _, _, found = split("fisher", [(value, value)] * layers, ranks, share)
    if found is not None:
        places = [ranks.index(r) for pair in found for r in pair]
        assert max(places) - min(places) <= 1


@settings(max_examples=100, deadline=None)
@given(pairs=signals, ranks=even_grids, share=shares)
def test_more_fisher_information_never_gives_fewer_ranks(pairs, ranks, share):
    # below 1e-12 of the largest they count as equal
    pairs = [(round(k, 3), round(v, 3) + 1) for k, v in pairs]
    _, _, found = split("fisher", pairs, ranks, share)
    if found is not None:
        by_information = sorted(
            (x, r)
            for pair, chosen in zip(pairs, found, strict=True)
            for x, r in zip(pair, chosen, strict=True)
        )
        chosen = [r for _, r in by_information]
        assert chosen == sorted(chosen)


@pytest.mark.parametrize("name", ["condition", "depth"])
@settings(max_examples=100, deadline=None)
@given(pairs=signals, ranks=even_grids, share=shares)
def test_ranks_fall_with_depth_and_keys_and_values_share_them(name, pairs, ranks, share):
    _, _, found = split(name, pairs, ranks, share)
    if found is not None:
        assert all(k == v for k, v in found)
        assert found == sorted(found, reverse=True)


@pytest.mark.defines("rank allocators", "fisher")
@pytest.mark.parametrize(
    ("pairs", "ranks", "share", "chosen"),
    [
        ([(1, 1), (1, 1)], (1, 2, 3, 4, 5, 6, 7, 8), 0.5, [(4, 4), (4, 4)]),
        # 16 ranks in shares of 1/8, 3/8, 2/8, 2/8
        ([(1, 3), (2, 2)], (1, 2, 3, 4, 5, 6, 7, 8), 0.5, [(2, 6), (4, 4)]),
        # 13 of 14 ranks clipped at 8, the other 6 shared alike
        ([(1, 1), (1, 13)], (1, 2, 3, 4, 5, 6, 7, 8), 0.4375, [(2, 2), (2, 8)]),
        # the least rank comes off the others' shares
        ([(0, 1), (1, 1)], (1, 2, 3, 4, 5, 6, 7, 8), 0.3125, [(1, 3), (3, 3)]),
        # 24 ranks: 6.25, 7.5, 6.25, 4; steps to the largest remainder, then the first
        ([(5, 6), (5, 0)], (4, 8), 0.75, [(8, 8), (4, 4)]),
        # what the only share cannot hold goes to all alike
        ([(0, 1), (0, 0)], (2, 4, 6, 8), 0.75, [(6, 8), (6, 4)]),
    ],
)
def test_fisher_by_hand(pairs, ranks, share, chosen):
    assert split("fisher", pairs, ranks, share)[2] == chosen


ONE_BY_ONE = tuple(range(1, 17))


@pytest.mark.defines("rank allocators", "depth")
@pytest.mark.parametrize(
    ("share", "ranks"),
    [
        (1.0, [16, 16, 16]),
        (0.75, [16, 12, 8]),  # d_max = d, d_min = 8
        # 25 ranks, half a rank short of d_max = 16 over d_min = 1: 15.7, 8.3, 1; the step goes to the first
        (25.5 / 48, [16, 8, 1]),
        (18 / 48, [11, 6, 1]),  # d_max lowered
        (1 / 16, [1, 1, 1]),
    ],
)
def test_depth_by_hand(share, ranks):
    found = split("depth", [(0, 0)] * 3, ONE_BY_ONE, share)[2]
    assert sum(map(sum, found)) <= 6 * 16 * share and found == [(r, r) for r in ranks]


@pytest.mark.defines("rank allocators", "condition")
def test_condition_by_hand():
    """logs 4, 1, 3, 2 accumulate to 10, 6, 5, 2: heights 1, 1/2, 3/8, 0; with 16 at the top and 8 below, 16,
    12, 11, 8.
    """
    pairs = [(3.0, 1.0), (0.5, 0.5), (1.0, 2.0), (0.0, 2.0)]
    assert split("condition", pairs, ONE_BY_ONE, 47 / 64)[2] == [(16, 16), (12, 12), (11, 11), (8, 8)]


def test_condition_follows_the_published_mapping():
    """d_max [1 - (max - x) / (max - min) (1 - d_min / d_max)], with the d_min that the budget leaves."""
    pairs = [(0.7, 1.1), (2.3, 0.4), (0.9, 0.2), (1.8, 1.6), (0.3, 0.5)]
    logs = torch.tensor(pairs, dtype=torch.float64).sum(1).flip(0).cumsum(0).flip(0)
    spread = (logs.max() - logs) / (logs.max() - logs.min())
    for d_min in (128.0, 64.0, 400.0):
        wanted = 1024 * (1 - spread * (1 - d_min / 1024))
        share = (float(wanted.sum()) + 1e-6) / (1024 * 5)
        found = split("condition", pairs, tuple(range(1, 1025)), share)[2]
        assert [k for k, _ in found] == pytest.approx(wanted.tolist(), abs=1.01)


def test_equal_condition_numbers_are_a_straight_line_in_depth():
    """All but the last layer's share of the sum is the same, so the accumulated logs are a line."""
    for share in (0.3, 0.5, 0.77):
        equal, line = (
            split(name, [(1.5, 0.5)] * 5, (2, 4, 6, 8), share)[2] for name in ("condition", "depth")
        )
        assert equal == line


def test_perfectly_conditioned_weights_share_alike():
    assert split("condition", [(0.0, 0.0)] * 3, (2, 4, 6, 8), 0.5)[2] == [(4, 4)] * 3


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("error", [0.02, 0.05, 0.1, 0.2])
def test_an_error_budget_by_signal_holds_for_the_worst_layer_with_no_byte_to_spare(name, error):
    p = bowl(4)
    found = RANK_ALLOCATORS[name]().under_error(p, error)
    assert all(p.error(i, pair) <= error for i, pair in enumerate(found))
    unit = HEADS * ITEMSIZE
    less = RANK_ALLOCATORS[name]().under_bytes(p, p.bytes_per_token(found) - unit)
    assert any(p.error(i, pair) > error for i, pair in enumerate(less))


@pytest.mark.parametrize("ranks", range(2, 17))
def test_a_rule_for_bytes_takes_the_fewest_whose_error_fits(ranks):
    """Keys get the odd rank; the error falls with every one."""
    p = Profile(tuple(range(1, 9)), [[[1 / k + 1 / v for v in range(1, 9)] for k in range(1, 9)]], 1, 1, [])

    def rule(p, limit):
        return [(-(-int(limit) // 2), int(limit) // 2)]

    pair = (-(-ranks // 2), ranks // 2)
    assert search_byte_budget(rule, p, p.error(0, pair)) == [pair]


# -- packed latents, of which one rank more takes nothing, or the bytes of several

JUMPS = (
    (0.0, *[8.0] * 8, *[16.0] * 8),
    tuple(map(float, range(17))),
)  # of keys by eight ranks, of values by one
ALL = tuple(range(1, 17))


def jumping(layers=1, energies=([[1.0] * 16], [[0.5] * 16])):
    errors = [[(16 - k) + (16 - v) / 2 for v in ALL] for k in ALL]
    return Profile(
        ALL,
        [errors] * layers,
        1,
        1,
        [energies] * layers,
        {"fisher": [(1.0, 1.0)] * layers},
        bytes_by_rank=JUMPS,
    )


@pytest.mark.parametrize(("limit", "best"), [(9, (8, 1)), (17, (16, 1)), (20, (16, 4)), (32, (16, 16))])
@pytest.mark.parametrize("rule", [Spectrum(floor=0), Greedy()], ids=["spectrum", "greedy"])
def test_a_jump_is_weighed_by_all_the_ranks_that_it_pays_for(rule, limit, best):
    """Eight ranks of keys take as many bytes as eight of values, and hold twice as much."""
    assert rule.under_bytes(jumping(), limit) == [best]


@pytest.mark.parametrize("limit", [18, 20, 25, 30, 32, 64])
def test_ranks_in_proportion_fill_what_packed_latents_take(limit):
    """Of two layers that count alike; up to rank 8 keys take 8 bytes, and values one for each rank."""
    p = jumping(2)
    found = Fisher().under_bytes(p, limit)
    ranks = [r for pair in found for r in pair]
    assert p.bytes_per_token(found) == limit and max(ranks) - min(ranks) <= 1


@pytest.mark.parametrize("rank", ALL)
def test_the_fewest_packed_bytes_whose_error_fits(rank):
    p = jumping()
    assert search_byte_budget(UniformRanks().under_bytes, p, p.error(0, (rank, rank))) == [(rank, rank)]


@pytest.mark.parametrize("kind", RANK_ALLOCATORS.values())
def test_an_allocator_reads_the_signals_it_needs_and_no_other(kind):
    p = bowl()
    bare = Profile(
        p.ranks,
        p.surface,
        p.heads,
        p.itemsize,
        p.spectra,
        {name: p.signals[name] for name in kind.required_signals},
    )
    limit = 0.6 * full_bytes(p)
    assert kind().under_bytes(bare, limit) == kind().under_bytes(p, limit)


@pytest.mark.parametrize("name", ["fisher", "condition"])
@pytest.mark.parametrize(
    "signal", [None, [(1.0, 1.0)], [(1.0, float("nan"))] * 3, [(1.0, -1.0)] * 3, [(float("inf"), 1.0)] * 3]
)
def test_a_missing_or_impossible_signal_is_refused_by_name(name, signal):
    p = profile(
        bowl().surface, signals={"other": [(1.0, 1.0)] * 3} | ({} if signal is None else {name: signal})
    )
    for run in (
        lambda: RANK_ALLOCATORS[name]().under_bytes(p, full_bytes(p)),
        lambda: RANK_ALLOCATORS[name]().under_error(p, 0.1),
    ):
        with pytest.raises(LowkeyError, match=f"signal '{name}'") as refusal:
            run()
        assert len(str(refusal.value).splitlines()) == 1


def test_fisher_information_of_zero_everywhere_is_refused():
    with pytest.raises(LowkeyError, match="0 everywhere"):
        Fisher().under_bytes(sensitive([(0.0, 0.0)] * 2), 1e9)


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


def test_the_tail_rule_under_bytes_takes_the_smallest_error_that_fits():
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


def test_a_threshold_stops_at_errors_that_were_measured_at_its_ranks():
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
