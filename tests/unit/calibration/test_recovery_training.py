"""Training through the compressed cache: what it computes, which maps it trains, stage by stage."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pico
import pytest
import torch
from recoveries import SMALL, TEXT, losses, maps, module, run, same, stop_before, through

import lowkey
from lowkey.cache.cache import cache_of
from lowkey.core.head_groups import per_head_maps
from lowkey.core.types import Factors
from lowkey.models import families
from lowkey.probes.layer_probe import LowRankReconstruction, OneLayerCache
from lowkey.storage.reconstruction import ReconstructionLayer

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


def test_adapters_of_half_precision_models_are_full_precision():
    model = lowkey.attach(pico.build("llama").to(torch.bfloat16))
    plan = pico.plan(model, layout="pre_rope")
    data = module.TrainingWindows.of(pico.tokenizer(), TEXT, SMALL)
    training = module.RecoveryTraining.of(model, plan, data, SMALL)
    assert {p.dtype for p in training.model_parameters.values()} == {torch.float32}
    found = run(model, plan, stages=(("distill", 2), ("kl", 2)), factors=True)
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
    assert all(map(math.isfinite, losses(found)))


def test_the_windows_of_a_step_depend_on_seed_and_step_only():
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
def test_attention_is_trained_in_full_and_the_rest_by_adapters(name):
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


def test_half_precision_maps_are_trained_in_full_precision():
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
