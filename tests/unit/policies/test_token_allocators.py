"""How many tokens each head keeps: apportioning and the allocators against slow, obvious versions."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowkey.core.types import LowkeyError
from lowkey.ops.apportion import apportion
from lowkey.policies.allocators import (
    TOKEN_ALLOCATORS,
    Ada,
    AtLeast,
    Blocks,
    Classes,
    Global,
    HeadKV,
    Pyramid,
    UniformTokens,
)
from lowkey.policies.sharing import AllocationRequest

quick = settings(max_examples=40, deadline=None)
EXACT = ["uniform", "pyramid", "ada", "global", "layer-mass", "headkv"]
ALL = [*EXACT, "blocks"]  # blocks stay whole, so that their total may be below the share


# -- apportion


def whole(numbers):
    return torch.tensor(numbers, dtype=torch.long)


def water_filled(weights, total, low, high, base=0.0):
    """The real-valued shares clip(base + mu w, low, high) that add up to `total`, by walking from corner to
    corner.
    """
    weights, base, total = (
        [Fraction(w) for w in weights],
        Fraction(base),
        min(max(total, sum(low)), sum(high)),
    )

    def at(mu):
        return [min(max(base + mu * w, a), b) for w, a, b in zip(weights, low, high, strict=True)]

    corners = {
        (bound - base) / w for w, *bounds in zip(weights, low, high, strict=True) if w for bound in bounds
    }
    corners = sorted({Fraction(0), *(c for c in corners if c > 0)})
    for left, right in itertools.pairwise(corners):
        below, above = sum(at(left)), sum(at(right))
        if below <= total <= above:
            return at(left + (right - left) * (total - below) / (above - below) if above > below else left)
    return at(corners[-1])


heads = st.lists(
    st.tuples(st.floats(0.01, 10), st.integers(0, 12), st.integers(0, 40)), min_size=1, max_size=12
)


@quick
@given(heads, st.integers(0, 500))
def test_shares_are_water_filled_and_rounded(drawn, total):
    weights, low, high = [w for w, *_ in drawn], [a for _, a, _ in drawn], [a + more for _, a, more in drawn]
    counts = apportion(torch.tensor(weights), total, whole(low), whole(high)).tolist()
    assert sum(counts) == min(max(total, sum(low)), sum(high))
    assert all(a <= c <= b for a, c, b in zip(low, counts, high, strict=True))
    shares = water_filled(torch.tensor(weights).tolist(), total, low, high)
    assert all(abs(c - share) < 1 + 1e-4 for c, share in zip(counts, shares, strict=True))


@quick
@given(heads, st.floats(0, 6), st.integers(0, 500))
def test_shares_on_top_of_a_base(drawn, base, extra):
    weights, low, high = [w for w, *_ in drawn], [a for _, a, _ in drawn], [a + more for _, a, more in drawn]
    total = round(base * len(drawn)) + extra
    counts = apportion(torch.tensor(weights), total, whole(low), whole(high), base).tolist()
    assert sum(counts) == min(max(total, sum(low)), sum(high))
    assert all(a <= c <= b for a, c, b in zip(low, counts, high, strict=True))
    shares = water_filled(torch.tensor(weights).tolist(), total, low, high, base)
    if sum(shares) == sum(counts):  # else the base alone is more than the total, and no mu fits
        assert all(abs(c - share) < 1 + 1e-4 for c, share in zip(counts, shares, strict=True))


def test_a_base_above_the_total_is_taken_back_evenly():
    counts = apportion(torch.ones(4), 10, whole([0, 0, 0, 4]), whole([9] * 4), 5.0)
    assert counts.tolist() == [2, 2, 2, 4]


@quick
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=10), st.integers(0, 200))
def test_more_weight_never_gives_less(weights, total):
    counts = apportion(
        torch.tensor(weights), total, whole([1] * len(weights)), whole([20] * len(weights))
    ).tolist()
    pairs = itertools.product(zip(torch.tensor(weights).tolist(), counts, strict=True), repeat=2)
    assert all(a <= b + (w == v) for (w, a), (v, b) in pairs if w <= v)


def test_heads_of_no_weight_share_only_what_nobody_else_can_take():
    high = whole([10] * 4)
    assert apportion(torch.tensor([0.0, 3.0, 0.0, 1.0]), 14, whole([1] * 4), high).tolist() == [1, 9, 1, 3]
    assert apportion(torch.tensor([0.0, 3.0, 0.0, 1.0]), 30, whole([1] * 4), high).tolist() == [5, 10, 5, 10]
    assert apportion(torch.zeros(4), 6, whole([0] * 4), high).tolist() == [2, 2, 1, 1]


def test_one_head_takes_it_all():
    for total, count in ((0, 2), (5, 5), (99, 9)):
        assert apportion(torch.tensor([0.3]), total, whole([2]), whole([9])).tolist() == [count]


def test_whole_shares_stay_as_they_are_in_a_large_cache():
    counts = torch.randint(0, 100_000, (80 * 8,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        apportion(counts.double(), int(counts.sum()), torch.zeros_like(counts), counts + 5), counts
    )


# -- allocators


def request(n, h, tokens, mean, protected=0, gaps=0, first=0, layers=None, seed=0):
    """Distinct random scores; the last `protected` tokens stay in any case; of every head up to `gaps` are
    missing.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randperm(n * h * tokens, generator=generator).view(n, h, tokens).float()
    missing = torch.randint(0, gaps + 1, (n, h), generator=generator).unsqueeze(-1)
    scores = scores.masked_fill(torch.arange(tokens) < missing.clamp_max(tokens - protected), -torch.inf)
    scores[..., tokens - protected :] = torch.inf
    return AllocationRequest(scores, mean, tokens, first, layers or n)


