"""The parts of the planner by hand: curves of costs, composed plans, memory, and which choice is best."""

from __future__ import annotations

import math
from dataclasses import replace

import pico
import pytest
import torch
from pico import attached, feed, prompt

import lowkey
from lowkey.core.types import LowkeyError
from lowkey.planner.candidates import AXES, Candidate, Composer, policy_keeping, share_of_tokens
from lowkey.planner.costs import AxisCosts, Curve
from lowkey.planner.memory import Memory, in_words, least_bytes, sliding_bytes, weights_bytes
from lowkey.planner.plan_for import RANK_BITS, _best, _combined, check_policy, plan_for
from lowkey.storage.packing import NO_BITS

TOKENS = 160
RATE = pico.LAYERS * 2 * 4 * pico.HEAD_DIM * 4  # bytes of a token of the full cache in fp32


# -- costs


def test_a_curve_is_straight_in_logarithms():
    curve = Curve.of({4.0: 0.01, 1.0: 0.16})
    assert curve.at(2.0) == pytest.approx(0.04)  # KL falls with the square of what is kept
    assert curve.at(1.0) == pytest.approx(0.16) and curve.at(4.0) == pytest.approx(0.01)
    assert curve.at(8.0) == pytest.approx(0.0025), "beyond the ends, along the last slope"
    assert curve.at(0.5) == pytest.approx(0.64)


def test_a_curve_of_three_points_takes_the_slope_beside():
    curve = Curve.of({1.0: 1.0, 2.0: 0.5, 4.0: 0.125})
    assert curve.at(math.sqrt(2)) == pytest.approx(math.sqrt(0.5))
    assert curve.at(math.sqrt(8)) == pytest.approx(0.25)


def test_a_combination_costs_the_sum():
    costs = AxisCosts({"int8": Curve.of({10.0: 0.2, 20.0: 0.1})}, Curve.of({0.5: 0.3, 1.0: 0.1}))
    assert costs.predicted("int8", 10.0, 1.0) == pytest.approx(0.2)
    assert costs.predicted("int8", 10.0, 0.5) == pytest.approx(0.5)
    assert replace(costs, tokens=None).predicted("int8", 20.0, 0.5) == pytest.approx(0.1)


# -- candidates


@pytest.fixture(scope="module")
def composer() -> Composer:
    """Fits plans of random orthonormal maps whose ranks fill the budget."""
    model = attached("llama")

    def fit(budget, bits, recent):
        best = None
        for rank in range(1, pico.HEAD_DIM + 1):
            plan = pico.plan(
                model, rank, rank, bits=None if bits == NO_BITS else bits, sinks=4, recent=recent
            )
            held = Composer(model, fit, policy_keeping("snapkv"), TOKENS).held(plan)
            best = plan if held <= budget.amount else best
        if best is None:
            raise LowkeyError("budget: too small")
        return best

    return Composer(model, fit, policy_keeping("snapkv"), TOKENS)


@pytest.mark.parametrize("bits", RANK_BITS)
@pytest.mark.parametrize("tokens", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_composed_plan_holds_the_budget(composer, bits, tokens, share):
    budget = share * RATE * TOKENS
    plan = composer.compose(Candidate(bits, tokens, True), budget)
    if plan is None:
        assert composer.held(composer.without_ranks(bits, tokens)) <= budget or budget < RATE * 72
        return
    cache = lowkey.make_cache(composer.model, plan)
    with torch.no_grad():
        feed(composer.model, prompt(TOKENS, batch=1), cache)
    assert cache.nbytes() <= budget + 3
    assert bool(plan.policy) == (tokens < 1) and (plan.bits or NO_BITS) == bits


def test_dropping_tokens_alone_fills_the_budget(composer):
    budget = 0.4 * RATE * TOKENS
    plan = composer.without_ranks(NO_BITS, share_of_tokens(composer, budget))
    cache = lowkey.make_cache(composer.model, plan)
    with torch.no_grad():
        feed(composer.model, prompt(TOKENS, batch=1), cache)
    assert 0.98 * budget <= cache.nbytes() <= budget + 3


@pytest.mark.parametrize(
    ("share", "packings"),
    [
        (0.5, []),  # which all hold every token
        (0.35, ["kivi8", "int8"]),
        (0.25, ["kivi8", "kivi4", "int8"]),
        (0.15, ["kivi8", "kivi4", "int8"]),
        (0.1, ["kivi8", "kivi4", "int8"]),
        (0.06, ["int8"]),  # the window of the others takes 7.5 %
        (0.04, ["int8"]),
    ],
)
def test_packed_and_evicted_fills_the_budget(composer, share, packings):
    """Without ranks, each packing that is too large alone has as many tokens as fit."""
    composer = replace(composer, tokens=480)
    budget = share * RATE * 480
    found = _combined(composer, budget, ("bits", "tokens"), None, "")
    assert all(c.axes == ("bits", "tokens") and not p.factors for c, p in found.items())
    assert [c.bits for c in found] == packings
    for plan in found.values():
        cache = lowkey.make_cache(composer.model, plan)
        with torch.no_grad():
            feed(composer.model, prompt(480, batch=1), cache)
        # what is planned for rows of blocks has room for a last block that is all but empty
        assert (0.85 if plan.bits.startswith("kivi") else 0.99) * budget <= cache.nbytes() <= budget + 3
        assert composer.held(plan) >= 0.99 * budget


def test_a_packing_and_dropping_tokens_alone_combine_nothing(composer):
    for axes in (("bits",), ("tokens",)):
        assert _combined(composer, 0.2 * RATE * TOKENS, axes, None, "") == {}


def test_axes_of_candidates():
    assert Candidate(NO_BITS, 1.0, False).axes == ()
    assert Candidate("int8", 1.0, True).axes == ("rank", "bits")
    assert Candidate(NO_BITS, 0.5, False).axes == ("tokens",)


# -- the length


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (0, "tokens 0: must be at least 1"),
        (-5, "tokens -5: must be at least 1"),
        (1.5, "tokens 1.5: must be a whole number"),
        ("1024", "tokens '1024': must be a whole number"),
        (True, "tokens True: must be a whole number"),
        (513, "tokens 513: the model has 512 positions; give at most that"),
    ],
)
def test_a_length_that_no_sequence_has_is_refused(tokens, says):
    with pytest.raises(LowkeyError) as refusal:
        plan_for(attached("llama"), pico.tokenizer(), keep="100%", tokens=tokens)
    assert str(refusal.value).startswith(says) and "\n" not in str(refusal.value)


