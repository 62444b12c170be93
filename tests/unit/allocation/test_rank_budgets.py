"""What a budget of bytes or errors promises of the chosen ranks, against numpy and the stock model."""

from __future__ import annotations

from functools import cache

import numpy as np
import pico
import pytest
import torch
from calibrated_ranks import CHEAP, FULL, SMALL, TEXT, UNIT, by_allocator, calibrate, chosen
from pico import HEAD_DIM, LAYERS
from statistics_by_hand import activations
from torch.nn.functional import cross_entropy

import lowkey
from lowkey.allocation.allocators import RANK_ALLOCATORS, Threshold, UniformRanks
from lowkey.calibration.calibrate import calibration_windows
from lowkey.core.types import Factors, LowkeyError
from lowkey.methods import PCA, Palu, ReCalKV
from lowkey.models import families
from lowkey.storage.codec import LowRank
from lowkey.storage.coded import CodedLayer

HELD = 2


@cache
def rows():
    return calibration_windows(pico.attached("llama"), pico.tokenizer(), TEXT, SMALL)


def output(model, layer, past=None):
    """Of one decoder layer within the whole model, on the held-out windows."""
    seen = []
    hook = model.model.layers[layer].register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        model(rows()[-HELD:], past_key_values=past)
    hook.remove()
    return seen[0]


@cache
def exact_output(layer):
    return output(pico.stock("llama"), layer)


def compressed(layer, factors, layout):
    """A cache of the whole model in which this layer alone is compressed."""
    model = pico.attached("llama")
    past = lowkey.make_cache(model)
    past.layers[layer] = CodedLayer(LowRank(factors, layout, families.rope(model, layer)))
    return past


def layer_error(layer, factors, layout="post_rope"):
    """The relative error of the layer's output, token by token of the held-out windows, their mean; none of
    <s>, whose output is zero.
    """
    out = output(pico.attached("llama"), layer, compressed(layer, factors, layout))
    pairs = zip(out.flatten(0, 1), exact_output(layer).flatten(0, 1), strict=True)
    found = [float((a - b).norm() / b.norm()) if b.any() else 0.0 for a, b in pairs]
    return sum(found) / len(found)


# -- thresholds


@cache
def by_hand(layer, layout="post_rope"):
    """(right singular vectors (h, d, d), energies (h, d)) of keys and of values on the fitting windows, from
    numpy's SVD in fp64.
    """
    found = activations("llama", layer, rows()[:-HELD])
    sides = []
    for name in ("keys_pre" if layout == "pre_rope" else "keys_post", "values"):
        x = found[name].double().numpy()
        _, s, vt = np.linalg.svd(x.transpose(1, 0, 2), full_matrices=False)
        sides.append((vt.transpose(0, 2, 1), s**2))
    return sides


def least(energies, share, power):
    """The least rank that holds this share of every head's energies to the power."""
    ranks = []
    for head in energies:
        shares = np.cumsum(head**power) / np.sum(head**power)
        ranks.append(1 + next(i for i, held in enumerate(shares) if held >= share - 1e-12))
    return max(ranks)


def truncated(layer, pair):
    downs = [
        torch.from_numpy(v[:, :, :r].copy()).float() for (v, _), r in zip(by_hand(layer), pair, strict=True)
    ]
    return Factors(downs[0], downs[0].mT, downs[1], downs[1].mT)


@cache
def path(layer, step, power):
    """(pair, error) at thresholds 1, 1 - step, ..."""
    (_, keys), (_, values) = by_hand(layer)
    pairs = [
        (least(keys, 1 - n * step, power), least(values, 1 - n * step, power)) for n in range(round(1 / step))
    ]
    return [(pair, layer_error(layer, truncated(layer, pair))) for pair in pairs]


@pytest.mark.parametrize(("energy", "power"), [("squared", 1.0), ("singular", 0.5)])
@pytest.mark.parametrize("error", [0.05, 0.15])
def test_thresholds_choose_the_exact_ranks_of_their_definition(energy, power, error):
    plan = calibrate(PCA("per_head", "per_head"), error_budget=error, allocator=Threshold(0.1, energy))
    expected = []
    for layer in range(LAYERS):
        best = (HEAD_DIM, HEAD_DIM)
        for pair, found in path(layer, 0.1, power):
            if found > error:
                break
            best = pair
        expected.append(best)
    assert chosen(plan) == expected
    if error == 0.15:
        assert any(r % 2 for pair in expected for r in pair), "ranks that no grid of eight has"


