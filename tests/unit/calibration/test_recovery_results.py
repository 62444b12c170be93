"""Training through the compressed cache lowers the loss, resumes to the same numbers, refuses bad input."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace

import pico
import pytest
import torch
import torch.nn.functional as F
from recoveries import SMALL, TEXT, losses, maps, module, run, same, stop_before, through
from transformers import AutoModelForCausalLM

import lowkey
from lowkey.calibration.recover import Recovered
from lowkey.core import text
from lowkey.core.types import LowkeyError
from lowkey.models import attention_interface
from lowkey.models.fingerprint import model_fingerprint
from lowkey.plan.plan import Plan

# -- what it is good for


@pytest.fixture(scope="module")
def learned() -> dict[bool, Recovered]:
    """Trained without and with the maps."""
    return {on: run(stages=(("ce", 40),), lr=1e-2, factors=on) for on in (False, True)}


def test_the_loss_goes_down(learned):
    found = losses(learned[False])
    assert len(found) == 40 and found[-1] < 0.5 * found[0]
    assert learned[False].losses[-1] == {"step": 40, "stage": "ce", "loss": found[-1], "tokens": 40 * 2 * 24}


def test_training_the_maps_too_helps_more(learned):
    alone, both = learned[False], learned[True]
    assert sum(losses(both)[-5:]) < sum(losses(alone)[-5:])
    old = pico.plan(pico.attached("llama"))
    assert same(maps(alone.plan), maps(old)) and alone.plan.orthonormal
    assert (
        not any(torch.equal(t, maps(old)[name]) for name, t in maps(both.plan).items())
        and not both.plan.orthonormal
    )
    assert not any(t.requires_grad for t in maps(both.plan).values())


@pytest.mark.parametrize("factors", [False, True])
def test_the_plan_is_the_new_models_and_keeps_what_was_learned(learned, tmp_path, factors):
    found = learned[factors]
    found.plan.save(tmp_path / "plan")
    found.model.save_pretrained(tmp_path / "model")
    model = lowkey.attach(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    plan = Plan.load(tmp_path / "plan", model)
    assert plan.provenance == found.plan.provenance
    ids = module.TrainingWindows.of(pico.tokenizer(), TEXT, SMALL).at(1000)
    logits = pico.feed(model, ids, lowkey.make_cache(model, plan))
    assert torch.allclose(logits, through(found.model, found.plan, ids), atol=1e-4)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(loss) < 0.5 * losses(found)[0]
    with pytest.raises(LowkeyError, match="plan was made for"):
        plan.check(pico.attached("llama"))


def test_the_new_model_is_a_plain_one(learned):
    model = learned[False].model
    assert (
        type(model) is type(pico.attached("llama"))
        and attention_interface.attached(model)
        and not model.training
    )
    assert not any(p.requires_grad for p in model.parameters())
    assert not any("lora" in name for name, _ in model.named_modules())


def test_the_plan_says_what_was_done(learned):
    about = learned[True].plan.provenance["recovered"]
    assert about["settings"]["stages"] == [["ce", 40]] and about["settings"]["factors"]
    assert about["tokens"] == 40 * 2 * 24 and about["stages"][0]["last"] == losses(learned[True])[-1]
    assert about["stages"] == learned[True].stages and about["held_out"] == learned[True].held_out
    assert about["from_sha256"] == model_fingerprint(pico.attached("llama"))


def test_every_stage_is_told_by_itself():
    found = run(stages=(("distill", 2), ("ce", 3), ("kl", 1)))
    of = losses(found)
    told = [(s["objective"], s["steps"], s["first"], s["last"]) for s in found.stages]
    assert told == [("distill", 2, of[0], of[1]), ("ce", 3, of[2], of[4]), ("kl", 1, of[5], of[5])]


def test_one_objective_on_one_text_judges_before_and_after(learned):
    """By hand: stock torch's cross-entropy on text that was not trained on, through caches made the public
    way.
    """
    ids = pico.tokenizer()(text.embedded_text("evaluation")[: 8 * 23], add_special_tokens=False).input_ids
    rows = torch.tensor(ids).view(8, 23)
    rows = torch.cat([torch.ones(8, 1, dtype=torch.long) * pico.tokenizer().bos_token_id, rows], 1)

    def loss(model, cache):
        return float(
            F.cross_entropy(pico.feed(model, rows, cache)[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        )

    old, found = pico.attached("llama"), learned[True]
    want = {
        "full": loss(pico.stock("llama"), None),
        "before": loss(old, lowkey.make_cache(old, pico.plan(old))),
        "after": loss(found.model, lowkey.make_cache(found.model, found.plan)),
    }
    assert found.held_out == pytest.approx(want, rel=1e-4)


def test_model_and_plan_stay_as_they_were():
    model = pico.build("llama")
    plan = pico.plan(model)
    weights, before, random = copy.deepcopy(model.state_dict()), maps(plan), torch.get_rng_state()
    said, flags = copy.deepcopy(plan.describe()), [p.requires_grad for p in model.parameters()]
    run(model, plan, factors=True, dropout=0.2)
    assert same(weights, model.state_dict()) and same(before, maps(plan)) and plan.describe() == said
    assert [p.requires_grad for p in model.parameters()] == flags and not attention_interface.attached(model)
    assert torch.equal(torch.get_rng_state(), random)


def test_training_works_where_gradients_are_off():
    with torch.no_grad():
        assert len(losses(run(stages=(("ce", 1),)))) == 1


# -- resuming


TWO = {"stages": (("distill", 4), ("ce", 4)), "factors": True, "dropout": 0.2}


@pytest.fixture(scope="module")
def straight() -> Recovered:
    return run(**TWO)


@pytest.mark.parametrize("step", [0, 3, 4, 7])
def test_a_stopped_training_resumes_to_the_same_numbers(tmp_path, straight, step):
    with pytest.raises(KeyboardInterrupt):
        run(work=tmp_path, progress=stop_before(step), **TWO)
    torch.manual_seed(step)  # what others draw must not matter
    resumed = run(work=tmp_path, save_every=3, **TWO)
    assert resumed.losses == straight.losses
    assert same(resumed.model.state_dict(), straight.model.state_dict()) and same(
        maps(resumed.plan), maps(straight.plan)
    )


def test_a_crash_costs_the_steps_since_the_last_checkpoint(tmp_path, straight, monkeypatch):
    step, done = module.RecoveryTraining.step, []

    def failing(self, n):
        if n == 5 and len(done) == 5:
            raise RuntimeError("no more power")
        done.append(n)
        step(self, n)

    monkeypatch.setattr(module.RecoveryTraining, "step", failing)
    with pytest.raises(RuntimeError):
        run(work=tmp_path, **TWO)
    assert run(work=tmp_path, **TWO).losses == straight.losses
    assert done == [0, 1, 2, 3, 4, 4, 5, 6, 7]


def test_a_step_that_was_interrupted_halfway_is_not_saved(tmp_path, straight, monkeypatch):
    update, count = torch.optim.AdamW.step, []

    def interrupted(self, *args):
        count.append(1)
        update(self, *args)
        if len(count) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(work=tmp_path, **TWO)
    assert run(work=tmp_path, **TWO).losses == straight.losses


def test_a_finished_training_is_not_repeated(tmp_path, monkeypatch):
    first = run(work=tmp_path)
    monkeypatch.setattr(module.RecoveryTraining, "step", None)
    again = run(work=tmp_path)
    assert again.losses == first.losses and same(again.model.state_dict(), first.model.state_dict())


@pytest.mark.parametrize(
    "other",
    [{"lr": 1e-3}, {"texts": TEXT + "!"}, {"seed": 1}, {"stages": (("ce", 5),)}],
    ids=lambda o: next(iter(o)),
)
def test_a_work_folder_of_another_job_is_not_reused(tmp_path, other):
    run(work=tmp_path)
    assert run(work=tmp_path, **other).losses == run(**other).losses


def test_a_work_folder_of_another_plan_is_not_reused(tmp_path):
    model = pico.attached("llama")
    plan = pico.plan(model)
    other = replace(plan, factors={i: pico.factors(4, 6, 6, seed=9) for i in plan.factors})
    run(model, plan, work=tmp_path)
    assert run(model, other, work=tmp_path).losses == run(model, other).losses


def test_unfinished_work_is_plain_data(tmp_path):
    run(work=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["job.json", "training.safetensors"]
    assert json.loads((folder / "job.json").read_text())["job"]["recover"]["rank"] == 4


# -- refusals


@pytest.mark.parametrize(
    "options",
    [
        {"stages": ()},
        {"stages": (("best", 3),)},
        {"stages": (("ce", 0),)},
        {"stages": (("distill", 3), ("ce", -1))},
        {"rank": 0},
        {"alpha": 0},
        {"dropout": 1.0},
        {"batch": 0},
        {"length": 7},
        {"length": 513},
        {"length": 400, "texts": "short"},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"weight_decay": -1.0},
        {"warmup": 1.5},
        {"save_every": 0},
        {"temperature": 0.0},
        {"eps": float("nan")},
        {"betas": (0.9, 1.0)},
        {"lrs": (1e-3, 1e-3)},
        {"lrs": (0.0,)},
        {"lora": ("attn.*",)},
        {"full": ("lm_head",)},
        {"lora": ()},
    ],
    ids=str,
)
def test_bad_arguments_are_refused_in_one_line(options):
    with pytest.raises(LowkeyError) as refusal:
        run(**options)
    assert len(str(refusal.value).splitlines()) == 1


def test_another_models_plan_is_refused():
    with pytest.raises(LowkeyError, match="plan was made for"):
        run(pico.attached("llama"), pico.plan(pico.attached("llama-mha")))


def test_without_peft_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(LowkeyError, match=r"peft is not installed: pip install 'lowkey\[train\]'"):
        run()


def test_a_loss_that_is_not_a_number_keeps_the_checkpoint(tmp_path):
    with pytest.raises(LowkeyError, match=r"lr 1e\+30: .* step 2 .* smaller lr"):
        run(work=tmp_path, lr=1e30, save_every=1)
    assert len(list(tmp_path.glob("*/training.safetensors"))) == 1
