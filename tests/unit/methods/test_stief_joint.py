"""Maps trained through the whole model: their start, what training gains, and resumed training."""

from __future__ import annotations

import string
from dataclasses import replace
from functools import cache

import pico
import pytest
import torch
from pico import HEAD_DIM

import lowkey
from lowkey import Sample
from lowkey.core import files
from lowkey.core.head_groups import side_by_side
from lowkey.core.types import LowkeyError
from lowkey.methods import CalibrationContext, FisherSVD, StiefJoint, stiefjoint
from lowkey.models import families
from lowkey.probes import gradients
from lowkey.storage.codec import LowRank
from lowkey.storage.coded import CodedLayer
from lowkey.storage.exact import Exact

EXACT, HELD, KV_HEADS, RANKS = Exact(2, 4), 4, 4, (3, 5)
TEXT = "".join(string.printable[(i * i + 7 * i) % 95] for i in range(3000))
SMALL = Sample(windows=16, length=32)


@cache
def context():
    from lowkey.calibration.calibrate import calibration_windows

    rows = calibration_windows(pico.attached("llama"), pico.tokenizer(), TEXT, SMALL)
    return CalibrationContext(pico.attached("llama"), rows, HELD, "pre_rope", [4, 8, 16], 0, exact=EXACT)


@cache
def start(group=0):
    return {i: b.at(*RANKS) for i, b in FisherSVD(group=group).tune({}, context()).items()}


def finished(steps, lr=1e-3, group=0, **changes):
    return StiefJoint(steps=steps, lr=lr, group=group).finish(start(group), replace(context(), **changes))


def projectors(factors):
    for f in factors.values():
        for down, up, t in ((f.k_down, f.k_up, f.merge[0]), (f.v_down, f.v_up, f.merge[1])):
            yield down.double() @ side_by_side(up, t).double()