def test_thresholds_under_bytes_have_the_least_error_that_fits():
    plan = calibrate(PCA("per_head", "per_head"), budget="60%", allocator=Threshold(0.1))
    steps = [path(layer, 0.1, 1.0) for layer in range(LAYERS)]
    for error in sorted(found for layer in steps for _, found in layer):
        expected = []
        for layer in steps:
            within = next((i for i, (_, found) in enumerate(layer) if found > error * (1 + 1e-4)), len(layer))
            expected.append(layer[within - 1][0] if within else (HEAD_DIM, HEAD_DIM))
        if sum(map(sum, expected)) * UNIT <= 0.6 * FULL:
            break
    assert chosen(plan) == expected


# -- what an error budget bounds


def errors_of(plan):
    return [layer_error(i, f, plan.layout) for i, f in plan.factors.items()]


def weights_by_hand():
    raw = [2.0, 1.75, 2.0]  # of three layers, each as near to an end as it can be
    return [w * 3 / sum(raw) for w in raw]


def tails_by_hand(pairs):
    """The share of the singular values beyond the rank, in the mean over heads, of keys and of values in
    every layer.
    """
    found = []
    for layer, pair in enumerate(pairs):
        for (_, energies), rank in zip(by_hand(layer), pair, strict=True):
            singular = np.sqrt(energies)
            found.append(float(np.mean(singular[:, rank:].sum(1) / singular.sum(1))))
    return found


def beyond_by_hand(pairs):
    """The share of all energies that lies beyond the ranks."""
    sides = [
        (energies, rank)
        for layer, pair in enumerate(pairs)
        for (_, energies), rank in zip(by_hand(layer), pair, strict=True)
    ]
    return sum(e[:, rank:].sum() for e, rank in sides) / sum(e.sum() for e, _ in sides)


@pytest.mark.parametrize("error", [0.05, 0.12, 0.3])
@by_allocator
def test_an_error_budget_bounds_what_the_allocator_says(allocator, error):
    plan = calibrate(PCA("per_head", "per_head"), error_budget=error, allocator=allocator)
    told = plan.profile["bounded"]
    assert told["what"] == RANK_ALLOCATORS[allocator].bounds and told["budget"] == error
    assert told["error"] == "the relative error of the layer's output, in the mean over tokens"
    if allocator == "tail":
        assert "tail" in told["what"]
        reached = max(tails_by_hand(chosen(plan))) ** 0.5
    elif allocator == "spectrum":
        assert "share" in told["what"]
        reached = beyond_by_hand(chosen(plan))
    elif allocator == "weighted-pareto":
        assert "weight" in told["what"]
        reached = max(w * e for w, e in zip(weights_by_hand(), errors_of(plan), strict=True))
    else:
        assert told["what"] == "the largest error of a layer"
        reached = max(errors_of(plan))
    assert reached <= error + 1e-5
    assert told["reached"] == pytest.approx(reached, rel=1e-3, abs=1e-5)


