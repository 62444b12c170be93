"""Assumptions about transformers' decoder layers, and what `attach` changes, one test each."""

from __future__ import annotations

import subprocess
import sys

import pico
import pytest
import torch
from pico import VOCAB, attached, feed, prompt, stock
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lowkey
from lowkey.core.types import LowkeyError
from lowkey.models import attention_interface, families

NAMES = list(families.FAMILIES)
MIXED = ["gemma2", "gemma3_text"]  # sliding layers beside full ones


# -- the decoder's parts


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_are_the_inputs_of_the_layers(name):
    model, got = pico.build(name), []
    for layer in families.decoder_layers(model):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: got.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    with torch.no_grad():
        hidden = model(prompt(8), output_hidden_states=True).hidden_states
    assert len(got) == pico.LAYERS
    assert all(torch.equal(a, b) for a, b in zip(got, hidden, strict=False))


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_layer_runs_alone_and_returns_a_tensor(name):
    model, ids = stock(name), prompt(8)
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
        layer, positions = families.decoder_layers(model)[1], torch.arange(8).unsqueeze(0)
        mask = torch.zeros(1, 1, 8, 8).masked_fill(~torch.ones(8, 8, dtype=torch.bool).tril(), -torch.inf)
        arguments = {"attention_mask": mask, "position_ids": positions, "past_key_values": None}
        out = layer(
            hidden[1],
            **arguments,
            position_embeddings=families.rope(model, 1).embeddings(positions, hidden[1]),
        )
    assert isinstance(out, torch.Tensor)
    assert torch.allclose(out, hidden[2], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_attention_block_reads_what_families_say(name):
    model, got = pico.build(name), []
    block = families.decoder_layers(model)[1]
    block.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: got.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        hidden = model(prompt(8), output_hidden_states=True).hidden_states
        assert torch.equal(got[0], families.attention_input(model, 1, hidden[1]))


@pytest.mark.parametrize("name", NAMES)
def test_geometry_is_read_off_the_config(name):
    shape, config = families.geometry(stock(name)), stock(name).config
    assert (shape.layers, shape.head_dim, shape.hidden) == (pico.LAYERS, pico.HEAD_DIM, pico.HIDDEN)
    assert (shape.heads, shape.kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert shape.compressible == ((1, 2) if name in MIXED else (0, 1, 2))


def test_layer_types_are_those_of_transformers_own_cache():
    for name in NAMES:
        config = stock(name).config
        sliding = [layer.is_sliding for layer in DynamicCache(config=config).layers]
        assert [kind == "sliding_attention" for kind in families.layer_types(config)] == sliding


def test_a_model_of_sliding_layers_only_is_refused():
    with pytest.raises(LowkeyError, match="sliding"):
        families.geometry(pico.build("mistral", sliding_window=16))


def test_an_unknown_family_is_refused_with_the_nearest():
    config = AutoConfig.for_model("gpt2", vocab_size=VOCAB, n_embd=64, n_layer=1, n_head=2)
    with pytest.raises(LowkeyError, match="gpt2") as refusal:
        lowkey.attach(AutoModelForCausalLM.from_config(config))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", families.REFUSED)
def test_a_refused_family_says_why(kind):
    config = AutoConfig.for_model("llama", vocab_size=VOCAB)
    config.model_type = kind
    with pytest.raises(LowkeyError) as refusal:
        families.family(config)
    assert families.REFUSED[kind] in str(refusal.value)


@pytest.mark.parametrize("kind", families.LENGTH_DEPENDENT_ROPE)
def test_pre_rope_is_refused_when_frequencies_change(kind):
    model = pico.build("llama")
    model.config.rope_parameters = {"rope_type": kind}
    with pytest.raises(LowkeyError, match="post_rope"):
        families.check_layout(model, "pre_rope")
    families.check_layout(model, "post_rope")


# -- attach


def test_importing_lowkey_changes_nothing_in_the_process():
    program = """
import torch, transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING as layers
state = lambda: (dict(functions), dict(masks), dict(layers), torch.get_num_threads(),
    torch.get_default_dtype(), torch.is_grad_enabled(), torch.random.get_rng_state().sum().item(),
    transformers.logging.get_verbosity())
before = state()
import lowkey, lowkey.calibration.calibrate, lowkey.cache, lowkey.methods
assert state() == before
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_stock_cache_behaves_as_before_after_attach(name):
    ids, model = prompt(24), pico.build(name)
    # SDPA drops the soft cap, for which Gemma 2 wants eager
    model.set_attn_implementation("eager" if name == "gemma2" else "sdpa")
    before = [feed(model, ids, DynamicCache(config=model.config), [5, 0], [20, 1, 1, 2]), feed(model, ids)]
    lowkey.attach(model)
    after = [feed(model, ids, DynamicCache(config=model.config), [5, 0], [20, 1, 1, 2]), feed(model, ids)]
    for a, b in zip(before, after, strict=True):
        assert torch.allclose(
            pico.real(a, [5, 0]), pico.real(b, [5, 0]), atol=2e-5 if name == "gemma2" else 0
        )


def test_attach_registers_both_functions_and_marks_the_model():
    model = lowkey.attach(pico.build("llama"))
    assert ALL_ATTENTION_FUNCTIONS[attention_interface.ATTENTION_NAME] is attention_interface.attention
    masks = ALL_MASK_ATTENTION_FUNCTIONS[attention_interface.ATTENTION_NAME]
    assert masks is attention_interface.needed_mask
    assert attention_interface.attached(model) and not attention_interface.attached(pico.build("llama"))


def test_attach_twice_is_attach_once():
    model = lowkey.attach(lowkey.attach(pico.build("llama")))
    assert torch.equal(feed(model, prompt(8)), feed(attached("llama"), prompt(8)))


def test_output_attentions_is_refused():
    with pytest.raises((LowkeyError, ValueError), match="output_attentions"):
        attached("llama")(prompt(4), output_attentions=True)


def test_attention_sinks_are_refused():
    x = torch.zeros(1, 1, 1, 16)
    with pytest.raises(LowkeyError, match="s_aux"):
        attention_interface.attention(torch.nn.Module(), x, x, x, None, s_aux=torch.zeros(1))


def test_a_float_mask_is_refused():
    with pytest.raises(LowkeyError, match="attention_mask"):
        attached("llama")(
            prompt(4),
            attention_mask=torch.zeros(2, 1, 4, 4),
            past_key_values=lowkey.make_cache(attached("llama")),
        )


def test_a_boolean_4d_mask_is_honoured():
    """Row i of the mask hides token 1 from everyone but itself: as if token 1 were padding between others."""
    ids, model = prompt(6, batch=1), attached("llama")
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[2:, 1] = False
    changed = ids.clone()
    changed[0, 1] = (ids[0, 1] + 1) % VOCAB
    maps = pico.layer_factors(model, 6, 6)
    with torch.no_grad():
        a, b = (
            model(x, attention_mask=mask[None, None], past_key_values=pico.lowrank(model, maps)).logits
            for x in (ids, changed)
        )
    assert torch.equal(a[0, 2:], b[0, 2:]) and not torch.equal(a[0, 1], b[0, 1])