def layerwise(n, h, tokens, mean, protected=0, gaps=0, seed=0):
    """The same cache, asked about layer by layer."""
    return [request(1, h, tokens, mean, protected, gaps, i, n, seed + i) for i in range(n)]


def made(name, layers, h):
    importance = torch.rand(layers, h, generator=torch.Generator().manual_seed(layers)).pow(3).tolist()
    return HeadKV(importance=tuple(map(tuple, importance))) if name == "headkv" else TOKEN_ALLOCATORS[name]()


def questions(split, *shape, **options):
    return [request(*shape, **options)] if split.scope == "cache" else layerwise(*shape, **options)


sizes = {
    "n": st.integers(1, 4),
    "h": st.integers(1, 4),
    "tokens": st.integers(6, 30),
    "mean": st.floats(1, 40),
    "seed": st.integers(0, 99),
}


@pytest.mark.parametrize("name", EXACT)
@quick
@given(**sizes, protected=st.integers(0, 6))
def test_totals_are_exact_over_the_whole_cache(name, n, h, tokens, mean, protected, seed):
    split = made(name, n, h)
    asks = questions(split, n, h, tokens, mean, protected=protected, seed=seed)
    counts = torch.cat([split.counts(a) for a in asks])
    assert counts.shape == (n, h)
    assert int(counts.sum()) == max(round(min(mean, tokens) * n * h), protected * n * h)
    assert bool((counts >= protected).all()) and bool((counts <= tokens).all())


@pytest.mark.parametrize("name", ALL)
@quick
@given(**sizes, protected=st.integers(0, 6), gaps=st.integers(1, 30))
def test_shares_of_heads_stay_between_their_bounds(name, n, h, tokens, mean, protected, gaps, seed):
    split = made(name, n, h)
    for a in questions(split, n, h, tokens, mean, protected=protected, gaps=gaps, seed=seed):
        counts = split.counts(a)
        assert bool((counts >= a.minimum).all()) and bool((counts <= a.maximum).all())
        if name in ("uniform", "ada", "global"):
            assert int(counts.sum()) == min(max(a.share(), int(a.minimum.sum())), int(a.maximum.sum()))


@pytest.mark.parametrize("name", ALL)
def test_a_budget_of_everything_keeps_everything(name):
    split = made(name, 2, 3)
    for a in questions(split, 2, 3, 21, 99.0, protected=4, gaps=5):
        assert torch.equal(split.counts(a), a.maximum)


@pytest.mark.parametrize("name", ALL)
def test_a_budget_below_what_is_protected_keeps_just_that(name):
    split = made(name, 2, 3)
    for a in questions(split, 2, 3, 16, 2.0, protected=5):
        assert torch.equal(split.counts(a), a.minimum)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("n", "h"), [(1, 1), (1, 4), (4, 1)])
