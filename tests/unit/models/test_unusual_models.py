"""Models with a vision tower, offloaded, quantised, or with rotary settings per type of layer."""

from __future__ import annotations

import copy

import peft
import pico
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache
from vision_models import IMAGE, TEXT_IDS, WRAPPERS, seeing

import lowkey
from lowkey.cache.cache import load_cache, make_cache
from lowkey.calibration.calibrate import Sample, calibrate
from lowkey.calibration.dynamic import make_dynamic_plan
from lowkey.calibration.recover import Recovery, recover
from lowkey.conversion import convert
from lowkey.core.types import LowkeyError
from lowkey.export import export_hf
from lowkey.methods.dynakv import GateTraining
from lowkey.models import families
from lowkey.models.fingerprint import model_fingerprint
from lowkey.policies import POLICIES

TEXT = "".join(
    chr(97 + int(i) % 26) for i in torch.randint(0, 26, (3000,), generator=torch.Generator().manual_seed(0))
)
SAMPLE = Sample(4, 24)
IDS, MORE = pico.prompt(24, 1), pico.prompt(5, 1, seed=4)


def plan_of(model, **options):
    return calibrate(
        model, pico.tokenizer(), TEXT, **{"method": lowkey.methods.PCA(), "sample": SAMPLE, **options}
    )


# -- vision towers


