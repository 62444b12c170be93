"""Plans as plain checkpoints: what stock transformers makes of them is what the cache of the plan makes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import asdict, replace

import pico
import pytest
import torch
from pico import HEAD_DIM, feed, generate, prompt
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import lowkey
from lowkey.attention import LowkeyConfig, LowkeyForCausalLM
from lowkey.calibration.calibrate import fit_layers, name_and_parameters
from lowkey.core.types import LAYOUTS, LowkeyError
from lowkey.export import export_hf
from lowkey.methods import MEA, PCA, CalibrationContext, KVHeadSVD, KVLatent
from lowkey.models import families, loading
from lowkey.models.fingerprint import model_fingerprint
from lowkey.plan.plan import Plan, versions

COMMUTING = KVHeadSVD(keys="commuting")
ROWS = prompt(24, batch=8, seed=1)
PADS = [7, 0]
FULL = {"gemma2": {"layer_types": ["full_attention"] * 3}}
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


def build(name, **overrides):
    """Attached, with biases that are not zero, as training leaves them."""
    model = pico.build(name, **FULL.get(name, {}), **overrides)
    generator = torch.Generator().manual_seed(7)
    for parameter, values in model.named_parameters():
        if parameter.endswith("bias"):
            values.data.normal_(generator=generator)
    return lowkey.attach(model)


def make(model, method=COMMUTING, ranks=(8, 8), layout="post_rope", **fields):
    """A plan of these ranks in all layers."""
    bases, _ = fit_layers(method, CalibrationContext(model, ROWS, 2, layout, sorted({*ranks, HEAD_DIM}), 0))
    about = {
        "model": "pico",
        "model_sha256": model_fingerprint(model),
        "data_sha256": "0",
        "tokens": 1,
        "seed": 0,
        "versions": versions(),
    }
    plan = Plan(
        {i: b.at(*ranks) for i, b in bases.items()},
        layout,
        name_and_parameters(method),
        {"name": "uniform", "parameters": {}},
        "50%",
        geometry=asdict(families.geometry(model)),
        provenance=about,
    )
    return replace(plan, **fields)


def exported(model, plan, folder, **options):
    """What stock transformers reads; eager attention, because SDPA drops the soft cap of Gemma 2."""
    assert export_hf(model, pico.tokenizer(), plan, folder / "model", **options) == folder / "model"
    return AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")


def same(plain, model, plan, tolerance=1e-4):
    """Logits and greedy tokens of padded prompts, and by one token at a time."""
    ids = prompt(40)
    ours, stock = (
        feed(m, ids, past, PADS) for m, past in ((model, lowkey.make_cache(model, plan)), (plain, None))
    )
    for row, pad in enumerate(PADS):
        assert torch.allclose(ours[row, pad:], stock[row, pad:], atol=tolerance)
    assert torch.equal(
        generate(plain, ids, 20, pads=PADS), generate(model, ids, 20, lowkey.make_cache(model, plan), PADS)
    )


# -- what comes back


@pytest.mark.parametrize(("name", "layout"), list(zip(FAMILIES, itertools.cycle(LAYOUTS), strict=False)))
def test_stock_transformers_makes_of_it_what_the_plans_cache_makes(tmp_path, name, layout):
    model = build(name)
    plan = make(model, layout=layout)
    plain = exported(model, plan, tmp_path)
    assert type(plain).__name__ == type(model).__name__
    assert plain.config.num_key_value_heads * 2 == model.config.num_key_value_heads
    same(plain, model, plan)


def test_the_plan_matters(tmp_path):
    """Or else the tests above compare nothing."""
    model = build("llama")
    plain = exported(model, make(model), tmp_path)
    assert not torch.equal(generate(plain, prompt(40), 30), generate(model, prompt(40), 30))


@pytest.mark.parametrize("name", ["llama-mha", "gemma2"])
@pytest.mark.parametrize("order", [[0, 2, 1, 3], [3, 1, 0, 2]], ids=str)
def test_heads_that_are_grouped_in_another_order_take_their_queries_and_outputs_along(tmp_path, name, order):
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
def test_whatever_leaves_one_head_of_a_group_is_exported(tmp_path, method, ranks, name, heads):
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
def test_any_rotation_is_the_same_in_the_plain_model_or_is_refused(tmp_path, kind, method):
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


def test_it_runs_where_there_is_no_lowkey(tmp_path):
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


def test_a_plan_from_disk_a_tokenizer_and_a_card(tmp_path):
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


# -- refusals


def with_means(plan):
    return replace(
        plan, factors={i: replace(f, k_mean=torch.zeros(4, HEAD_DIM)) for i, f in plan.factors.items()}
    )


def with_one_layer(plan, f):
    return replace(plan, factors={**plan.factors, 1: f})


def spoilt(plan):
    """The key maps of one layer no longer commute, by a thousandth."""
    f = plan.factors[2]
    return replace(
        plan, factors={**plan.factors, 2: replace(f, k_down=f.k_down + 1e-3 * torch.randn(f.k_down.shape))}
    )


REFUSALS = {
    "layer": (
        lambda m: make(m, KVHeadSVD()),
        r"keys=layer .*: it merges the keys of 4 heads and the values of 2; compress with .* -O keys=commuting ",
    ),
    "grouped": (
        lambda m: make(m, KVHeadSVD(keys="grouped")),
        "keys=grouped .*: its key maps do not commute with rotary embedding; ",
    ),
    "spoilt": (lambda m: spoilt(make(m)), "key maps do not commute"),
    "two of four": (
        lambda m: make(m, KVHeadSVD(4, "commuting")),
        "latents of width 32 where a head is 16 wide",
    ),
    "pca": (
        lambda m: make(m, PCA()),
        "'pca' .*: it does not keep the channels that a rotary embedding of width 8 rotates",
    ),
    "any channels": (lambda m: make(m, KVLatent("data")), "does not keep the channels"),
    "uneven": (lambda m: make(m, ranks=(8, 16)), "rank 8 of keys and 16 of values"),
    "whole": (lambda m: make(m, ranks=(16, 16)), "every channel of every head"),
    "means": (lambda m: with_means(make(m)), "subtracts means from"),
    "layers differ": (lambda m: with_one_layer(make(m), pico.factors(4)), "other ranks than one another"),
    "frequencies": (lambda m: aware(m), "frequencies of its own; compress with -O rope=kept"),
    "sinks": (
        lambda m: make(m, sinks=4),
        "4 sinks and 0 recent tokens exact; compress with --sinks 0 --recent 0",
    ),
}


def aware(model):
    """KV-Latent's own rotation, which is made after the ranks are known."""
    method = KVLatent(rope="aware")
    plan, context = make(model, method), CalibrationContext(model, ROWS, 2, "post_rope", [8, HEAD_DIM], 0)
    return replace(plan, factors=method.finish(plan.factors, context))


