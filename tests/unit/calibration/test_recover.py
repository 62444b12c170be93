"""Training through the compressed cache: what it computes, that it helps, and that a stopped one goes on as
if it had not been.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import sys
from dataclasses import fields, replace

import pico
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

import lowkey
from lowkey.cache.cache import cache_of
from lowkey.calibration.recover import Recovered, Recovery, recover
from lowkey.core import text
from lowkey.core.head_groups import per_head_maps
from lowkey.core.types import Factors, LowkeyError
from lowkey.models import attention_interface, families
from lowkey.models.fingerprint import model_fingerprint
from lowkey.plan.plan import Plan
from lowkey.probes.layer_probe import LowRankReconstruction, OneLayerCache
from lowkey.storage.reconstruction import ReconstructionLayer

module = importlib.import_module("lowkey.calibration.recover")
TEXT = "the cat sat on the mat. " * 40
SMALL = Recovery(stages=(("ce", 4),), rank=4, alpha=8, batch=2, length=24, lr=3e-3, save_every=2)


def run(model=None, plan=None, texts=TEXT, work=None, progress=None, **changes) -> Recovered:
    model = model or pico.attached("llama")
    extra = {"progress": progress} if progress else {}
    return recover(
        model,
        pico.tokenizer(),
        plan or pico.plan(model),
        texts,
        settings=replace(SMALL, **changes),
        work=work,
        **extra,
    )


def losses(found: Recovered) -> list[float]:
    return [record["loss"] for record in found.losses]


def maps(plan: Plan) -> dict[str, Tensor]:
    return {
        f"{i}.{x.name}": t.clone()
        for i, f in plan.factors.items()
        for x in fields(f)
        if isinstance(t := getattr(f, x.name), Tensor)
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def through(model, plan: Plan, ids: Tensor) -> Tensor:
    """Logits as in training."""
    cache = cache_of(
        model,
        lambda i: ReconstructionLayer(
            LowRankReconstruction(plan.factors[i], plan.layout, families.rope(model, i))
        ),
    )
    return model(ids, past_key_values=cache, use_cache=True).logits


# -- what it computes


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3-partial", "llama-yarn"])
def test_training_sees_what_a_cache_of_the_plan_gives(name, layout):
    model, ids = pico.attached(name), pico.prompt(24)
    plan = pico.plan(model, layout=layout)
    trained = through(model, plan, ids)
    assert trained.requires_grad
    assert torch.allclose(trained, pico.feed(model, ids, lowkey.make_cache(model, plan)), atol=1e-5)


def merged_factors(seed: int) -> Factors:
    """Two heads in one latent, in another order and centred."""
    draw = torch.Generator().manual_seed(seed)
    k, v = (torch.linalg.qr(torch.randn(2, 32, 32, generator=draw)).Q[..., :12] for _ in "kv")
    k_mean, v_mean = torch.randn(2, 4, pico.HEAD_DIM, generator=draw)
    return Factors(
        k,
        per_head_maps(k.mT, 2),
        v,
        per_head_maps(v.mT, 2),
        torch.randperm(4, generator=draw),
        k_mean,
        v_mean,
    )


def test_merged_heads_are_trained_too(layout):
    model, ids = pico.attached("llama"), pico.prompt(24)
    plan = pico.plan(model, layout=layout)
    plan = replace(plan, factors={i: merged_factors(i) for i in plan.factors})
    found = run(model, plan, stages=(("distill", 2), ("ce", 2)), factors=True)
    assert {n.split(".")[1] for n, t in maps(plan).items() if torch.equal(t, maps(found.plan)[n])} == {
        "order"
    }
    logits = pico.feed(found.model, ids, lowkey.make_cache(found.model, found.plan))
    assert torch.allclose(logits, through(found.model, found.plan, ids), atol=1e-4)


def test_a_reconstruction_layer_stores_nothing():
    model = pico.attached("llama")
    plan = pico.plan(model)
    cache = cache_of(
        model,
        lambda i: ReconstructionLayer(
            LowRankReconstruction(plan.factors[i], plan.layout, families.rope(model, i))
        ),
    )
    pico.feed(model, pico.prompt(), cache)
    assert (cache.nbytes(), cache.predicted_nbytes(), cache.get_seq_length()) == (0, 0, 0)


@pytest.mark.parametrize("stage", ["distill", "kl"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_full_rank_plan_has_nothing_to_distil(name, stage):
    model = pico.attached(name)
    found = run(model, pico.plan(model, pico.HEAD_DIM, pico.HEAD_DIM), stages=((stage, 1),))
    assert abs(losses(found)[0]) < 1e-6


def test_distillation_starts_at_the_error_of_each_layer():
    model = pico.attached("llama")
    plan = pico.plan(model)
    ids = module.TrainingWindows.of(pico.tokenizer(), TEXT, SMALL).at(0)
    with torch.no_grad():
        inputs = model(ids, output_hidden_states=True).hidden_states
        errors = []
        for i, f in plan.factors.items():
            block = families.decoder_layers(model)[i]
            storage = OneLayerCache(LowRankReconstruction(f, plan.layout, families.rope(model, i)))
            exact, found = (
                families.run_layer(model, i, block, inputs[i], cache) for cache in (None, storage)
            )
            errors.append(float((found - exact).square().sum() / exact.square().sum()))
    assert losses(run(stages=(("distill", 1),)))[0] == pytest.approx(sum(errors) / len(errors), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3"])
def test_every_linear_map_of_the_layers_is_trained(name):
    model = pico.attached(name)
    found = run(model, stages=(("distill", 1), ("ce", 1), ("kl", 1)))
    assert [r["stage"] for r in found.losses] == ["distill", "ce", "kl"]
    before, after = model.state_dict(), found.model.state_dict()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    inside = [m for block in families.decoder_layers(model) for m in block.modules()]
    linear = {
        f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m in inside
    }
    assert list(before) == list(after) and moved == linear


def test_adapters_of_a_half_precision_model_are_in_full_precision():
    model = lowkey.attach(pico.build("llama").to(torch.bfloat16))
    plan = pico.plan(model, layout="pre_rope")
    data = module.TrainingWindows.of(pico.tokenizer(), TEXT, SMALL)
    training = module.RecoveryTraining.of(model, plan, data, SMALL)
    assert {p.dtype for p in training.model_parameters.values()} == {torch.float32}
    found = run(model, plan, stages=(("distill", 2), ("kl", 2)), factors=True)
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
    assert all(map(math.isfinite, losses(found)))


def test_the_windows_of_a_step_depend_on_the_seed_and_the_step_alone():
    data, other = (module.TrainingWindows.of(pico.tokenizer(), TEXT, replace(SMALL, seed=s)) for s in (0, 1))
    assert data.at(3).shape == (2, 24) and bool((data.at(3)[:, 0] == pico.tokenizer().bos_token_id).all())
    assert torch.equal(data.at(3), data.at(3))
    assert not torch.equal(data.at(3), data.at(4)) and not torch.equal(data.at(3), other.at(3))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.05), (2, 0.0), (100, 0.05), (3, 0.99)])
def test_the_rate_rises_to_its_peak_once_and_falls(steps, warmup):
    rates = [module.warmup_cosine(k, steps, warmup) for k in range(steps)]
    top = rates.index(1.0)
    assert rates == sorted(rates[: top + 1]) + sorted(rates[top + 1 :], reverse=True) and min(rates) > 0


# -- arXiv:2507.11273, section 4.2: attention in full, adapters on the feed-forward maps, a rate for each
# stage, KL at a temperature

KV_LATENT = {
    "full": ("self_attn.*",),
    "lora": ("mlp.*",),
    "stages": (("distill", 2), ("kl", 2)),
    "lrs": (1e-2, 1e-3),
    "temperature": 10.0,
}


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_attention_is_trained_in_full_and_the_rest_through_adapters(name):
    """What changes says how: by any matrix in attention (and its biases), by one of the adapters' rank
    elsewhere.
    """
    model = pico.attached(name)
    after, before = run(model, **KV_LATENT).model.state_dict(), model.state_dict()
    assert list(after) == list(before) and {t.dtype for t in after.values()} == {torch.float32}
    for key, old in before.items():
        change = after[key] - old
        kind = (
            "full" if ".self_attn." in key and "norm" not in key else "adapter" if ".mlp." in key else "none"
        )
        assert bool(change.any()) == (kind != "none") or key.endswith("k_proj.bias"), key
        if change.ndim == 2 and kind != "none":
            energy = torch.linalg.svdvals(change.double())
            assert (energy[4] > 1e-3 * energy[0]) == (kind == "full"), key


def test_a_stage_by_hand():
    """One step of KL at a temperature with everything else switched off: AdamW on the attention's weights,
    and nothing else moves.
    """
    model = pico.attached("llama")
    plan = pico.plan(model)
    settings = {
        "full": ("self_attn.*",),
        "lora": (),
        "stages": (("kl", 1),),
        "lr": 1e-3,
        "temperature": 4.0,
        "eps": 2e-4,
        "warmup": 0.0,
    }
    found = run(model, plan, **settings, weight_decay=0.1, betas=(0.8, 0.95))
    twin, ids = (
        lowkey.attach(copy.deepcopy(model)),
        module.TrainingWindows.of(pico.tokenizer(), TEXT, SMALL).at(0),
    )
    with torch.no_grad():
        target = (model(ids).logits / 4).log_softmax(-1)
    mine = (through(twin, plan, ids) / 4).log_softmax(-1)
    loss = (target.exp() * (target - mine)).sum(-1).mean()
    loss.backward()
    assert losses(found)[0] == pytest.approx(loss.item(), rel=1e-4)
    for name, p in twin.named_parameters():
        moved = found.model.get_parameter(name)
        if ".self_attn." not in name:
            assert torch.equal(moved, p), name
            continue
        # the first step: both moments are the gradient's own
        want = p * (1 - 1e-3 * 0.1) - 1e-3 * p.grad / (p.grad.abs() + 2e-4)
        assert torch.allclose(moved, want, atol=2e-6), name


def test_every_stage_has_its_rate():
    """A second stage at a rate of nothing leaves what the first has made."""
    first = run(stages=(("ce", 2),), lr=1e-2)
    both = run(stages=(("ce", 2), ("kl", 2)), lrs=(1e-2, 1e-30))
    assert losses(both)[:2] == losses(first)
    assert all(
        torch.allclose(t, both.model.state_dict()[n], atol=1e-7) for n, t in first.model.state_dict().items()
    )


def test_maps_in_full_of_a_half_precision_model_are_trained_in_full_precision():
    model = lowkey.attach(pico.build("llama").to(torch.bfloat16))
    data = module.TrainingWindows.of(pico.tokenizer(), TEXT, SMALL)
    training = module.RecoveryTraining.of(model, pico.plan(model), data, replace(SMALL, **KV_LATENT))
    assert {p.dtype for p in training.model_parameters.values()} == {torch.float32}
    found = run(model, pico.plan(model), **KV_LATENT)
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16} and all(
        map(math.isfinite, losses(found))
    )


def test_training_in_full_resumes_to_the_same_numbers(tmp_path):
    straight = run(**KV_LATENT, factors=True, dropout=0.2)
    with pytest.raises(KeyboardInterrupt):
        run(work=tmp_path, progress=stop_before(3), **KV_LATENT, factors=True, dropout=0.2)
    resumed = run(work=tmp_path, **KV_LATENT, factors=True, dropout=0.2)
    assert resumed.losses == straight.losses
    assert same(resumed.model.state_dict(), straight.model.state_dict()) and same(
        maps(resumed.plan), maps(straight.plan)
    )


@pytest.mark.parametrize(
    "other", [{"lora": ("*",)}, {"full": ()}, {"temperature": 2.0}, {"lrs": ()}, {"eps": 1e-3}], ids=str
)
def test_a_work_folder_of_other_maps_is_not_reused(tmp_path, other):
    run(work=tmp_path, **KV_LATENT)
    assert run(work=tmp_path, **KV_LATENT | other).losses == run(**KV_LATENT | other).losses


def test_a_plan_that_loses_nothing_is_said_to(layout):
    model = pico.attached("llama")
    exact = run(model, pico.plan(model, pico.HEAD_DIM, pico.HEAD_DIM, layout=layout), stages=(("kl", 1),))
    assert exact.exact and exact.plan.provenance["recovered"]["exact"]
    merged = {i: pico.merged_factors(4, 16, 16, 2, 4, seed=i) for i in range(pico.LAYERS)}
    assert run(model, pico.plan(model, factors=merged, layout=layout), stages=(("kl", 1),)).exact
    for ranks in ((15, 16), (16, 15)):
        lossy = run(model, pico.plan(model, *ranks, layout=layout), stages=(("kl", 1),))
        assert not lossy.exact and not lossy.plan.provenance["recovered"]["exact"]


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


def stop_before(step: int):
    """A progress at which the user loses patience."""

    def progress(items, label, total=None):
        for i, item in enumerate(items):
            if i == step:
                raise KeyboardInterrupt
            yield item

    return progress


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


def test_a_loss_that_is_no_number_is_refused_and_the_checkpoint_stays(tmp_path):
    with pytest.raises(LowkeyError, match=r"lr 1e\+30: .* step 2 .* smaller lr"):
        run(work=tmp_path, lr=1e30, save_every=1)
    assert len(list(tmp_path.glob("*/training.safetensors"))) == 1
