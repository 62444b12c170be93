"""What an engine is asked for, and what is refused before it serves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pico
import pytest
import torch
from attention_kinds import KINDS
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lowkey.attention import LowkeyConfig
from lowkey.core.types import LowkeyError
from lowkey.models.families import geometry, plain_architecture, rope
from lowkey.models.fingerprint import checkpoint_fingerprint, model_fingerprint
from lowkey.policies import policy_to_dict
from lowkey.policies.snapkv import SnapKV
from lowkey.serving import engine
from lowkey.serving.requests import (
    PlanRequest,
    check_cache_dtype,
    check_engine,
    check_own_engine,
    served_plan,
)
from lowkey.serving.rotation import configured_rope

WRONG = [
    ("plan", "plan 'plan': give an object"),
    ({"plans": "x"}, "did you mean 'plan'?"),
    ({"plan": 3}, "plan 3: give the folder"),
    ({"plan": "x", "kernel": "stock"}, "kernel 'stock' is unknown; choose one of auto, own"),
    ({"plan": "x", "exact": 4}, "exact 4 is unknown"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pico.save(tmp_path_factory.mktemp("serving") / "model")


def served(folder, tmp_path, exact="plan", **fields):
    model = pico.attached("llama")
    pico.plan(model, **fields).save(tmp_path / "plan")
    return served_plan(
        PlanRequest(tmp_path / "plan", exact=exact), folder, AutoConfig.from_pretrained(folder)
    )


@pytest.mark.parametrize(("given", "told"), WRONG, ids=lambda x: str(x)[:20])
def test_a_request_that_is_wrong(given, told):
    with pytest.raises(LowkeyError) as error:
        PlanRequest.read(given)
    assert told.removeprefix("plan 'plan': ") in str(error.value)


def test_a_request_is_read():
    assert PlanRequest.read(None) == PlanRequest()
    assert PlanRequest.read({"plan": "p", "kernel": "own"}) == PlanRequest(Path("p"), "own")


# -- the fingerprint of files


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_files_have_the_fingerprint_of_the_loaded_model(tmp_path, name, tied):
    place = pico.save(tmp_path, name, tie_word_embeddings=tied)
    config = AutoConfig.from_pretrained(place)
    loaded = AutoModelForCausalLM.from_pretrained(place)
    assert checkpoint_fingerprint(place, config) == model_fingerprint(loaded)


def test_another_number_in_a_file_is_another_model(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    config = AutoConfig.from_pretrained(folder)
    assert checkpoint_fingerprint(other, config) != checkpoint_fingerprint(folder, config)


def test_a_folder_that_lacks_a_weight(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(LowkeyError, match=r"hold no model\.norm\.weight"):
        checkpoint_fingerprint(other, AutoConfig.from_pretrained(folder))


# -- plans


@pytest.mark.parametrize(("exact", "kept"), [("plan", (4, 32)), ("none", (0, 0))])
def test_exact_tokens_are_kept_as_asked(folder, tmp_path, exact, kept):
    plan = served(folder, tmp_path, exact=exact, sinks=4, recent=32, bits="kivi4")
    assert (plan.sinks, plan.recent) == kept


REFUSED = {
    "a policy": ({"policy": policy_to_dict(SnapKV("50%"))}, "drops tokens by policy 'snapkv'"),
    "another model": (
        {"provenance": {"model": "other", "model_sha256": "2:0", "versions": {}}},
        "plan was made for model 'other'",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_plans_that_are_refused(folder, tmp_path, what):
    fields, told = REFUSED[what]
    with pytest.raises(LowkeyError) as error:
        served(folder, tmp_path, **fields)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_families_that_are_refused(tmp_path, name):
    place = pico.save(tmp_path / "model", name)
    pico.plan(pico.attached(name)).save(tmp_path / "plan")
    with pytest.raises(LowkeyError, match="served with a plan yet"):
        served_plan(PlanRequest(tmp_path / "plan"), place, AutoConfig.from_pretrained(place))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("auto", 2, False), "tensor parallel size 2"),
        (("auto", 1, True), "speculative decoding"),
        (("int8_per_token_head", 1, False), "KV cache dtype 'int8_per_token_head'"),
    ],
    ids=str,
)
def test_settings_of_an_engine_that_are_refused(given, told):
    with pytest.raises(LowkeyError, match=told):
        check_engine(*given)


def test_floats_of_8_bits_are_for_the_engines_kernel_alone():
    check_engine("fp8", 1, False)
    check_cache_dtype("fp8", {"projected"})
    for name in ("latent", "windowed"):
        with pytest.raises(LowkeyError, match=f"{name} route"):
            check_cache_dtype("fp8", {"projected", name})


OWN = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "num_hidden_layers": 2, **KINDS["mla"]}


@pytest.mark.parametrize(
    ("given", "rope", "told"),
    [
        (("auto", 2, 1), "default", "served on one device"),
        (("auto", 1, 2), "default", "served on one device"),
        (("fp8", 1, 1), "default", "KV cache dtype 'fp8'"),
        (("auto", 1, 1), "dynamic", "rope_type 'dynamic'"),
    ],
    ids=str,
)
def test_settings_that_are_refused_for_our_own_models(given, rope, told):
    config = LowkeyConfig(**OWN, rope_parameters={"rope_type": rope, "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(LowkeyError, match=told):
        check_own_engine(config, *given)


# -- the engine


@pytest.mark.parametrize("version", ["0.33.0", "0.3", "0.320.1", "1.0", "of no known distribution"])
def test_versions_that_were_not_tested_are_refused(version):
    with pytest.raises(LowkeyError, match=r"works with 0\.32 alone"):
        engine.check_version(version)


def test_versions_that_were_tested():
    for version in ("0.32.0", "0.32.0+cpu", "0.32.1"):
        engine.check_version(version)


# -- our own models as plain ones


@pytest.mark.parametrize("kind", KINDS)
def test_own_models_that_are_plain_ones(kind):
    config = LowkeyConfig(
        vocab_size=97, hidden_size=32, num_attention_heads=4, head_dim=8, num_hidden_layers=2, **KINDS[kind]
    )
    plain = {"mha", "gqa", "mqa"}
    expected = "Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"
    attends_plainly = KINDS[kind]["attention"] in plain and not config.attn_output_gate
    assert plain_architecture(config) == (expected if attends_plainly else None)


def test_a_plain_model_has_no_other_architecture():
    assert plain_architecture(pico.build("llama").config) is None


# -- rotation


@pytest.mark.parametrize("name", ["llama", "llama-yarn", "qwen3", "mistral", "gemma3_text"])
def test_a_config_rotates_as_its_model_does(name):
    model, at = pico.build(name), torch.tensor([[0, 1, 77, 400]])
    layer = geometry(model).compressible[0]
    expected = rope(model, layer)(at, torch.empty(0))
    found = configured_rope(model.config)(at, torch.empty(0))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