def divergence(factors, rows):
    """KL(stock || through the cache layers that serve), per token."""
    model = pico.attached("llama")
    past = lowkey.make_cache(model)
    for i, f in factors.items():
        past.layers[i] = CodedLayer(LowRank(f, "pre_rope", families.rope(model, i)), EXACT)
    with torch.no_grad():
        q, p = (
            m(rows, **kw).logits.double().log_softmax(-1)
            for m, kw in ((model, {"past_key_values": past}), (pico.stock("llama"), {}))
        )
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("group", [0, 1, 2])
def test_without_steps_they_are_those_of_fisher_svd(group):
    found = finished(0, group=group)
    for ours, theirs in zip(projectors(found), projectors(start(group)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert [f.merge for f in found.values()] == [(group or KV_HEADS,) * 2] * 3
    assert all(f.ranks == RANKS for f in found.values())


def test_training_starts_orthonormal_where_keys_are_white():
    moments = gradients.gather_gradient_moments(
        pico.attached("llama"), context().training_windows, "pre_rope", EXACT, 0
    )
    training = stiefjoint.MapTraining.of(start(), moments, 1, context())
    for i, sides in training.sides.items():
        for side, of in zip(sides, ("keys", "values"), strict=True):
            down, up = (x.detach().double() for x in (side.down, side.up))
            eye = torch.eye(down.shape[-1], dtype=torch.float64)
            assert torch.allclose(down.mT @ down, eye.expand(1, -1, -1), atol=1e-3) and torch.allclose(
                up, down.mT, atol=1e-3
            )
            stored = side.maps()[0].detach()[0].double()
            ridge = (
                1e-6 * moments[i][of].diagonal().mean() * torch.eye(KV_HEADS * HEAD_DIM, dtype=torch.float64)
            )
            assert torch.allclose(stored.mT @ (moments[i][of] + ridge) @ stored, eye, atol=1e-3)


@pytest.mark.defines("methods", "stiefattention-joint")
def test_training_lowers_the_divergence_of_text_it_has_not_seen():
    found, rows = finished(40), context().windows[-HELD:]
    before, after = divergence(start(), rows), divergence(found, rows)
    assert after < 0.93 * before
    training = stiefjoint.MapTraining.of(
        found,
        gradients.gather_gradient_moments(context().model, context().training_windows, "pre_rope", EXACT, 0),
        1,
        context(),
    )
    assert training.held_out_loss() == pytest.approx(after, rel=1e-3)


def test_training_that_goes_astray_ends_at_its_start():
    for ours, theirs in zip(projectors(finished(4, lr=5.0)), projectors(start()), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_every_window_is_seen_before_one_comes_again():
    order = stiefjoint.MapTraining(context(), {})._window_order(30)
    assert sorted(order[:12]) == sorted(order[12:24]) == list(range(12)) and len(order) == 30


def test_a_stopped_training_goes_on_to_the_same_maps(tmp_path):
    def stopping(items, label, total=None):
        for n, item in enumerate(items):
            if label == "training maps" and n == 7:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        finished(8, work=tmp_path, progress=stopping)
    assert int(files.read_work(tmp_path, "training")["done"]) == 6
    left = []
    resumed = finished(
        8, work=tmp_path, progress=lambda items, label, total=None: left.append((label, total)) or items
    )
    assert ("training maps", 2) in left and ("Fisher information", 0) in left
    whole = finished(8)
    for i, f in whole.items():
        assert all(torch.equal(t, getattr(resumed[i], name)) for name, t in vars(f).items() if t is not None)


def test_gradients_are_taken_once_for_the_start_and_the_training():
    told = []

    def progress(items, label, total=None):
        told.append(label)
        return iter(items)

    options = {"method": StiefJoint(steps=1), "budget": "30%", "sample": SMALL}
    lowkey.calibrate(pico.attached("llama"), pico.tokenizer(), TEXT, **options, progress=progress)
    assert told.count("Fisher information") == 1 and "training maps" in told


def test_another_budget_of_the_same_job_trains_anew(tmp_path):
    """The job that a folder belongs to does not name the ranks, for all else is shared between budgets."""
    options = {"method": StiefJoint(steps=2, lr=1e-3), "sample": SMALL}
    first = lowkey.calibrate(
        pico.attached("llama"), pico.tokenizer(), TEXT, budget="30%", work=tmp_path, **options
    )
    shared, alone = (
        lowkey.calibrate(pico.attached("llama"), pico.tokenizer(), TEXT, budget="20%", work=work, **options)
        for work in (tmp_path, None)
    )
    assert first.profile["chosen"] != shared.profile["chosen"] == alone.profile["chosen"]
    assert all(torch.equal(f.k_down, alone.factors[i].k_down) for i, f in shared.factors.items())


def test_damaged_work_is_refused(tmp_path):
    finished(4, work=tmp_path)
    found = files.read_work(tmp_path, "training")
    files.write_work(tmp_path, "training", found | {"best.1": torch.zeros(2)})
    with pytest.raises(LowkeyError, match=r"'best\.1'.*damaged"):
        finished(4, work=tmp_path)
    files.write_work(tmp_path, "training", found | {"done": torch.tensor(5)})
    with pytest.raises(LowkeyError, match="5 of 4 steps"):
        finished(4, work=tmp_path)


def test_the_model_and_the_global_random_state_are_left_alone():
    model, before = pico.attached("llama"), torch.random.get_rng_state()
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    finished(2)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_plan_holds_the_bytes_of_the_chosen_ranks():
    options = {"method": StiefJoint(steps=2), "budget": "30%", "sample": SMALL, "sinks": 2, "recent": 4}
    plan = lowkey.calibrate(pico.attached("llama"), pico.tokenizer(), TEXT, **options)
    assert [list(f.ranks) for f in plan.factors.values()] == plan.profile["chosen"]
    assert plan.bytes_per_token(4) <= 0.3 * 3 * 2 * HEAD_DIM * KV_HEADS * 4 and not plan.orthonormal