@pytest.mark.parametrize("case", REFUSALS)
def test_a_plan_without_the_form_is_refused_in_one_line_with_what_to_do(tmp_path, case):
    torch.manual_seed(0)
    model, (plan, match) = build("llama"), REFUSALS[case]
    refused(model, plan(model), tmp_path, f"^plan of method .*{match}")


@pytest.mark.parametrize(
    ("name", "match"),
    [("qwen3", "norms keys"), ("olmo2", "norms keys"), ("gemma2-mixed", "2 of its 3 layers")],
)
def test_a_family_that_cannot_hold_it_is_refused(tmp_path, name, match):
    model = lowkey.attach(pico.build(name.removesuffix("-mixed")))
    refused(model, make(model), tmp_path, f"^model of family .*{match}.*; use the plan$")


def refused(model, plan, folder, match):
    with pytest.raises(LowkeyError, match=match) as refusal:
        export_hf(model, pico.tokenizer(), plan, folder / "model")
    assert len(str(refusal.value).splitlines()) == 1
    assert not list(folder.iterdir()), "nothing is left behind"


def test_strided_channels_whose_frequencies_differ_are_refused(tmp_path):
    """YaRN's ramp lies elsewhere in a narrower head."""
    model = build("llama-yarn")
    refused(
        model,
        make(model, KVLatent()),
        tmp_path,
        "does not keep the channels that a rotary embedding of width 8 rotates",
    )


def test_another_models_plan_is_refused(tmp_path):
    model, other = build("llama"), build("llama-mha")
    refused(model, make(other), tmp_path, "was made for model")


def test_files_are_replaced_only_by_force(tmp_path):
    model = build("llama")
    plan = make(model)
    exported(model, plan, tmp_path)
    with pytest.raises(LowkeyError, match="already holds files"):
        exported(model, plan, tmp_path)
    exported(model, plan, tmp_path, force=True)
    (tmp_path / "model" / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(LowkeyError, match="did not write 'thesis"):
            exported(model, plan, tmp_path, force=force)
    assert (tmp_path / "model" / "thesis.txt").read_text() == "mine"


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    model, tokenizer = build("llama"), pico.tokenizer()
    plan = make(model)
    export_hf(model, tokenizer, plan, tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}

    def fail(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(LowkeyError, match=r"cannot write .*No space left"):
        export_hf(model, tokenizer, plan, tmp_path / "model", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before


def test_factors_in_another_dtype_are_folded_too(tmp_path):
    model = build("llama")
    plan = make(model)
    wide = {i: f.to(torch.empty(0, dtype=torch.float64)) for i, f in plan.factors.items()}
    same(exported(model, replace(plan, factors=wide), tmp_path), model, plan)
