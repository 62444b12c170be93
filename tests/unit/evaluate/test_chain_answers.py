"""Chains written over caches, against greedy writing by the model alone; the paired bootstrap by hand."""

from __future__ import annotations

import random
import statistics

import pytest
import torch

from lowkey.core.intervals import paired_bootstrap
from lowkey.evaluate.chains import measure_chains, summary_of_chains
from lowkey.evaluate.settings import evicted, full
from lowkey.heads.chains import ChainTask, draw_chains
from lowkey.models.loading import load
from lowkey.policies import POLICIES

TASK = ChainTask(pairs=4, shortest=2, longest=3)


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", "float32", "cpu")


@torch.no_grad()
def greedy(model, prompt, most):
    ids = list(prompt)
    while len(ids) < len(prompt) + most:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("at_once", [1, 4])
def test_greedy_answers_over_the_full_cache_are_the_models_own(tiny, at_once):
    model, tokenizer = tiny
    chains = draw_chains(tokenizer, 4, task=TASK, length=40)
    settings = [full(model), evicted(model, POLICIES["streamingllm"]("35%", every=1), "streamingllm", 40)]
    found = measure_chains(
        model, tokenizer, settings, chains, samples=2, temperature=0, most=6, at_once=at_once
    )
    assert list(found) == [s.name for s in settings]
    for chain, case in zip(chains, found["full"], strict=True):
        said = tokenizer.decode(greedy(model, chain.prompt, 6))
        ended = "." in said or tokenizer.eos_token in said
        assert case["right"] == [chain.right(said)] * 2 and case["links"] == [chain.links(said)] * 2
        assert case["over"] == [not ended] * 2 and (ended or case["tokens"] == [6, 6])
    shares = [b["held"] / a["held"] for a, b in zip(*found.values(), strict=True)]
    assert all(share < 0.5 for share in shares)


def test_samples_depend_on_the_seed_and_not_on_the_setting(tiny):
    chains = draw_chains(tiny[1], 2, task=TASK, length=40)

    def lengths(seed):
        setting = full(tiny[0])
        found = measure_chains(*tiny, [setting], chains, samples=4, most=8, seed=seed)
        return [(case["tokens"], case["links"], case["right"]) for case in found[setting.name]]

    assert lengths(0) == lengths(0)


def test_a_measurement_is_taken_once(tiny):
    known, chains = {}, draw_chains(tiny[1], 2, task=TASK, length=40)

    def once(name, measure):
        if name not in known:
            known[name] = measure()
        return known[name]

    first = measure_chains(*tiny, [full(tiny[0])], chains, samples=2, most=4, once=once)
    again = measure_chains(*tiny, [full(tiny[0])], chains, samples=2, most=4, seed=9, once=once)
    assert first == again and known


def test_a_summary_has_means_and_paired_differences():
    case = {"links": [1, 3], "tokens": [4, 6], "held": 100.0}
    measured = {
        "a": [
            {**case, "right": [True, True], "over": [False, True]},
            {**case, "right": [True, False], "over": [False, False]},
        ],
        "b": [{**case, "right": [False, False], "over": [False, False]}] * 2,
    }
    told = summary_of_chains(measured, "b", draws=200)
    assert (told["a"]["accuracy"], told["a"]["over_length"], told["a"]["links"]) == (0.75, 0.25, 2)
    assert told["a"]["tokens"] == 5 and told["a"]["held"] == 100
    assert told["a"]["difference"] == [0.75, 0.5, 1.0] and told["b"]["difference"] == [0, 0, 0]


def test_the_paired_bootstrap_knows_the_spread_of_a_mean():
    rng = random.Random(0)
    common = [rng.gauss(0, 5) for _ in range(400)]
    values, others = ([c + rng.gauss(shift, 1) for c in common] for shift in (0.5, 0.0))
    mean, low, high = paired_bootstrap(values, others)
    spread = statistics.stdev([a - b for a, b in zip(values, others, strict=True)]) / 20
    assert mean == pytest.approx(statistics.fmean(values) - statistics.fmean(others))
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.1)
    assert low < mean < high
    assert paired_bootstrap(values, others, seed=1) != paired_bootstrap(values, others, seed=2)
