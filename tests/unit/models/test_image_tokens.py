"""Prompts with many image tokens through caches that choose among them and hold some in fewer bits."""

from __future__ import annotations

import pytest
import torch
from cache_kinds import agree
from pico import prompt
from transformers import (
    AutoConfig,
    DynamicCache,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from vision_models import DECODER, IMAGE, TEXT_IDS, seeing
from zipvl_by_hand import important, probes_of

import lowkey
from lowkey.catalog import make_policy
from lowkey.core.types import LowkeyError
from lowkey.models import families

IMAGES, TOKENS = 6, 48  # of four tokens each


def seen():
    """A prompt of which half is image tokens, with its images."""
    ids = prompt(TOKENS, 1).clamp(max=TEXT_IDS)
    ids[0, 10 : 10 + 4 * IMAGES] = IMAGE
    images = torch.randn(IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "pixel_values": images}


def policy(budget=None, **options):
    return make_policy("zipvl", budget, {"sinks": "2", "recent": "4"} | options)


@torch.no_grad()
def test_image_tokens_are_chosen_as_all_others_are():
    """By hand, from the attention of transformers' own eager model."""
    model, tau = seeing("llava"), 0.5
    model.set_attn_implementation("eager")
    layers = model(**seen(), output_attentions=True).attentions
    lowkey.attach(model)
    cache = lowkey.make_cache(model, policy=policy(tau=str(tau)))
    model(**seen(), past_key_values=cache)
    assert cache.get_seq_length() == TOKENS
    probes, stays = probes_of(list(range(TOKENS)), 0.05, 0.05), [0, 1, *range(TOKENS - 4, TOKENS)]
    of_images = 0
    for i, weights in enumerate(layers):
        wanted = important(weights[0].double()[:, probes], probes, stays, tau)
        assert all(set(at.tolist()) == wanted for at in cache.kept_positions(i))
        of_images += len(wanted & set(range(10, 10 + 4 * IMAGES)))
    assert 0 < of_images < len(layers) * 4 * IMAGES


@pytest.mark.parametrize("rest", ["drop", "int2"])
@torch.no_grad()
def test_a_prompt_with_images_goes_on_for_many_steps(rest):
    """At a full budget it writes what transformers writes; at a small one it holds what it says."""
    model = seeing("llava")
    stock = DynamicCache(config=model.config.get_text_config())
    want = model.generate(**seen(), past_key_values=stock, max_new_tokens=8, do_sample=False)
    lowkey.attach(model)
    full = lowkey.make_cache(model, policy=policy("100%", rest=rest))
    got = model.generate(**seen(), past_key_values=full, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, want)
    small = lowkey.make_cache(model, policy=policy("40%", rest=rest, every="5"), bits=4)
    got = model.generate(**seen(), past_key_values=small, max_new_tokens=12, do_sample=False)
    assert got.shape == (1, TOKENS + 12) and small.get_seq_length() == TOKENS + 11
    assert agree(small, rest) < agree(full, "full")


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_on_three_axes_are_refused_in_one_line(kind):
    tower = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4}
    text = {**DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    config = AutoConfig.for_model(kind, text_config=text)
    with pytest.raises(LowkeyError, match="three axes") as error:
        families.family(config)
    assert "\n" not in str(error.value)
    if kind == "qwen2_vl":
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=tower))
        with pytest.raises(LowkeyError, match="three axes"):
            lowkey.attach(model)