def test_the_usual_length_is_no_longer_than_the_model():
    model = attached("llama")
    assert plan_for(model, pico.tokenizer(), keep="100%").profile["at"] == 512
    assert plan_for(model, pico.tokenizer(), keep="100%", tokens=512).profile["at"] == 512


# -- memory


def test_weights_count_each_storage_once():
    model = pico.build("llama", tie_word_embeddings=True)
    buffers = sum(b.nbytes for b in {b.data_ptr(): b for b in model.buffers()}.values())
    assert weights_bytes(model) == sum(p.nbytes for p in set(model.parameters())) + buffers
    untied = pico.build("llama", tie_word_embeddings=False)
    assert weights_bytes(untied) == weights_bytes(model) + pico.VOCAB * pico.HIDDEN * 4


@pytest.mark.parametrize("tokens", [8, 15, 16, 200])
def test_sliding_layers_hold_their_window(tokens):
    model = attached("gemma2")
    cache = lowkey.make_cache(model)
    with torch.no_grad():
        feed(model, prompt(tokens, batch=1), cache)
    held = sum(layer.nbytes() for layer in cache.layers if layer.is_sliding)
    assert sliding_bytes(model, tokens) == held > 0


def test_memory_by_hand():
    model = attached("llama")
    room = Memory.of(model, 100, 3)
    assert room.full == 100 * RATE
    budget = room.for_a_sequence(room.weights + 3 * 50_000, AXES, "snapkv", RANK_BITS)
    assert (budget.amount, budget.unit) == (50_000, "bytes")
    with pytest.raises(LowkeyError, match=r"weights of the model alone take"):
        room.for_a_sequence(room.weights, AXES, "snapkv", RANK_BITS)
    least = least_bytes(model, 100, ("bits",), "snapkv", RANK_BITS)
    with pytest.raises(LowkeyError) as refusal:
        room.for_a_sequence(room.weights + 2 * least, ("bits",), "snapkv", RANK_BITS)
    assert "or 2 sequences" in str(refusal.value) and "a context of" in str(refusal.value)
    exactly = room.weights + 3 * least
    assert room.for_a_sequence(exactly, ("bits",), "snapkv", RANK_BITS).amount == least


def test_the_least_of_dropping_tokens_is_what_is_always_kept():
    model = attached("llama")
    least = least_bytes(model, 400, ("tokens",), "snapkv", RANK_BITS)
    always = 4 + 8  # sinks and recent tokens of the policy
    assert always * RATE <= least <= 1.2 * always * RATE


@pytest.mark.parametrize(
    ("size", "up", "words"),
    [(1536, False, "1.5 KiB"), (2**31, False, "2 GiB"), (7, False, "7 B"), (1025, True, "1.01 KiB")],
)
def test_bytes_in_words(size, up, words):
    assert in_words(size, up) == words


# -- the choice


def row(axes, kl, recall):
    return {"axes": axes.split("+"), "kl": kl, "recall": recall}


def test_the_best_recalls_what_the_best_single_axis_recalls():
    single, worse = row("bits", 0.2, 0.8), row("rank", 0.3, 1.0)
    forgets, keeps = row("rank+bits+tokens", 0.05, 0.7), row("rank+bits", 0.1, 0.8)
    assert _best([single, worse, forgets, keeps]) is keeps
    assert _best([single, worse, forgets]) is single
    assert _best([row("bits", 0.2, None), row("rank+bits", 0.1, None)])["kl"] == 0.1


@pytest.mark.parametrize(
    ("policy", "axes", "says"),
    [
        ("snapkw", AXES, "did you mean 'snapkv'"),
        ("think", AXES, "axis tokens alone"),
        ("headkv-r2", AXES, "head"),
    ],
)
def test_policies_that_a_plan_cannot_hold(policy, axes, says):
    with pytest.raises(LowkeyError, match=says):
        check_policy(policy, axes)
    check_policy("think", ("tokens",))