def test_one_layer_or_one_head(name, n, h):
    split = made(name, n, h)
    counts = torch.cat([split.counts(a) for a in questions(split, n, h, 20, 7.0, protected=3)])
    assert int(counts.sum()) == 7 * n * h


@quick
@given(**sizes)
def test_layers_shares_add_up(n, h, tokens, mean, seed):
    shares = [a.share() for a in layerwise(n, h, tokens, mean)]
    assert sum(shares) == round(min(mean, tokens) * n * h) == request(n, h, tokens, mean).share()
    assert max(shares) - min(shares) <= 1


@pytest.mark.defines("token allocators", "uniform")
@quick
@given(**sizes, protected=st.integers(0, 6))
def test_uniform_gives_all_the_same_up_to_one(n, h, tokens, mean, protected, seed):
    counts = torch.cat(
        [UniformTokens().counts(a) for a in layerwise(n, h, tokens, mean, protected, seed=seed)]
    )
    assert int(counts.max() - counts.min()) <= 1


@pytest.mark.defines("token allocators", "pyramid")
@pytest.mark.parametrize(("mean", "beta"), [(40.0, 20.0), (40.0, 2.0), (33.3, 5.0), (12.7, 20.0)])
def test_pyramid_falls_on_a_straight_line(mean, beta):
    layers, h, protected = 6, 2, 12
    counts = torch.cat([Pyramid(beta).counts(a) for a in layerwise(layers, h, 200, mean, protected)])
    b = mean - protected
    line = [
        protected + b * (2 - 1 / beta) + (b / beta - b * (2 - 1 / beta)) * i / (layers - 1)
        for i in range(layers)
    ]
    assert int(counts.sum()) == round(mean * layers * h)
    torch.testing.assert_close(
        counts.double(), torch.tensor(line).unsqueeze(1).expand(-1, h).double(), rtol=0, atol=1
    )
    assert bool((counts[0] > counts[-1]).all())


def test_pyramid_gives_on_what_its_lowest_layers_cannot_take():
    counts = torch.cat([Pyramid().counts(a) for a in layerwise(4, 2, 20, 15.0, 4)])
    assert counts[0].tolist() == [20, 20] and int(counts.sum()) == 15 * 4 * 2


def best_over(scores, total):
    """How many of the `total` best of all scores (n, h, s) lie in each head."""
    places = itertools.product(*map(range, scores.shape))
    chosen = sorted(places, key=lambda at: -float(scores[at]))[:total]
    counts = torch.zeros(scores.shape[:2])
    for layer, head, _ in chosen:
        counts[layer, head] += 1
    return counts


@pytest.mark.defines("token allocators", "ada")
@quick
@given(
    st.integers(1, 4),
    st.integers(8, 30),
    st.floats(6, 30),
    st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    st.integers(0, 99),
)
def test_ada_counts_the_layers_best_and_deals_a_part_equally(h, tokens, mean, alpha, seed):
    a = request(1, h, tokens, mean, protected=6, seed=seed)
    best = best_over(a.scores, a.share())
    counts = Ada(alpha).counts(a)
    assert int(counts.sum()) == a.share()
    assert bool(((counts - ((1 - alpha) * best + alpha * best.mean())).abs() < 1 + 1e-6).all())
    if alpha == 0:
        assert torch.equal(counts.float(), best)


def test_adas_safeguard_holds_for_a_head_without_a_chance():
    a = request(1, 2, 100, 20.0, protected=4)
    a.scores[0, 0, :96] -= 1e6
    assert Ada(0.0).counts(a).tolist() == [[4, 36]]
    assert Ada(0.25).counts(a).tolist() == [[8, 32]]


@pytest.mark.defines("token allocators", "global")
@quick
@given(**sizes, protected=st.integers(0, 4), gaps=st.integers(0, 10))
def test_global_is_one_threshold(n, h, tokens, mean, protected, gaps, seed):
    a = request(n, h, tokens, mean, protected, gaps, seed=seed)
    total = min(max(a.share(), int(a.minimum.sum())), int(a.maximum.sum()))
    assert torch.equal(Global().counts(a).float(), best_over(a.scores, total))


