"""An exported checkpoint computes in stock transformers what the cache of its plan computes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace

import pico
import pytest
import torch
from exports import COMMUTING, build, exported, make, refused, same
from pico import HEAD_DIM, feed, generate, prompt
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import lowkey
from lowkey.attention import LowkeyConfig, LowkeyForCausalLM
from lowkey.core.types import LAYOUTS
from lowkey.export import export_hf
from lowkey.methods import MEA, KVHeadSVD, KVLatent
from lowkey.models import families, loading
from lowkey.plan.plan import Plan

FAMILIES = [
    "llama",
    "llama-mha",
    "llama-yarn",
    "qwen2",
    "mistral",
    "phi3",
    "phi3-partial",
    "granite",
    "gemma2",
]


@pytest.mark.parametrize(("name", "layout"), list(zip(FAMILIES, itertools.cycle(LAYOUTS), strict=False)))
def test_an_exported_model_gives_the_logits_of_the_plans_cache(tmp_path, name, layout):
    model = build(name)
    plan = make(model, layout=layout)
    plain = exported(model, plan, tmp_path)
    assert type(plain).__name__ == type(model).__name__
    assert plain.config.num_key_value_heads * 2 == model.config.num_key_value_heads
    same(plain, model, plan)


def test_an_exported_plan_changes_the_generated_text(tmp_path):
    """Or else the tests above compare nothing."""
    model = build("llama")
    plain = exported(model, make(model), tmp_path)
    assert not torch.equal(generate(plain, prompt(40), 30), generate(model, prompt(40), 30))


@pytest.mark.parametrize("name", ["llama-mha", "gemma2"])
@pytest.mark.parametrize("order", [[0, 2, 1, 3], [3, 1, 0, 2]], ids=str)
def test_regrouped_heads_move_their_queries_and_outputs(tmp_path, name, order):
    model = build(name)
    h = families.geometry(model).kv_heads
    order = torch.tensor([*order, *range(4, h)])
    plan = make(model)
    factors = {i: replace(f, order=order.roll(i)) for i, f in plan.factors.items()}
    same(exported(model, replace(plan, factors=factors), tmp_path), model, replace(plan, factors=factors))


@pytest.mark.parametrize(
    ("method", "ranks", "name", "heads"),
    [
        (KVHeadSVD(4, "commuting"), (4, 4), "llama", 1),
        (KVHeadSVD(4, "commuting", heads="similar"), (4, 4), "llama-mha", 2),
        (KVHeadSVD(basis="mean"), (8, 8), "llama", 2),
        (KVHeadSVD(keys="commuting", basis="weights"), (8, 8), "qwen2", 1),
        (MEA(), (4, 4), "llama", 1),
        (MEA("aligned"), (8, 8), "qwen2", 1),
    ],
    ids=str,
)
def test_plans_with_one_head_per_group_are_exported(tmp_path, method, ranks, name, heads):
    model = build(name)
    plan = make(model, method, ranks)
    plain = exported(model, plan, tmp_path)
    assert plain.config.num_key_value_heads == heads
    same(plain, model, plan)


@pytest.mark.parametrize(
    ("name", "layout"),
    list(zip(["llama", "qwen2", "phi3", "phi3-partial", "granite", "gemma2"], itertools.cycle(LAYOUTS))),
)
@pytest.mark.parametrize(("method", "rank"), [(KVLatent(), 8), (KVLatent(values="pca"), 4)], ids=str)
def test_narrower_heads_of_strided_channels_are_exported(tmp_path, name, method, rank, layout):
    model = build(name)
    plan = make(model, method, (rank, rank), layout)
    plain = exported(model, plan, tmp_path)
    assert (
        plain.config.head_dim == rank and plain.config.num_key_value_heads == model.config.num_key_value_heads
    )
    same(plain, model, plan)


ROPES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "factor": 4.0,
        "short_factor": [1 + i / 10 for i in range(8)],
        "long_factor": [2 + i / 3 for i in range(8)],
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("method", [COMMUTING, KVLatent()], ids=["merged", "narrowed"])
@pytest.mark.parametrize("kind", ROPES)
def test_every_rope_type_is_exported_exactly_or_refused(tmp_path, kind, method):
    """Past the original length, too. 50 positions: no power of two, at which frequencies that grow with the
    length would show by chance.
    """
    model = build(
        "llama",
        max_position_embeddings=50,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]},
    )
    plan = make(model, method)
    if method != COMMUTING and kind in families.LENGTH_DEPENDENT_ROPE:
        refused(
            model,
            plan,
            tmp_path,
            f"narrows heads whose rope_type '{kind}' changes its frequencies with the length",
        )
        return
    plain, ids = exported(model, plan, tmp_path), prompt(70, 1)
    assert torch.allclose(feed(plain, ids), feed(model, ids, lowkey.make_cache(model, plan)), atol=1e-4)


@pytest.mark.parametrize("method", [COMMUTING, KVLatent()], ids=["merged", "narrowed"])
@pytest.mark.parametrize(
    "fields", [{"attention": "mha"}, {"num_key_value_heads": 2, "attention_bias": True}], ids=str
)
def test_grouped_models_of_our_own_are_exported_with_their_code(tmp_path, fields, method):
    model = own(**fields)
    plan = make(model, method)
    export_hf(model, pico.tokenizer(), plan, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert torch.allclose(
        feed(plain, prompt(40)), feed(model, prompt(40), lowkey.make_cache(model, plan)), atol=1e-4
    )


@pytest.mark.parametrize("fields", [{"attn_output_gate": True}, {"head_norm": "own"}], ids=str)
def test_what_stands_between_heads_and_output_is_refused(tmp_path, fields):
    model = own(num_key_value_heads=2, **fields)
    refused(
        model,
        make(model),
        tmp_path,
        "^model of family 'lowkey': gates or norms the heads' outputs.*; use the plan$",
    )


def own(**fields):
    shape = {
        "vocab_size": pico.VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    return lowkey.attach(
        LowkeyForCausalLM(LowkeyConfig(**shape, head_dim=HEAD_DIM, initializer_range=0.15, **fields)).eval()
    )


@pytest.mark.parametrize("method", [COMMUTING, KVLatent()], ids=["merged", "narrowed"])
def test_the_decoder_of_a_model_with_a_vision_tower_is_exported(tmp_path, method):
    text = {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
    }
    tower = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text |= {"num_hidden_layers": 2, "vocab_size": pico.VOCAB, "initializer_range": 0.15}
    config = AutoConfig.for_model(
        "llava",
        text_config=text,
        vision_config=tower | {"image_size": 16, "patch_size": 8},
        image_token_index=96,
    )
    torch.manual_seed(0)
    model = lowkey.attach(AutoModelForImageTextToText.from_config(config).eval())
    plan, ids = make(model, method), prompt(40).clamp(max=95)
    export_hf(model, pico.tokenizer(), plan, tmp_path / "model")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert torch.allclose(feed(plain, ids), feed(model, ids, lowkey.make_cache(model, plan)), atol=1e-4)


def test_head_scores_of_a_plan_change_nothing(tmp_path):
    """They are for policies on top of it."""
    model = build("llama")
    plan = make(model)
    same(exported(model, replace(plan, heads={"r2": [[1.0, 2.0, 3.0, 4.0]] * 3}), tmp_path), model, plan)


@pytest.mark.parametrize("overrides", [{"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)
def test_tied_embeddings_and_biases_come_along(tmp_path, overrides):
    model = build("llama", **overrides)
    plan = make(model)
    plain = exported(model, plan, tmp_path)
    same(plain, model, plan)
    tied = plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()
    assert tied == ("tie_word_embeddings" in overrides)


def test_a_model_in_bfloat16_stays_in_bfloat16(tmp_path):
    model = build("llama").bfloat16()
    plan = make(model)
    plain = exported(model, plan, tmp_path)
    assert (
        plain.dtype == torch.bfloat16
        and json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    )
    ids = prompt(40)
    ours, stock = feed(model, ids, lowkey.make_cache(model, plan)).float(), feed(plain, ids).float()
    exact = feed(model.float(), ids, lowkey.make_cache(model, plan))
    assert (stock - exact).norm() < 2 * (ours - exact).norm() < 0.2 * exact.norm(), (
        "no further from fp32 than the cache is"
    )


def test_the_cache_is_as_small_as_the_plans(tmp_path):
    model = build("llama")
    plan = make(model)
    plain, ours = exported(model, plan, tmp_path), lowkey.make_cache(model, plan)
    feed(model, prompt(40), ours)
    layers = plain(prompt(40), use_cache=True).past_key_values.layers
    held = sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values))
    assert held == 2 * 40 * plan.bytes_per_token(4)
    assert f"{plan.bytes_per_token(4)} bytes per token" in (tmp_path / "model" / "README.md").read_text()


ALONE = """
import sys
sys.modules["lowkey"] = None  # importing it raises ImportError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer("no lowkey here", return_tensors="pt").input_ids
print(*model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)[0, ids.shape[1]:].tolist())
"""


def test_an_exported_model_runs_without_lowkey(tmp_path):
    model = build("llama")
    plan = make(model)
    exported(model, plan, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "model"], capture_output=True, text=True, check=True
    )
    ids = pico.tokenizer()("no lowkey here", return_tensors="pt").input_ids
    assert (
        list(map(int, done.stdout.split()))
        == generate(model, ids, 20, lowkey.make_cache(model, plan))[0].tolist()
    )
    assert "lowkey" not in (tmp_path / "model" / "config.json").read_text()


def test_what_was_exported_can_be_compressed_again(tmp_path):
    model = build("llama-mha")
    exported(model, make(model), tmp_path)
    again, _ = loading.load(str(tmp_path / "model"), device="cpu")
    plan = make(again)
    (tmp_path / "more").mkdir()
    plain = exported(again, plan, tmp_path / "more")
    assert plain.config.num_key_value_heads == 2
    same(plain, again, plan)


def test_exporting_leaves_the_model_alone(tmp_path):
    model = build("qwen2")
    before = {n: p.clone() for n, p in model.state_dict().items()}, model.config.to_dict()
    exported(model, make(model), tmp_path)
    assert model.config.to_dict() == before[1] and model.state_dict().keys() == before[0].keys()
    assert all(torch.equal(p, before[0][n]) for n, p in model.state_dict().items())


def test_export_takes_a_saved_plan_and_writes_tokenizer_and_card(tmp_path):
    model = build("llama")
    make(model).save(tmp_path / "plan")
    exported(model, Plan.load(tmp_path / "plan", model), tmp_path)
    card = (tmp_path / "model" / "README.md").read_text()
    assert (
        "2 KV heads of width 16 in the place of 4 of 16" in card and "kv-head-svd" in card and "pico" in card
    )
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "model")("ab").input_ids == pico.tokenizer()("ab").input_ids
    )
    assert list((tmp_path / "model").glob("*.safetensors"))