@by_allocator
def test_an_error_budget_takes_the_cheapest_ranks_of_its_rule(allocator):
    """A larger budget never costs more bytes, and some budget between saves some."""
    sizes = [calibrate(error_budget=e, allocator=allocator).bytes_per_token(4) for e in (0.05, 0.2, 1.0)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


@pytest.mark.parametrize("allocator", ["uniform", "pareto", "threshold"])
def test_with_judge_loss_an_error_budget_is_in_nats_per_layer(allocator):
    plan = calibrate(error_budget=0.02, allocator=allocator, judge="loss", ranks=4)
    ids = rows()[-HELD:]

    def loss(past):
        with torch.no_grad():
            logits = pico.attached("llama")(ids, past_key_values=past).logits
        return float(cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    whole = loss(lowkey.make_cache(pico.attached("llama")))
    grown = max(loss(compressed(i, f, plan.layout)) - whole for i, f in plan.factors.items())
    assert grown <= 0.02 + 1e-4
    told = plan.profile["bounded"]
    assert told["error"].startswith("nats") and told["reached"] == pytest.approx(max(grown, 0.0), abs=1e-4)
    assert plan.budget == "error 0.02 nats"


def test_nats_may_be_more_than_one_and_relative_errors_may_not():
    assert (
        chosen(calibrate(error_budget=5.0, judge="loss", allocator="uniform", ranks=2)) == [(8, 8)] * LAYERS
    )
    for wrong, judge in (
        (5.0, "layers"),
        (0.0, "loss"),
        (-1.0, "loss"),
        (float("inf"), "loss"),
        (float("nan"), "loss"),
    ):
        with pytest.raises(LowkeyError, match=r"^error budget"):
            calibrate(error_budget=wrong, judge=judge)


def test_a_last_stage_after_the_choice_is_named_beside_the_bound():
    assert (
        "before the method's last stage" in calibrate(ReCalKV(), error_budget=0.3).profile["bounded"]["what"]
    )
    assert "bounded" not in calibrate(budget="50%").profile


# -- what a byte budget promises


@pytest.mark.parametrize("budget", ["93.7%", "1234 B/token", "0.8 KiB/token"])
@pytest.mark.parametrize("method", CHEAP)
def test_one_more_token_never_takes_more_than_the_budget(method, budget):
    """In the cache that is really held, with the method's own layout and allocator."""
    plan = calibrate(CHEAP[method], budget=budget)
    limit = {"93.7%": 0.937 * FULL, "1234 B/token": 1234, "0.8 KiB/token": 0.8 * 1024}[budget]
    past = lowkey.make_cache(pico.attached("llama"), plan=plan)
    held = []
    for ids in pico.prompt(12, batch=1).split([10, 1, 1], dim=1):
        pico.feed(pico.attached("llama"), ids, past)
        for layer in past.layers:  # free slots for later steps are given up
            layer.make_compact()
        held.append(past.nbytes())
    assert held[2] - held[1] == held[1] - held[0] == plan.bytes_per_token(4) <= limit


@by_allocator
@pytest.mark.parametrize("budget", ["29%", "55%", "33.3%", "1111 B/token"])
def test_no_allocator_rounds_above_the_budget(allocator, budget):
    limit = 1111 if "B" in budget else float(budget[:-1]) * FULL / 100
    assert calibrate(allocator=allocator, budget=budget).bytes_per_token(4) <= limit


def test_a_share_is_not_rounded_down_by_floating_point():
    """55 % of 2048 bytes is 1126.4; of 2000 exactly 1100, which 0.55 * 2000 misses by its last digit."""
    from lowkey.core.types import Budget

    assert all(Budget.parse(f"{n}%").bytes_per_token(100) == n for n in range(1, 101))


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ("1.5 GiB", "more than the 1.5 KiB/token of the full cache"),
        ("1 KiB", ": 2 bytes per token .* is below 96"),
        ("512 tokens", "per token"),
        ("1537 B/token", "more than the 1.5 KiB/token of the full cache"),
        ("64 KiB/token", "more than the 1.5 KiB/token of the full cache"),
        ("95 B/token", "is below 96"),
        ("6.2%", "is below 96"),
    ],
)
def test_a_budget_no_ranks_can_meet_is_refused_before_reading(budget, says):
    with pytest.raises(LowkeyError, match=says) as refusal:
        lowkey.calibrate(pico.attached("llama"), None, "", method=Palu(), budget=budget, sinks=0, recent=0)
    assert len(str(refusal.value).splitlines()) == 1
    assert chosen(calibrate(Palu(), budget="96 B/token")) == [(1, 1)] * LAYERS


@pytest.mark.parametrize("allocator", ["greedy", "pareto", UniformRanks("measured")])
def test_budgets_below_the_measured_ranks_are_refused_at_once(allocator):
    """The least measured rank is 2 of 16; the others may choose 1."""
    with pytest.raises(LowkeyError, match=r"7\.0%.*is below 192 \(12\.5%\)"):
        lowkey.calibrate(
            pico.attached("llama"),
            None,
            "",
            method=PCA(),
            budget="7%",
            allocator=allocator,
            sinks=0,
            recent=0,
        )
    assert chosen(calibrate(budget="7%", allocator="uniform")) == [(1, 1)] * LAYERS


def test_exact_tokens_count_in_the_budget_as_documented():
    """Counted for a cache of 100 tokens: in shorter ones they weigh more."""
    plan = calibrate(budget="25%", sinks=2, recent=3, at=100)
    positions = LAYERS * (3 * 8 + 2 * 4)  # three of a row and one of each sink
    held = {}
    for tokens in (20, 100):
        past = lowkey.make_cache(pico.attached("llama"), plan=plan)
        pico.feed(pico.attached("llama"), pico.prompt(tokens, batch=1), past)
        held[tokens] = past.nbytes()
        assert held[tokens] == (3 + 2) * FULL + (tokens - 3) * plan.bytes_per_token(4) + positions
    room = 0.25 * 100 * FULL
    assert room - (100 - 3) * UNIT < held[100] <= room and held[20] > 0.25 * 20 * FULL