@pytest.mark.defines("token allocators", "headkv")
@quick
@given(st.integers(1, 4), st.integers(1, 4), st.floats(14, 40), st.floats(1, 10), st.integers(0, 99))
def test_headkv_is_its_published_rule_where_nothing_is_clipped(n, h, mean, beta, seed):
    protected, tokens = 12, 10_000
    weights = torch.rand(n, h, generator=torch.Generator().manual_seed(seed)).double()
    split = HeadKV(beta=beta, importance=tuple(map(tuple, weights.tolist())))
    counts = torch.cat([split.counts(a) for a in layerwise(n, h, tokens, mean, protected)])
    take = (mean - protected) / beta
    rule = weights / weights.sum() * take * n * h + (mean - protected - take) + protected
    assert int(counts.sum()) == round(mean * n * h)
    assert bool(((counts - rule).abs() < 1 + 1e-3).all())


def test_headkv_gives_on_what_a_strong_head_cannot_take():
    split = HeadKV(beta=1.0, importance=((8.0, 1.0), (1.0, 0.0)))
    counts = torch.cat([split.counts(a) for a in layerwise(2, 2, 10, 5.0, 2)])
    assert counts.tolist() == [[10, 4], [4, 2]]
    shares = water_filled([8, 1, 1, 0], 20, [2] * 4, [10] * 4, 2)
    assert counts.flatten().tolist() == [round(x) for x in shares]


def test_headkv_shares_spare_tokens_with_other_heads():
    split = HeadKV(beta=1.0, importance=((3.0, 1.0),))
    a = request(1, 2, 40, 12.0, protected=4)
    a.scores[0, 0, :30] = -torch.inf  # the strong head holds ten
    assert split.counts(a).tolist() == [[10, 14]]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Pyramid, {"beta": 0.0}),
        (Ada, {"alpha": 1.5}),
        (Ada, {"alpha": -0.1}),
        (Global, {"alpha": -1.0}),
        (Blocks, {"size": 0}),
    ],
)
def test_allocators_refuse_options_out_of_range(kind, options):
    with pytest.raises(LowkeyError, match=next(iter(options))):
        kind(**options)


