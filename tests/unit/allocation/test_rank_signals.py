"""Allocators that read signals (Fisher information, condition numbers, depth), against hand computation."""

from __future__ import annotations

import pytest
import torch
from error_surfaces import HEADS, ITEMSIZE, RANKS, bowl, decaying, full_bytes, profile
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowkey.allocation.allocators import (
    RANK_ALLOCATORS,
    Condition,
    Depth,
    Fisher,
    Greedy,
    Spectrum,
    UniformRanks,
)
from lowkey.allocation.base import search_byte_budget
from lowkey.allocation.profile import Profile
from lowkey.core.types import LowkeyError


def sensitive(pairs, name="fisher", ranks=RANKS):
    """A profile of no errors with one signal."""
    flat = [[[0.0] * len(ranks)] * len(ranks)] * len(pairs)
    return Profile(ranks, flat, HEADS, ITEMSIZE, [decaying(0)] * len(pairs), {name: pairs})


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


EIGHTHS = tuple(range(16, 129, 16))


@by_signal
@settings(max_examples=200, deadline=None)
@given(pairs=signals, ranks=grids, share=shares)
@example(pairs=[(0.0, 0.0)] * 4 + [(0.0, 1.0)], ranks=EIGHTHS, share=0.19999999999999996)
def test_ranks_by_signal_stay_within_the_bytes(name, pairs, ranks, share):
    p, limit, found = split(name, pairs, ranks, share)
    if found is not None:
        # bytes are whole numbers, and a share times all of them may fall short of one by rounding
        assert p.bytes_per_token(found) <= limit * (1 + 1e-12) and len(found) == p.layer_count
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
def test_equal_fisher_information_gives_ranks_within_one_step(value, layers, ranks, share):
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
def test_an_error_budget_by_signal_holds_for_the_worst_layer(name, error):
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
