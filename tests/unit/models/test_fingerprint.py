"""What makes a model another model: numbers that change its outputs, and nothing else."""

from __future__ import annotations

import copy

import peft
import pico
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lowkey
from lowkey.cache.cache import load_cache, make_cache
from lowkey.core.types import LowkeyError
from lowkey.models.fingerprint import config_text, model_fingerprint, tensor_checksum
from lowkey.policies import POLICIES

LORA = peft.LoraConfig(target_modules=["k_proj", "v_proj"], r=4, init_lora_weights=False)


def wrapped(config=LORA, name="first", seed=0):
    base = pico.build("llama")
    torch.manual_seed(seed)
    return peft.get_peft_model(base, config, adapter_name=name).eval()


# -- the config


ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
OTHERS = [
    ("granite", "attention_multiplier", 0.1),
    ("granite", "embedding_multiplier", 1.0),
    ("granite", "residual_multiplier", 0.5),
    ("granite", "logits_scaling", 1.0),
    ("llama", "rms_norm_eps", 1e-2),
    ("llama", "hidden_act", "gelu"),
    ("llama", "rope_parameters", ROPE),
    ("llama", "rope_parameters", {**ROPE, "rope_type": "linear"}),
    ("gemma2", "attn_logit_softcapping", 50.0),
    ("gemma2", "final_logit_softcapping", 5.0),
    ("gemma2", "query_pre_attn_scalar", 64),
    ("gemma2", "sliding_window", 8),
    ("gemma2", "layer_types", ["full_attention"] * 3),
    (
        "gemma3_text",
        "rope_parameters",
        {"full_attention": ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
]


@pytest.mark.parametrize(("kind", "field", "value"), OTHERS, ids=lambda x: str(x)[:30])
def test_the_same_weights_with_other_settings_are_another_model(kind, field, value):
    one, two = lowkey.attach(pico.build(kind)), lowkey.attach(pico.build(kind, **{field: value}))
    two.load_state_dict(one.state_dict())
    same_outputs = torch.equal(pico.feed(one, pico.prompt(40)), pico.feed(two, pico.prompt(40)))
    assert not same_outputs, "or else the field need not count"
    assert model_fingerprint(one) != model_fingerprint(two)


@pytest.mark.parametrize(
    "fields",
    [
        {"bos_token_id": 5, "eos_token_id": 7},
        {"use_cache": False},
        {"initializer_range": 0.5},
        {"attention_dropout": 0.1},
    ],
    ids=str,
)
def test_training_and_generation_fields_do_not_count(fields):
    one, two = pico.build("llama"), pico.build("llama", **fields)
    two.load_state_dict(one.state_dict())
    assert model_fingerprint(one) == model_fingerprint(two)


def test_names_versions_and_kernels_do_not_count():
    model = pico.build("llama")
    before = model_fingerprint(model)
    model.config._name_or_path, model.config.architectures, model.config.transformers_version = (
        "elsewhere",
        ["Mine"],
        "5.99",
    )
    lowkey.attach(model)
    assert model_fingerprint(model) == before


def test_numbers_count_by_their_value():
    """However they are written: a config that was written by another version may say 10000 for 10000.0."""
    config = pico.build("llama").config
    other = copy.deepcopy(config)
    other.rope_parameters, other.rms_norm_eps = {"rope_theta": 10000, "rope_type": "default"}, float("1e-06")
    other.layer_types = ("full_attention",) * pico.LAYERS  # what this version infers
    assert config_text(other) == config_text(config)


@pytest.mark.parametrize("name", pico.NAMES)
def test_a_model_is_the_same_after_saving_in_either_dtype(tmp_path, name):
    model = pico.build(name)
    found = {model_fingerprint(model)}
    for folder, dtype in (("one", torch.float32), ("two", torch.bfloat16), ("three", torch.float32)):
        model.save_pretrained(tmp_path / folder)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=dtype)
        found.add(model_fingerprint(model))
    assert len(found) == 1


# -- weights


@pytest.mark.parametrize("name", [n for n, _ in pico.build("llama").named_parameters()])
def test_one_number_of_any_weight_counts(name):
    model = pico.build("llama")
    before, flat = model_fingerprint(model), model.get_parameter(name).data.view(-1)
    for place in (0, flat.numel() // 2 + 1, flat.numel() - 1):
        flat[place] += 1
        after = model_fingerprint(model)
        assert after != before
        before = after


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int32, torch.int8, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("numel", [1, 7, 1000, 9000, 2**18 + 4096 * 3 + 5])
def test_the_checksum_sees_every_change_and_every_move(dtype, numel):
    x = torch.randint(0, 2, (numel,), generator=torch.Generator().manual_seed(0)).to(dtype)
    before = tensor_checksum(x)
    assert tensor_checksum(x.clone()) == before and tensor_checksum(torch.cat([x[:1], x])[1:]) == before, (
        "wherever it lies in memory"
    )
    for place in {0, numel // 3, numel - 1}:
        y = x.clone()
        y[place] = 1 - y[place].to(torch.int8)
        assert tensor_checksum(y) != before
    assert numel < 1000 or (tensor_checksum(x.flip(0)) != before and tensor_checksum(x.roll(1)) != before)


def test_tied_weights_are_read_once_and_are_what_they_are():
    model = pico.build("llama", tie_word_embeddings=True)
    loose = pico.build("llama", tie_word_embeddings=True)
    loose.lm_head.weight = torch.nn.Parameter(loose.model.embed_tokens.weight.detach().clone())
    assert model_fingerprint(model) == model_fingerprint(loose)


def test_two_layers_that_change_places_are_another_model():
    model, other = pico.build("llama"), pico.build("llama")
    layers = other.model.layers
    layers[1].mlp, layers[2].mlp = layers[2].mlp, layers[1].mlp
    assert model_fingerprint(model) != model_fingerprint(other)


def test_compiling_makes_no_other_model():
    model = pico.build("llama")
    before = model_fingerprint(model)
    model.model.layers[1] = torch.compile(model.model.layers[1])
    assert model_fingerprint(model) == model_fingerprint(torch.compile(model)) == before


# -- adapters


KINDS = {
    "lora": LORA,
    "everything": peft.LoraConfig(
        target_modules=["k_proj", "embed_tokens"],
        r=4,
        init_lora_weights=False,
        use_dora=True,
        modules_to_save=["lm_head"],
    ),
    "tokens": peft.LoraConfig(
        target_modules=["k_proj"], r=4, init_lora_weights=False, trainable_token_indices=[3, 5]
    ),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_counts_while_it_is_active(kind):
    base, model = model_fingerprint(pico.build("llama")), wrapped(KINDS[kind])
    active, inside = model_fingerprint(model), base if kind == "prompt" else model_fingerprint(model)
    assert active != base and active == model_fingerprint(wrapped(KINDS[kind], "other"))
    assert model_fingerprint(model.get_base_model()) == inside, (
        "a trained prompt is outside of the base model"
    )
    with model.disable_adapter():
        assert model_fingerprint(model.get_base_model()) == base
        assert kind == "prompt" or model_fingerprint(model) == base
    assert model_fingerprint(model) == active != model_fingerprint(wrapped(KINDS[kind], seed=1))


def test_adapters_that_are_not_active_do_not_count():
    model = wrapped()
    before = model_fingerprint(model)
    model.add_adapter("second", LORA)
    assert model_fingerprint(model) == before
    for weight in (w for name, w in model.named_parameters() if ".second." in name):
        weight.data.add_(1)
    assert model_fingerprint(model) == before
    model.set_adapter("second")
    assert model_fingerprint(model) != before
    model.set_adapter("first")
    assert model_fingerprint(model) == before


def test_the_strength_of_an_adapter_counts():
    model = wrapped()
    before = model_fingerprint(model)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("first", 0.5)
    assert model_fingerprint(model) != before


def test_a_merged_adapter_is_in_the_weights():
    model = wrapped()
    model.merge_adapter()
    merged = model_fingerprint(model)
    assert merged == model_fingerprint(wrapped().merge_and_unload()) != model_fingerprint(pico.build("llama"))


@pytest.mark.parametrize("from_base", [True, False])
def test_plans_of_a_model_and_of_its_inactive_wrapper_are_equal(from_base):
    base, model, ids = lowkey.attach(pico.build("llama")), lowkey.attach(wrapped()), pico.prompt(20)
    with model.disable_adapter():
        plan = pico.plan(base if from_base else model)
        got = pico.feed(model, ids, make_cache(model, plan))
        assert torch.allclose(got, pico.feed(base, ids, make_cache(base, plan)), atol=1e-5)
    with pytest.raises(LowkeyError, match="this one is"):
        make_cache(model, plan)


def test_a_fingerprint_of_an_earlier_version_says_so():
    model = pico.attached("llama")
    plan = pico.plan(model, provenance={"model": "pico", "model_sha256": "ab" * 32})
    with pytest.raises(LowkeyError, match=r"earlier version of lowkey.*compress this model anew"):
        make_cache(model, plan)


# -- which model filled a cache


MADE = {
    "stock form": {},
    "kivi8": {"bits": "kivi8"},
    "policy": {"policy": POLICIES["snapkv"]("100%")},
    "plan": {},
}


def filled(model, name, before=lambda: None):
    cache = make_cache(model, plan=pico.plan(model) if name == "plan" else None, **MADE[name])
    before()
    pico.feed(model, pico.prompt(20), cache)
    return cache


def flip(model):
    # no counter of torch sees this
    model.get_base_model().model.layers[1].self_attn.v_proj.base_layer.weight.data[0, 1] += 1


CHANGES = {
    "another adapter": lambda model: model.set_adapter("second"),
    "no adapter": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "a number": flip,
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_is_not_saved_as_what_another_model_made(tmp_path, name, change):
    model = wrapped()
    model.add_adapter("second", LORA)
    lowkey.attach(model)
    cache = filled(model, name)
    CHANGES[change](model)
    with pytest.raises(LowkeyError, match="changed since the cache was filled"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MADE)
def test_a_cache_belongs_to_the_adapter_that_filled_it(tmp_path, name):
    model = lowkey.attach(wrapped())
    model.add_adapter("second", LORA)
    if name != "plan":  # a plan is checked when the cache is made
        cache = filled(model, name, before=lambda: model.set_adapter("second"))
        model.set_adapter("first")
    else:
        cache = filled(model, name)
        model.set_adapter("second")
    with pytest.raises(LowkeyError, match="changed since"):
        cache.save(tmp_path / "cache")
    model.set_adapter("second" if name != "plan" else "first")
    cache.save(tmp_path / "cache")
    ids = pico.prompt(5, seed=3)
    assert torch.equal(
        pico.feed(model, ids, load_cache(tmp_path / "cache", model)), pico.feed(model, ids, cache)
    )
    model.set_adapter("first" if name != "plan" else "second")
    with pytest.raises(LowkeyError, match="this one is"):
        load_cache(tmp_path / "cache", model)


def test_turns_under_different_adapters_are_refused(tmp_path):
    """Its tokens remain of use; what it was saved as would be a lie."""
    model = wrapped()
    model.add_adapter("second", LORA)
    cache = filled(lowkey.attach(model), "kivi8")
    model.set_adapter("second")
    pico.feed(model, pico.prompt(5, seed=3), cache)
    model.set_adapter("first")
    pico.feed(model, pico.prompt(5, seed=4), cache)
    with pytest.raises(LowkeyError, match=r"changed since .*; fill a cache again"):
        cache.save(tmp_path / "cache")
    cache.reset()
    cache.save(tmp_path / "empty")
    pico.feed(model, pico.prompt(5, seed=3), cache)
    cache.save(tmp_path / "cache")


def test_a_refused_first_prompt_is_no_turn(tmp_path):
    model = wrapped()
    model.add_adapter("second", LORA)
    cache = make_cache(lowkey.attach(model), bits="kivi8")
    with pytest.raises(LowkeyError):
        model(pico.prompt(20), attention_mask=torch.zeros(2, 1, 20, 20), past_key_values=cache)
    model.set_adapter("second")
    pico.feed(model, pico.prompt(20), cache)
    cache.save(tmp_path / "cache")
    load_cache(tmp_path / "cache", model)


def test_a_loaded_cache_knows_what_filled_it(tmp_path):
    model = wrapped()
    model.add_adapter("second", LORA)
    filled(lowkey.attach(model), "kivi8").save(tmp_path / "one")
    cache = load_cache(tmp_path / "one", model)
    model.set_adapter("second")
    pico.feed(model, pico.prompt(5, seed=3), cache)
    model.set_adapter("first")
    with pytest.raises(LowkeyError, match="changed since"):
        cache.save(tmp_path / "two")


def test_a_default_of_a_later_version_makes_no_other_model():
    """A field that only that version knows, at its default."""
    config = AutoConfig.for_model("llama", hidden_size=64)

    class Later(type(config)):
        brand_new: float = 0.5

    assert config_text(Later(**config.to_dict())) == config_text(config)
    assert config_text(Later(**config.to_dict(), brand_new=0.25)) != config_text(config)
