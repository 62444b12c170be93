"""DynaKV: training of the gates that choose the rank of every token."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache

import pico
import pytest
import torch
from dynamic_plans import LEVELS, TEXT, make_plan
from pico import HEAD_DIM, attached, feed, stock
from torch import Tensor

from lowkey.cache.cache import make_cache
from lowkey.calibration.calibrate import Sample
from lowkey.calibration.dynamic import make_dynamic_plan
from lowkey.calibration.statistics import gather_statistics
from lowkey.core.types import LowkeyError
from lowkey.methods import dynakv
from lowkey.methods.dynakv import GateTraining, ObservedReconstruction, levels_of, train_gates
from lowkey.models import families
from lowkey.plan.plan import Plan
from lowkey.probes import model_probe
from lowkey.storage.bucketed import BucketedLayer, Gate

CYCLE = torch.stack([torch.arange(40).add(i).mul(5).remainder(23).add(1) for i in range(10)])
HELD = 3
SHORT = GateTraining(target=0.3, steps=40, lr=2e-2, hidden=8)


@cache
def found_bases(layout: str, name: str = "llama"):
    return {
        i: dynakv.pca_bases(s, layout)
        for i, s in gather_statistics(attached(name), CYCLE[:-HELD].split(4)).items()
    }


@cache
def trained(layout: str, options: GateTraining = SHORT, name: str = "llama"):
    return train_gates(attached(name), found_bases(layout, name), CYCLE, HELD, layout, options)


def measured(plan: Plan, ids: Tensor, name: str = "llama") -> tuple[float, float]:
    """(KL(original || cache) per token, the mean share of coordinates held) by a real cache, all levels
    counted.
    """
    model = attached(name)
    past = make_cache(model, plan)
    ours, theirs = feed(model, ids, past).softmax(-1), feed(stock(name), ids).softmax(-1)
    held = [
        n * r
        for layer in past.layers
        if isinstance(layer, BucketedLayer)
        for n, r in zip(layer.counts, LEVELS, strict=True)
    ]
    return float((theirs * (theirs / ours).log()).sum(-1).mean()), sum(held) / (
        len(plan.factors) * ids.numel() * HEAD_DIM
    )


def plan_of(gates: dynakv.TrainedGates, layout: str, name: str = "llama") -> Plan:
    factors = {i: b.at(HEAD_DIM, HEAD_DIM) for i, b in found_bases(layout, name).items()}
    plan = make_plan(name, layout)
    return replace(plan, factors=factors, token_ranks=replace(plan.token_ranks, gates=gates.gates))


def test_levels_are_halved_ranks():
    assert levels_of(128) == (128, 64, 32, 16) and levels_of(20) == (20, 10, 5) and levels_of(7) == (7,)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_training_judges_what_the_cache_does(name, layout):
    """On the held-out windows, share and divergence are those of a real cache; and the target is met."""
    gates = trained(layout, SHORT, name)
    divergence, share = measured(plan_of(gates, layout, name), CYCLE[-HELD:], name)
    assert share == pytest.approx(gates.share, abs=1e-5) and share <= SHORT.target + 1e-5
    assert divergence == pytest.approx(gates.divergence, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("straight", [False, True])
def test_training_lowers_the_divergence_at_the_same_budget(layout, straight):
    start, end = trained(layout, replace(SHORT, steps=0)), trained(layout, replace(SHORT, straight=straight))
    assert end.divergence < 0.9 * start.divergence and start.share <= SHORT.target + 1e-5
    levels = [level_of_tokens(gate, layout) for gate in end.gates.values()]
    assert any(len(set(x)) > 1 for x in levels), "tokens of a layer differ"


def level_of_tokens(gate: Gate, layout: str) -> list[int]:
    """Of the tokens of the first held-out window as layer 0 sees them."""
    seen = []

    def look(keys, values):
        seen.extend(gate(keys, values).argmax(-1).flatten().tolist())
        return keys, values

    model = attached("llama")
    f = found_bases(layout)[0].at(HEAD_DIM, HEAD_DIM)
    with torch.no_grad():
        model_probe.logits(
            model, CYCLE[-1:], {0: ObservedReconstruction(f, layout, families.rope(model, 0), look)}
        )
    return seen


@pytest.mark.parametrize("target", [0.125, 0.25, 0.4, 1.0])
def test_training_starts_with_one_level_per_layer_in_budget(target):
    gates = trained("post_rope", GateTraining(target=target, steps=0, hidden=8))
    levels = [set(level_of_tokens(gate, "post_rope")) for gate in gates.gates.values()]
    assert all(len(x) == 1 for x in levels) and gates.share <= target + 1e-6
    if target == 1.0:
        assert gates.share == 1.0 and gates.divergence < 1e-5


def test_training_that_goes_astray_ends_at_its_start():
    start, end = (trained("post_rope", replace(SHORT, steps=n, lr=lr)) for n, lr in ((0, 1.0), (3, 1e4)))
    assert end.divergence <= start.divergence


def test_training_twice_gives_the_same_gates():
    first, again = (
        train_gates(
            attached("llama"), found_bases("post_rope"), CYCLE, HELD, "post_rope", replace(SHORT, steps=6)
        )
        for _ in "ab"
    )
    for i, gate in first.gates.items():
        assert all(torch.equal(t, getattr(again.gates[i], name)) for name, t in vars(gate).items())
        assert all(not t.requires_grad for t in vars(gate).values())


def stopping_at(last):
    """Progress that is cut off at a training step, as a killed process is."""

    def progress(items, text, total):
        for item in items:
            if text == "training gates" and item == last:
                raise KeyboardInterrupt
            yield item

    return progress


@pytest.mark.parametrize("last", [9, 10, 39])
def test_interrupted_training_goes_on_to_the_same_gates(tmp_path, last):
    """Saved every 8 of 40 steps; a second stop on the way changes nothing either."""
    said = attached("llama"), found_bases("post_rope"), CYCLE, HELD, "post_rope", SHORT
    for stop in (last, last):
        with pytest.raises(KeyboardInterrupt):
            train_gates(*said, stopping_at(stop), tmp_path)
    steps = []
    found = train_gates(*said, lambda items, text, total: steps.append((text, total)) or items, tmp_path)
    assert dict(steps)["training gates"] == 40 - last // 8 * 8
    whole = trained("post_rope")
    assert (found.share, found.divergence) == (whole.share, whole.divergence)
    for i, gate in whole.gates.items():
        assert all(torch.equal(t, getattr(found.gates[i], name)) for name, t in vars(gate).items())


def test_a_work_folder_of_another_job_is_emptied(tmp_path):
    def made(target):
        training = GateTraining(target=target, steps=2, hidden=8)
        return make_dynamic_plan(
            attached("llama"), pico.tokenizer(), TEXT, sample=Sample(8, 24), training=training, work=tmp_path
        )

    made(0.4)
    before = list(tmp_path.glob(f"*/{dynakv.GATE_FILE}.safetensors"))
    assert len(before) == 1
    assert made(0.3).token_ranks.share <= 0.3 + 1e-6
    assert not before[0].exists()


def test_training_leaves_the_model_and_the_random_state_alone():
    model = attached("llama")
    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    train_gates(model, found_bases("post_rope"), CYCLE, HELD, "post_rope", replace(SHORT, steps=2))
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_relaxed_choice_mixes_what_the_levels_rebuild(layout):
    """Of one layer's keys and values; and its share is the mixture of theirs."""
    maps = {i: b.at(HEAD_DIM, HEAD_DIM) for i, b in found_bases(layout).items()}
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    outs: dict[object, list[Tensor]] = {}

    def run(key, choose):
        training = dynakv._GateTrainer(
            attached("llama"), {0: maps[0]}, layout, LEVELS, SHORT, CYCLE, HELD, trained(layout).gates
        )
        plain = dynakv.ObservedReconstruction.update

        def recording(self, keys, values):
            outs[key] = list(plain(self, keys, values))
            return keys, values

        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(dynakv.ObservedReconstruction, "update", recording)
            return float(training.forward(CYCLE[:2], training.gates, choose)[1])

    mixed = run("mixed", lambda numbers: weights.expand_as(numbers))
    shares = [run(i, lambda numbers, i=i: torch.eye(4)[i].expand_as(numbers)) for i in range(4)]
    assert shares == [r / HEAD_DIM for r in LEVELS] and mixed == pytest.approx(
        float(weights @ torch.tensor(shares))
    )
    for side in range(2):
        assert torch.allclose(
            outs["mixed"][side], sum(w * outs[i][side] for i, w in enumerate(weights)), atol=1e-5
        )


def test_held_out_windows_are_never_trained_on(monkeypatch):
    seen = []
    inside = dynakv._GateTrainer.loss
    monkeypatch.setattr(
        dynakv._GateTrainer, "loss", lambda self, ids, *rest: seen.append(ids) or inside(self, ids, *rest)
    )
    train_gates(
        attached("llama"), found_bases("post_rope"), CYCLE, HELD, "post_rope", replace(SHORT, steps=3)
    )
    training = {tuple(r.tolist()) for r in CYCLE[:-HELD]}
    assert len(seen) == 3 and all(tuple(r.tolist()) in training for ids in seen for r in ids)


@pytest.mark.parametrize(
    "options",
    [
        {"target": 0.0},
        {"target": 1.5},
        {"steps": -1},
        {"batch": 0},
        {"hidden": 0},
        {"lr": 0.0},
        {"temperature": 0.0},
        {"penalty": math.nan},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(LowkeyError, match=next(iter(options))):
        GateTraining(**options)


def test_a_target_below_the_least_level_is_refused():
    with pytest.raises(LowkeyError, match=r"0\.125 or more"):
        train_gates(
            attached("llama"), found_bases("post_rope"), CYCLE, HELD, "post_rope", GateTraining(target=0.1)
        )