def turns(model, kind, cache):
    """Logits of a prompt with an image and of a second turn."""
    ids = IDS.clamp(max=TEXT_IDS)
    ids[0, 5:9] = IMAGE
    seen = {"pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    seen |= {"image_sizes": torch.tensor([[16, 16]])} if kind == "mistral3" else {}
    seen |= {"token_type_ids": (ids == IMAGE).long()} if kind == "gemma3" else {}
    with torch.no_grad():
        first = model(input_ids=ids, past_key_values=cache, **seen).logits
        return torch.cat([first, model(input_ids=MORE.clamp(max=TEXT_IDS), past_key_values=cache).logits], 1)


CACHES = {
    "transformers'": lambda model: DynamicCache(config=model.config.get_text_config()),
    "stock form": make_cache,
    "plan": lambda model: make_cache(model, pico.plan(model, 16, 16)),
    "pre_rope": lambda model: make_cache(model, pico.plan(model, 16, 16, layout="pre_rope")),
    "policy": lambda model: make_cache(model, policy=POLICIES["snapkv"]("100%")),
    "kivi8": lambda model: make_cache(model, bits="kivi8"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_prompt_with_an_image_is_read_as_by_transformers(kind):
    model = seeing(kind)
    want = turns(model, kind, DynamicCache(config=model.config.get_text_config()))
    lowkey.attach(model)
    assert (
        model.config.vision_config._attn_implementation
        != "lowkey"
        == model.config.text_config._attn_implementation
    )
    for name, make in CACHES.items():
        assert torch.allclose(turns(model, kind, make(model)), want, atol=1e-4), name


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_vision_model_is_the_same_after_saving_and_loading(tmp_path, kind):
    model = seeing(kind)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    before = model_fingerprint(model)
    assert before == model_fingerprint(again)
    again.config.vision_config.layer_norm_eps = 0.5
    assert model_fingerprint(again) != before


def test_a_plan_of_a_vision_model_is_calibrated_on_text():
    model = lowkey.attach(seeing("mistral3"))
    plan_of(model, budget="50%").check(model)


# -- offloaded weights


def loaded(kind, folder, how):
    pico.build(kind).save_pretrained(folder / "model")
    places = {
        "model.embed_tokens": "cpu",
        "lm_head": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
    }
    maps = {"some": {**places, "model.layers.1": "disk", "model.layers.2": "disk"}, "all": {"": "disk"}}
    if how in maps:
        return AutoModelForCausalLM.from_pretrained(
            folder / "model", device_map=maps[how], offload_folder=folder / "offloaded"
        )
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    return (
        cpu_offload(model, torch.device("cpu"))
        if how == "memory"
        else disk_offload(model, folder / "offloaded", torch.device("cpu"))
    )


@pytest.mark.parametrize(
    ("kind", "how"), [("llama", "some"), ("qwen2", "all"), ("phi3", "memory"), ("gemma3_text", "disk")]
)
def test_an_offloaded_model_is_its_resident_self(tmp_path, kind, how):
    resident, model = pico.attached(kind), lowkey.attach(loaded(kind, tmp_path, how))
    assert any(p.is_meta for p in model.parameters())
    assert model_fingerprint(model) == model_fingerprint(resident)
    plan, same = plan_of(model), plan_of(resident)
    assert all(torch.allclose(f.k_down, same.factors[i].k_down, atol=1e-5) for i, f in plan.factors.items())
    for options in ({"plan": same}, {"bits": "kivi8"}, {"policy": POLICIES["snapkv"]("16 tokens")}, {}):
        cache, want = make_cache(model, **options), make_cache(resident, **options)
        assert torch.allclose(pico.feed(model, IDS, cache), pico.feed(resident, IDS, want), atol=1e-5)
        assert cache.nbytes() == cache.predicted_nbytes()
        cache.save(tmp_path / "cache", force=True)
        again = load_cache(tmp_path / "cache", model)
        assert torch.allclose(pico.feed(model, MORE, again), pico.feed(resident, MORE, want), atol=1e-5)


@pytest.mark.parametrize("method", ["recalkv", "lorc", "mea", "palu"])
def test_methods_calibrate_what_is_offloaded(tmp_path, method):
    model = lowkey.attach(loaded("llama", tmp_path, "some"))
    plan_of(model, method=lowkey.methods.METHODS[method](), allocator="uniform", sample=Sample(4, 8)).check(
        model
    )


def test_ranks_per_token_are_trained_through_what_is_offloaded(tmp_path):
    model = lowkey.attach(loaded("llama", tmp_path, "all"))
    plan = make_dynamic_plan(
        model, pico.tokenizer(), TEXT, sample=Sample(4, 8), training=GateTraining(steps=2)
    )
    pico.feed(model, IDS, lowkey.make_cache(model, plan))


PLAIN_ONLY = {
    "export": lambda model, plan, folder: export_hf(model, pico.tokenizer(), plan, folder / "out"),
    "recover": lambda model, plan, folder: recover(
        model, pico.tokenizer(), plan, TEXT, settings=Recovery(stages=(("ce", 1),))
    ),
    "convert": lambda model, plan, folder: convert(model, "mha"),
}


def test_weights_that_are_not_at_hand_are_not_rewritten(tmp_path):
    model = lowkey.attach(loaded("llama", tmp_path, "some"))
    for name, act in PLAIN_ONLY.items():
        with pytest.raises(LowkeyError, match=f"{name}: weight .* is offloaded"):
            act(model, pico.plan(model), tmp_path)
    with pytest.raises(LowkeyError, match="'fisher': needs gradients"):
        plan_of(model, allocator="fisher")


def test_adapters_are_merged_before_weights_are_rewritten(tmp_path):
    """Or else an adapter of the attention alone would be left out without a word."""
    config = peft.LoraConfig(target_modules=["k_proj"], r=4, init_lora_weights=False)
    model = lowkey.attach(peft.get_peft_model(pico.build("llama"), config).eval())
    for kind in (model, model.get_base_model()):
        for name, act in PLAIN_ONLY.items():
            with pytest.raises(
                LowkeyError, match=f"{name}: the model has adapters around its weights; merge them first"
            ):
                act(kind, pico.plan(kind), tmp_path)


def test_a_model_without_numbers_is_refused():
    with torch.device("meta"):
        model = lowkey.attach(pico.build("llama"))
    for act in (
        lambda: plan_of(model),
        lambda: make_cache(model, pico.plan(pico.attached("llama"))),
        lambda: model_fingerprint(model),
    ):
        with pytest.raises(
            LowkeyError, match=r"'meta' and holds? no numbers; load the model with from_pretrained"
        ):
            act()


# -- quantised and packed weights


def quantised():
    return lowkey.attach(
        torch.ao.quantization.quantize_dynamic(pico.build("llama"), {torch.nn.Linear}, dtype=torch.qint8)
    )


class Packed(torch.nn.Module):
    """As packed linear maps are: integers and scales in the place of a weight, and a few words about them."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.bias, scale = (
            linear.in_features,
            None,
            linear.weight.abs().amax(1, keepdim=True) / 127,
        )
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.half())

    def forward(self, x):
        return x @ (self.weight * self.scale.float()).mT

    def get_extra_state(self):
        return {"bits": 8, "dtype": torch.float16}

    def set_extra_state(self, state):
        pass


def packed():
    model = pico.build("llama")
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name)))
    return lowkey.attach(model)


@pytest.mark.filterwarnings("ignore")  # torch's own on its quantisation
@pytest.mark.parametrize("make", [quantised, packed])
def test_caches_of_quantised_models_are_named_and_saved(tmp_path, make):
    model = make()
    assert model_fingerprint(model) == model_fingerprint(make()) != model_fingerprint(pico.build("llama"))
    for options in ({"policy": POLICIES["snapkv"]("100%")}, {"bits": 8}, {"plan": pico.plan(model)}):
        cache = make_cache(model, **options)
        pico.feed(model, IDS, cache)
        cache.save(tmp_path / "cache", force=True)
        assert torch.allclose(
            pico.feed(model, MORE, load_cache(tmp_path / "cache", model)),
            pico.feed(model, MORE, cache),
            atol=1e-5,
        )
    with pytest.raises(LowkeyError, match="this one is"):
        load_cache(tmp_path / "cache", pico.attached("llama"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [quantised, packed])
def test_what_needs_weights_in_full_refuses_quantised_ones(tmp_path, make):
    model = make()
    with pytest.raises(LowkeyError, match="quantised or packed; calibrate on the weights as bfloat16"):
        plan_of(model)
    for name, act in PLAIN_ONLY.items():
        with pytest.raises(LowkeyError, match=f"{name}: .*quantised or packed"):
            act(model, pico.plan(model), tmp_path)


def test_a_change_in_a_packed_weight_is_seen():
    model = packed()
    before = model_fingerprint(model)
    model.model.layers[2].self_attn.v_proj.weight[3, 1] += 1
    assert (after := model_fingerprint(model)) != before
    model.model.layers[2].self_attn.v_proj.scale[3] *= 1.1
    assert model_fingerprint(model) not in (before, after)


def test_a_weight_that_cannot_be_read_is_named():
    model = pico.build("llama")
    type(model).get_extra_state, kept = (lambda self: object()), type(model).get_extra_state
    try:
        with pytest.raises(LowkeyError, match="weight _extra_state is a object, which cannot be read"):
            model_fingerprint(model)
    finally:
        type(model).get_extra_state = kept


# -- rotary settings for each type of layer


def turning(kind, **rope):
    """Gemma 3 of 16 positions, whose full layers turn so."""
    own = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0, **rope}
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    settings = {"full_attention": own, "sliding_attention": plain}
    return lowkey.attach(pico.build("gemma3_text", max_position_embeddings=16, rope_parameters=settings))


def past_the_limit(model, cache):
    return pico.feed(model, pico.prompt(40, 1), cache, splits=[12, 8, 20])


def test_dynamic_rope_is_found_in_gemmas_settings():
    model = turning("dynamic")
    assert families.length_dependent_rope(model) == "dynamic"
    with pytest.raises(LowkeyError, match=r"layout 'pre_rope': rope_type 'dynamic' changes its frequencies"):
        plan_of(model, layout="pre_rope")
    with pytest.raises(LowkeyError, match="rope_type 'dynamic' changes its frequencies"):
        make_cache(model, policy=POLICIES["expected-attention"]("50%"))
    with pytest.raises(LowkeyError, match=r"rope=aware .*'dynamic'"):
        plan_of(model, method=lowkey.methods.KVLatent(rope="aware"), sinks=0, recent=0)
    want = past_the_limit(model, DynamicCache(config=model.config))
    plan = pico.plan(model, 16, 16)
    assert torch.allclose(past_the_limit(model, make_cache(model, plan)), want, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "rope"), [("linear", {}), ("yarn", {"original_max_position_embeddings": 16})]
)
def test_other_settings_of_gemma_are_taken_in_both_layouts(kind, rope):
    model = turning(kind, **rope)
    want = past_the_limit(model, DynamicCache(config=model.config))
    for layout in lowkey.core.types.LAYOUTS:
        assert torch.allclose(
            past_the_limit(model, make_cache(model, pico.plan(model, 16, 16, layout=layout))), want, atol=1e-4
        )


def test_settings_of_sliding_layers_are_theirs():
    """Which stay as they are in every cache."""
    settings = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    settings["sliding_attention"] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = lowkey.attach(pico.build("gemma3_text", max_position_embeddings=16, rope_parameters=settings))
    want = past_the_limit(model, DynamicCache(config=model.config))
    assert torch.allclose(
        past_the_limit(model, make_cache(model, pico.plan(model, 16, 16, layout="pre_rope"))), want, atol=1e-4
    )


# -- a cache in another dtype than the model's


HELD = {
    "stock form": lambda model: make_cache(model),
    "bits": lambda model: make_cache(model, bits=8),
    "kivi": lambda model: make_cache(model, bits="kivi4"),
    "plan": lambda model: make_cache(model, pico.plan(model, 8, 8, sinks=2, recent=4)),
    "pre_rope": lambda model: make_cache(model, pico.plan(model, 8, 8, layout="pre_rope")),
    "bits of a plan": lambda model: make_cache(model, pico.plan(model, 8, 8), bits="hadamard8"),
    **{
        name: lambda model, name=name: make_cache(model, policy=POLICIES[name]("50%"))
        for name in ("snapkv", "h2o", "think")
    },
}


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("held", HELD)
def test_a_cache_follows_the_model_into_another_dtype(tmp_path, held, kind):
    """It holds what a fresh one of that dtype would, and goes on: nearly as the one that was saved does in
    its own dtype.
    """
    wide = lowkey.attach(pico.build(kind).bfloat16().float())
    narrow = lowkey.attach(copy.deepcopy(wide).bfloat16())
    ids, more = pico.prompt(70, 1), pico.prompt(7, 1, seed=5)
    for n, (source, target) in enumerate([(wide, narrow), (narrow, wide)]):
        cache, fresh = HELD[held](source), HELD[held](target)
        pico.feed(source, ids, cache)
        pico.feed(target, ids, fresh)
        cache.save(tmp_path / f"{n}")
        again = load_cache(tmp_path / f"{n}", target)
        assert again.nbytes() == again.predicted_nbytes() == fresh.nbytes()
        want, got = pico.feed(source, more, cache), pico.feed(target, more, again)
        assert (
            got.dtype == target.dtype
            and float((got.float() - want.float()).norm() / want.float().norm()) < 0.05
        )
        assert again.nbytes() == again.predicted_nbytes()


def test_numbers_too_large_for_the_dtype_are_refused(tmp_path):
    wide = lowkey.attach(pico.build("llama"))
    # to numbers that every dtype has, so that it is one model in all of them
    for parameter in wide.parameters():
        parameter.data.mul_(64).round_().div_(64)
    cache = make_cache(wide)
    pico.feed(wide, IDS, cache)
    cache.layers[1].values[0, 0, 0, 0] = 1e6
    cache.save(tmp_path / "cache")
    with pytest.raises(LowkeyError, match=r"beyond those of torch.float16; load the model as bfloat16"):
        load_cache(tmp_path / "cache", lowkey.attach(copy.deepcopy(wide).half()))