@quick
@given(
    st.integers(2, 6),
    st.integers(1, 4),
    st.floats(14, 40),
    st.floats(1, 10),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_a_floor_is_taken_from_other_layers_in_proportion(n, h, mean, beta, floor, seed):
    protected, tokens = 12, 10_000
    weights = torch.rand(n, h, generator=torch.Generator().manual_seed(seed)).double()
    weights[0] = 0
    given_ = tuple(map(tuple, weights.tolist()))
    free, floored = (
        torch.cat(
            [
                HeadKV(beta=beta, floor=f, importance=given_).counts(a)
                for a in layerwise(n, h, tokens, mean, protected)
            ]
        )
        for f in (0.0, floor)
    )
    assert int(floored.sum()) == int(free.sum()) == round(mean * n * h)
    own, least = floored.sum(1), (protected + floor * (mean - protected)) * h
    assert bool((own >= least - h).all()), "whole numbers: at most one less for each head"
    assert bool((own >= free.sum(1).minimum(torch.tensor(int(least))) - h).all())
    if floor == 0:
        assert torch.equal(free, floored)


def test_what_a_floor_adds_is_dealt_evenly_within_the_layer():
    split = HeadKV(beta=1.0, floor=1.0, importance=((8.0, 2.0), (0.0, 0.0), (3.0, 1.0)))
    counts = torch.cat([split.counts(a) for a in layerwise(3, 2, 100, 20.0, 0)])
    assert counts.tolist() == [[32, 8], [20, 20], [29, 11]], (
        "of 120: 3/14 and 1/14, and (1/3 - 4/14) / 2 for each"
    )


def test_a_floor_by_hand():
    """Layers have 90, 10 and 0 % of the scores; with a floor of a half each gets at least 50 of the 300: 50,
    50, and 200 for the first.
    """
    split = HeadKV(beta=1.0, floor=0.5, importance=((0.9,), (0.1,), (0.0,)))
    counts = torch.cat([split.counts(a) for a in layerwise(3, 1, 1000, 100.0, 0)])
    assert counts.flatten().tolist() == [200, 50, 50]


def test_missing_scores_are_named_with_the_command_for_them():
    with pytest.raises(LowkeyError) as refusal:
        Classes().with_head_scores({"r2": [[1.0]]})
    said = str(refusal.value)
    assert "needs head scores of kind 'induction' and 'echo', and there are 'r2'; " in said
    assert (
        "`lowkey heads MODEL --kind induction --out induction.json` and `lowkey heads MODEL --kind echo "
        "--out echo.json`" in said
    )
    assert said.endswith("then pass --heads induction.json --heads echo.json")


def test_headkv_asks_for_importance_that_fits():
    with pytest.raises(LowkeyError, match="beta"):
        HeadKV(beta=0.5)
    with pytest.raises(LowkeyError, match="copy"):
        HeadKV("copy").with_head_scores({"r2": [[1.0]]})
    with pytest.raises(LowkeyError, match="importance"):
        HeadKV(importance=((1.0, 2.0),)).counts(request(1, 3, 9, 4.0))
    assert HeadKV("r2").with_head_scores({"r2": [[1.0, 2.0]]}).importance == ((1.0, 2.0),)


def whole_blocks(a, size):
    """Counts (n, h): beyond what stays in any case, each head's tokens in order of score, in blocks; those of
    best last tokens that fit.
    """
    blocks, free, counts = [], a.share() - int(a.minimum.sum()), a.minimum.clone()
    for layer, head in itertools.product(*map(range, counts.shape)):
        there = sorted((x for x in a.scores[layer, head].tolist() if abs(x) < torch.inf), reverse=True)
        blocks += [(there[i : i + size], layer, head) for i in range(0, len(there), size)]
    for tokens, layer, head in sorted(blocks, key=lambda block: -block[0][-1]):
        if (free := free - len(tokens)) < 0:
            break
        counts[layer, head] += len(tokens)
    return counts


@pytest.mark.defines("token allocators", "blocks")
@quick
@given(**sizes, size=st.integers(1, 8), protected=st.integers(0, 6), gaps=st.integers(0, 10))
def test_blocks_drop_whole_blocks_and_stay_within_the_budget(n, h, tokens, mean, seed, size, protected, gaps):
    a = request(n, h, tokens, mean, protected, gaps, seed=seed)
    counts = Blocks(size).counts(a)
    assert torch.equal(counts, whole_blocks(a, size))
    assert bool((((counts - a.minimum) % size == 0) | (counts == a.maximum)).all())
    most = min(max(a.share(), int(a.minimum.sum())), int(a.maximum.sum()))
    assert most - size < int(counts.sum()) <= most


def test_blocks_of_one_token_equal_the_global_allocator():
    a = request(2, 3, 20, 7.0, protected=3)
    assert torch.equal(Blocks(1).counts(a), Global().counts(a))


@pytest.mark.defines("token allocators", "classes")
@quick
@given(st.integers(1, 4), st.integers(1, 4), st.floats(6, 40), st.integers(0, 99))
def test_retrieval_heads_take_all_and_others_share_the_rest(n, h, mean, seed):
    protected, tokens = 5, 40
    retrieval = torch.rand(n, h, generator=torch.Generator().manual_seed(seed)) < 0.3
    split = Classes(importance=tuple(map(tuple, retrieval.double().tolist())))
    counts = torch.cat([split.counts(a) for a in layerwise(n, h, tokens, mean, protected)])
    total, best = round(min(mean, tokens) * n * h), int(retrieval.sum())
    top = min(tokens, (total - protected * (n * h - best)) / best) if best else 0
    rest = (total - top * best) / (n * h - best) if best < n * h else 0
    assert int(counts.sum()) == total
    assert bool(((counts - torch.where(retrieval, top, rest)).abs() < 1 + 1e-3).all())


@pytest.mark.defines("token allocators", "at-least")
def test_a_level_keeps_all_above_it_and_what_stays_in_any_case():
    a = request(2, 3, 20, 1.0, protected=4, gaps=5)
    assert torch.equal(
        AtLeast(score=50.0).counts(a),
        torch.tensor([[sum(x >= 50 for x in head) for head in layer] for layer in a.scores.tolist()]),
    )
