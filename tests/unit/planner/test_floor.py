"""Bytes of caches counted from a config, against caches that read a prompt; the floor of a step by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import latent_models
import pico
import pytest
import torch
import variants
from evicting_caches import HEADS
from pico import attached, feed, prompt
from transformers import DynamicCache

import lowkey
from lowkey.catalog import make_policy
from lowkey.core.gpus import GPUS, Gpu
from lowkey.core.stored_setting import parse_settings
from lowkey.core.types import LowkeyError
from lowkey.plan.plan import NO_METHOD
from lowkey.planner.floor import HeldBytes, Workload, floor_of, stored_bytes, usual_settings
from lowkey.policies import POLICIES, policy_to_dict
from lowkey.storage.packing import SCHEMES

TOKENS = 161
FP32 = torch.float32
FAMILIES = ["llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "granite", "olmo2", "llama-mqa"]


def parsed(text):
    (setting,) = parse_settings(text, list(SCHEMES), list(POLICIES), ("expanded",))
    return setting


def said(model, text, tokens=TOKENS, plan=None, batch=1):
    return stored_bytes(Workload(model.config, FP32, tokens, batch), parsed(text), plan)


def held(model, tokens=TOKENS, batch=1, **how):
    """The bytes of a cache that has read a prompt."""
    policy = how.get("policy")
    cache = lowkey.make_cache(model, **how, gates=pico.gates(model, policy) if policy else None)
    with torch.no_grad():
        if policy is not None and policy.needs_second_pass:
            lowkey.prefill(model, pico.tokenizer(), cache, prompt(tokens, batch=batch))
        else:
            feed(model, prompt(tokens, batch=batch), cache)
    return cache.nbytes()


# -- against caches


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tokens", [9, TOKENS])
def test_the_full_cache_of_every_family(name, tokens):
    model = attached(name)
    assert said(model, "full", tokens).sequence == held(model, tokens)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("bits", SCHEMES)
def test_every_packing(name, bits):
    model = attached(name)
    assert said(model, bits).sequence == held(model, bits=bits)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("bits", [None, "int4", "kivi2"])
def test_a_share_of_the_rank(name, bits):
    model = attached(name)
    text = "rank:40%" + (f"+{bits}" if bits else "")
    rank = round(0.4 * pico.HEAD_DIM)
    plan = pico.plan(model, rank, rank, sinks=4, recent=32, bits=bits)
    found = said(model, text)
    assert found.sequence == held(model, plan=plan)
    assert found.maps == 4 * sum(f.static_numbers for f in plan.factors.values())


@pytest.mark.parametrize(
    "name", [name for name in POLICIES if name not in ("think", "kv-compress", *pico.UNFED)] + ["kvzip"]
)
@pytest.mark.parametrize("budget", ["25%", "40 tokens"])
def test_every_policy_with_a_budget(name, budget):
    model, policy = attached("llama"), make_policy(name, budget, {}).with_head_scores(HEADS)
    # the shares of heads and layers are rounded to whole tokens
    assert abs(said(model, f"{name}:{budget}").sequence - held(model, policy=policy)) <= 3


def test_a_policy_of_whole_blocks_takes_at_most_that():
    model, policy = attached("llama"), make_policy("kv-compress", "25%", {})
    assert held(model, policy=policy) <= said(model, "kv-compress:25%").sequence


@pytest.mark.parametrize("text", ["snapkv:30%+int4", "h2o:60 tokens+hadamard8", "rank:50%+snapkv:30%+int8"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_several_axes(name, text):
    model, setting = attached(name), parsed(text)
    policy = make_policy(setting.policy, setting.budget, {})
    half = pico.HEAD_DIM // 2
    plan = pico.plan(model, half, half, sinks=4, recent=32) if setting.rank else None
    found = held(model, plan=plan, policy=policy, bits=setting.bits)
    assert abs(said(model, text).sequence - found) <= 3


@pytest.mark.parametrize(("budget", "granted"), [("48 KiB", 48 * 1024), ("200 B/token", 200 * TOKENS)])
def test_a_budget_of_bytes_bounds_the_whole_cache(budget, granted):
    model, policy = attached("gemma2"), make_policy("snapkv", budget, {})
    assert said(model, f"snapkv:{budget}").sequence == granted
    entry = 4 * (2 * pico.HEAD_DIM + 1)  # what a token more would take in one head
    assert granted - entry <= held(model, policy=policy) <= granted
    shared = said(model, f"snapkv:{budget}", batch=2).sequence
    assert shared == (granted / 2 if budget == "48 KiB" else granted), "sequences share a total"


def test_a_budget_of_bytes_holds_no_more_than_everything():
    model = attached("llama")
    everything = said(model, "snapkv:100%").sequence
    assert (
        said(model, "snapkv:1 GiB").sequence == everything == held(model, policy=POLICIES["snapkv"]("1 GiB"))
    )


@pytest.mark.parametrize("text", ["full", "int8", "kivi2", "snapkv:25%", "rank:50%"])
def test_a_batch_takes_so_many_sequences(text):
    model, setting = attached("llama"), parsed(text)
    how = {"bits": setting.bits} if setting.bits else {}
    if setting.policy:
        how["policy"] = make_policy(setting.policy, setting.budget, {})
    if setting.rank:
        how["plan"] = pico.plan(model, pico.HEAD_DIM // 2, pico.HEAD_DIM // 2, sinks=4, recent=32)
    # the rows of a batch share the last of their starts, and shares of tokens are rounded once
    assert 0 <= 3 * said(model, text).sequence - held(model, batch=3, **how) <= 8 * 2 * pico.LAYERS + 3


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_every_attention_of_our_own(name):
    model = lowkey.attach(variants.build(name).float())
    cache = lowkey.make_cache(model)
    with torch.no_grad():
        model(variants.ids(20, batch=1), past_key_values=cache)
    assert said(model, "full", 20).sequence == cache.nbytes()


@pytest.mark.parametrize("name", latent_models.FAMILIES)
def test_latents_in_the_cache_of_transformers(name):
    """transformers stores latents as they are, although it attends to keys and values of all heads."""
    model, cache, m = latent_models.build(name), DynamicCache(), latent_models
    with torch.no_grad():
        model(prompt(20, batch=1), past_key_values=cache)
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert said(model, "full", 20).sequence == found == 20 * m.LAYERS * (m.LATENT_WIDTH + m.SLICE) * 4
    expanded = 20 * m.LAYERS * m.HEADS * (m.UNROTATED + m.SLICE + m.VALUE) * 4
    assert said(model, "expanded", 20).sequence == expanded


def test_a_plan_and_what_replaces_its_parts():
    model = attached("llama")
    plan = pico.plan(model, 5, 9, sinks=2, recent=7, bits="int8")
    assert said(model, "plan:x", plan=plan).sequence == held(model, plan=plan)
    assert said(model, "plan:x+kivi2", plan=plan).sequence == held(model, plan=plan, bits="kivi2")
    policy = make_policy("snapkv", "30%", {})
    kept = replace(plan, policy=policy_to_dict(make_policy("h2o", "60%", {})))
    assert (
        abs(said(model, "plan:x+snapkv:30%", plan=kept).sequence - held(model, plan=plan, policy=policy)) <= 3
    )
    assert abs(said(model, "plan:x", plan=kept).sequence - held(model, plan=kept)) <= 3
    assert said(model, "plan:x", plan=plan).maps == 4 * sum(f.static_numbers for f in plan.factors.values())


@pytest.mark.parametrize("name", [*FAMILIES, "mistral"])
def test_the_usual_settings_are_allowed(name):
    model = attached(name)
    for setting in parse_settings(usual_settings(model.config), list(SCHEMES), list(POLICIES)):
        assert stored_bytes(Workload(model.config, FP32, TOKENS), setting).sequence > 0


# -- the floor


def test_the_floor_by_hand():
    model = pico.build("llama", tie_word_embeddings=False)
    weights = sum(p.numel() for p in model.parameters())
    work = Workload(model.config, torch.bfloat16, 100, 7)
    gpu = Gpu("toy", gib=2**-10, gbs=0.5, count=2)  # 2 MiB read at 1 GB/s
    told = floor_of(work, [HeldBytes("full", 1000), HeldBytes("small", 400, maps=50)], gpu)
    first, second = told["rows"]
    table = pico.VOCAB * pico.HIDDEN  # the embedding, of which a step reads some rows
    assert (told["parameters"], told["weights_bytes"]) == (weights, 2 * weights)
    assert told["weights_read_bytes"] == 2 * (weights - table)
    assert first["read_bytes"] == 2 * (weights - table) + 7000
    assert second["read_bytes"] == 2 * (weights - table) + 50 + 2800
    assert first["step_ms"] == pytest.approx(first["read_bytes"] / 1e9 * 1e3)
    assert first["tokens_per_second"] == pytest.approx(7e9 / first["read_bytes"])
    assert first["sequences_that_fit"] == (2 * 2**20 - 2 * weights) // 1000
    assert second["sequences_that_fit"] == (2 * 2**20 - 2 * weights - 50) // 400
    assert (first["cache_bytes"], second["share_of_first"]) == (7000, 0.4)
    half = floor_of(replace(work, weight_bits=4), [HeldBytes("full", 1000)])
    assert half["weights_bytes"] == weights / 2 and half["gpu"] is half["rows"][0]["step_ms"] is None


def test_nothing_fits_where_weights_do_not():
    work = Workload(pico.build("llama").config, FP32, 100)
    assert floor_of(work, [HeldBytes("full", 1)], Gpu("toy", 1e-6, 1))["rows"][0]["sequences_that_fit"] == 0


def test_no_gpu_reads_faster_than_it_can():
    assert all(0 < gpu.gbs <= 8000 and 0 < gpu.gib <= 192 and name == gpu.name for name, gpu in GPUS.items())
    assert GPUS["h200"].nbytes == 141 * 2**30 and GPUS["h200"].seconds(4.8e12) == 1.0


# -- refusals


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("llama", "think:50%", "drops channels"),
        ("llama", "snapkv:13 tokens+int4", "4 sinks and 32 recent"),
        ("llama", "snapkv:100 B", "always kept takes"),
        ("llama", "expanded", "stores latents"),
    ],
)
def test_settings_that_cannot_be_counted(name, text, says):
    with pytest.raises(LowkeyError, match=says):
        said(attached(name), text)


def test_what_a_model_does_not_allow():
    with pytest.raises(LowkeyError, match="small form of its own"):
        said(variants.build("mla"), "int8", 20)
    with pytest.raises(LowkeyError, match="MLA"):
        said(latent_models.build("deepseek_v3"), "int8", 20)
    with pytest.raises(LowkeyError, match="512 positions"):
        Workload(attached("llama").config, FP32, 513)
    other = pico.plan(attached("gemma2"))
    with pytest.raises(LowkeyError, match="the plan is for 3 layers of 4 KV heads x 16"):
        said(attached("qwen2"), "plan:x", plan=other)
    bare = replace(pico.plan(attached("llama")), factors={}, method=NO_METHOD)
    assert said(attached("llama"), "plan:x", plan=bare).maps == 0
    assert parsed("plan:x").plan == Path("x")
