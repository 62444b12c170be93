"""Ranks that can be chosen, and which of them allocators choose."""

from __future__ import annotations

import pytest
from calibrated_ranks import FULL, UNIT, by_allocator, calibrate, chosen
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import LAYERS

from lowkey.allocation.rank_grid import grid, multiples
from lowkey.core.types import LowkeyError
from lowkey.methods import MEA, PCA, KVHeadSVD, KVLatent, StiefAttention

# -- the grid


def test_a_multiple_of_one_is_every_rank():
    assert multiples(128, 1) == list(range(1, 129))
    assert multiples(16, 5) == [5, 10, 15, 16]


def test_the_papers_grid_is_half_to_nine_tenths_of_the_head_dim():
    assert grid(StiefAttention.grid, multiples(128, 1)) == [64, 77, 90, 102, 115, 128]
    assert grid(StiefAttention.grid, multiples(128, 32)) == [64, 96, 128]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (8, [2, 4, 6, 8, 10, 12, 14, 16]),
        ("4", [4, 8, 12, 16]),
        (5, [3, 6, 10, 13, 16]),
        (1, [16]),
        (99, list(range(1, 17))),
        ("all", list(range(1, 17))),
        ([3, 7], [3, 7, 16]),
        ("3, 7", [3, 7, 16]),
        ("50%", [8, 16]),
        ([0.5, 0.7], [8, 11, 16]),
        ("50%,7", [7, 8, 16]),
        ([0.001], [1, 16]),
        ((16,), [16]),
    ],
)
def test_ranks_that_can_be_asked_for(asked, expected):
    assert grid(asked, multiples(16, 1)) == expected


@pytest.mark.parametrize(
    "asked",
    [
        *(
            0,
            -1,
            True,
            "",
            "banana",
            "0",
            "3,",
            "17,18",
            "3,17",
            "0%",
            "101%",
            "50 %",
            "-1",
            "1e3",
            "9" * 400,
            "٣,٤",
            "3\n4",
            "8;9",
        ),
        *([17], [0], [-2], [], [1.5], [0.0], [float("nan")], [True], ["3"]),
    ],
)
def test_other_ranks_are_refused_in_one_line(asked):
    with pytest.raises(LowkeyError, match=r"^ranks ") as refusal:
        grid(asked, multiples(16, 1))
    assert len(str(refusal.value).splitlines()) == 1 and len(str(refusal.value)) < 300


@settings(max_examples=100, deadline=None)
@given(d=st.sampled_from([4, 16, 72, 80, 96, 128]), multiple=st.integers(1, 16), count=st.integers(1, 200))
def test_a_count_gives_so_many_of_the_choices_evenly_spaced(d, multiple, count):
    choices = multiples(d, min(multiple, d))
    found = grid(count, choices)
    assert set(found) <= set(choices) and found[-1] == d and len(found) <= max(count, 1) + 1
    if count >= len(choices):
        assert found == choices


# -- which ranks come out


@pytest.mark.parametrize("share", [31, 43.2, 50, 58.1, 77, 99.9])
@pytest.mark.parametrize("allocator", ["greedy", "fisher"])
def test_with_any_rank_allowed_no_rank_that_fits_is_left(allocator, share):
    plan = calibrate(allocator=allocator, budget=f"{share}%")
    assert sum(k + v for k, v in chosen(plan)) == int(share * FULL / 100) // UNIT


@pytest.mark.parametrize(
    ("share", "rank"), [(6.25, 1), (12.4, 1), (31.3, 5), (50, 8), (68.74, 10), (68.75, 11), (100, 16)]
)
def test_uniform_ranks_are_the_largest_that_fit(share, rank):
    assert chosen(calibrate(allocator="uniform", budget=f"{share}%")) == [(rank, rank)] * LAYERS


@pytest.mark.parametrize("share", [31, 55, 78])
def test_ranks_on_a_line_in_depth_are_rounded_once(share):
    """Two or three of the six ranks of a step may be left, as a layer's keys and values go together."""
    plan = calibrate(allocator="depth", budget=f"{share}%")
    room = int(share * FULL / 100) // UNIT
    assert room - 2 < sum(k + v for k, v in chosen(plan)) <= room
    (a, _), (b, _), (c, _) = chosen(plan)
    assert abs((a + c) / 2 - b) <= 1


@by_allocator
def test_ranks_that_are_asked_for_are_the_only_ones(allocator):
    plan = calibrate(allocator=allocator, budget="70%", ranks="5,11")
    assert plan.profile["ranks"] == [5, 11, 16]
    assert {r for pair in chosen(plan) for r in pair} <= {5, 11, 16}


@by_allocator
def test_a_rank_multiple_holds_for_every_allocator(allocator):
    plan = calibrate(allocator=allocator, budget="70%", rank_multiple=3)
    assert {r for pair in chosen(plan) for r in pair} <= {3, 6, 9, 12, 15, 16}


def test_stiefattention_chooses_among_the_ranks_it_is_trained_at():
    plan = calibrate(StiefAttention(epochs=1), budget="75%")
    assert plan.profile["ranks"] == [8, 10, 11, 13, 14, 16]
    assert {r for pair in chosen(plan) for r in pair} <= set(plan.profile["ranks"])
    assert plan.layout == "pre_rope" and plan.allocator["name"] == "weighted-pareto"


def test_the_papers_grid_refuses_less_than_half_with_a_remedy():
    with pytest.raises(LowkeyError, match=r"50\.0%.*--ranks"):
        calibrate(StiefAttention(), budget="49%")
    with pytest.raises(LowkeyError, match=r"50\.0%.*--ranks"):
        calibrate(StiefAttention(), budget="49%", allocator="fisher")
    assert (
        chosen(calibrate(StiefAttention(epochs=1), budget="25%", ranks=[4], allocator="uniform"))
        == [(4, 4)] * LAYERS
    )


def test_strided_channels_are_evenly_spaced_at_every_rank():
    """3 of 8 pairs: 0, 8/3 and 16/3, rounded down; of 16 value channels every 16/6."""
    plan = calibrate(KVLatent(), budget="37.5%")
    assert chosen(plan) == [(6, 6)] * LAYERS
    for f in plan.factors.values():
        assert f.k_down[0].argmax(0).sort().values.tolist() == [0, 2, 5, 8, 10, 13]
        assert f.v_down[0].argmax(0).sort().values.tolist() == [0, 2, 5, 8, 10, 13]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (KVHeadSVD(), {"ranks": [5]}),
        (KVHeadSVD(group=4), {"ranks": [4, 6]}),
        (MEA(), {"ranks": "6"}),
        (KVLatent(), {"ranks": [4, 7]}),
        (KVLatent(rope="aware"), {"ranks": [6]}),
        (PCA(), {"ranks": [4, 6], "rank_multiple": 4}),
    ],
)
def test_ranks_that_a_method_cannot_serve_are_refused_by_number(method, options):
    if method == MEA():
        options = {"ranks": [6]}
    with pytest.raises(LowkeyError, match=r"^ranks .*: \d+ is not one of "):
        calibrate(method, **options)


def test_a_rank_multiple_that_leaves_only_full_rank_is_refused():
    with pytest.raises(LowkeyError, match=r"100\.0%.*lower --rank-multiple"):
        calibrate(KVHeadSVD(), budget="50%", rank_multiple=3)
