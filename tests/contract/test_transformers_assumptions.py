"""Assumptions about transformers' caches, masks and attention, one test each.

A failure names what a new release of transformers changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pico
import pytest
import torch
from pico import WINDOW, feed, generate, prompt
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, sdpa_mask
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lowkey.cache.cache import cache_of
from lowkey.models import families
from lowkey.storage.base import StockSlidingLayer, StoringLayer

NAMES = list(families.FAMILIES)
MIXED = ["gemma2", "gemma3_text"]  # sliding layers beside full ones


@dataclass
class Seen:
    """What reached the attention function in one call."""

    layer: int
    query: torch.Tensor
    key: object
    value: object
    mask: torch.Tensor | None
    rest: dict


def spied(name: str) -> tuple[torch.nn.Module, list[Seen]]:
    """A fresh model whose attention function writes down its arguments."""
    calls: list[Seen] = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        calls.append(Seen(module.layer_idx, query, key, value, attention_mask, kwargs))
        if not isinstance(key, torch.Tensor):
            key, value = key.keys, value.values
        attention_mask = None if attention_mask is None else attention_mask[..., -key.shape[2] :]
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=kwargs["scaling"])

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    model = pico.build(name)
    model.set_attn_implementation("spy")
    return model, calls


@dataclass
class Box:
    """Not a tensor."""

    keys: torch.Tensor
    values: torch.Tensor


class BoxLayer(StoringLayer):
    """Stores nothing, says that it has seen `length` tokens."""

    def __init__(self, length: int = 0) -> None:
        super().__init__()
        self.length, self.boxes = length, []

    def lazy_initialization(self, key_states, value_states):
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        self.boxes.append(Box(key_states, value_states))
        return self.boxes[-1], self.boxes[-1]

    def get_seq_length(self):
        return self.length

    def get_mask_sizes(self, query_length):
        return self.length + query_length, 0

    def tensors(self):
        return {}

    def predicted_nbytes(self):
        return 0

    def attend(self, keys, values, call):
        raise AssertionError("the spy never asks")


# -- Cache(layers=[...])


@pytest.mark.parametrize("name", NAMES)
def test_the_attention_function_gets_what_update_returns(name):
    model, calls = spied(name)
    cache = cache_of(model, lambda i: BoxLayer())
    feed(model, prompt(8), cache)
    for call in (c for c in calls if c.layer in families.geometry(model).compressible):
        box = cache.layers[call.layer].boxes[0]
        assert call.key is box and call.value is box


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_rotated_before_they_reach_the_cache(name):
    """The same token at two positions gives two keys and one value."""
    model, _ = spied(name)
    cache = cache_of(model, lambda i: BoxLayer())
    feed(model, torch.full((1, 2), 5), cache)
    first = cache.layers[families.geometry(model).compressible[0]].boxes[0]
    assert first.keys.shape[-2] == 2 and first.keys.shape[-1] == families.geometry(model).head_dim
    assert not torch.allclose(first.keys[..., 0, :], first.keys[..., 1, :], atol=1e-3)
    assert torch.allclose(first.values[..., 0, :], first.values[..., 1, :], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_get_seq_length_drives_the_position_ids(name):
    """Tokens seen, not tokens kept. Without `position_ids` from the caller the model counts on from it."""
    model, calls = spied(name)
    model(
        prompt(3),
        past_key_values=cache_of(model, lambda i: BoxLayer(50)) if name == "llama" else _mixed(model, 50),
    )
    last = calls[-1].rest["position_ids"]
    assert last.flatten().tolist() == [50, 51, 52]


def _mixed(model, seen):
    cache = cache_of(model, lambda i: BoxLayer(seen))
    for layer in cache.layers:
        if isinstance(layer, StockSlidingLayer):
            layer.cumulative_length = seen
            layer.keys = layer.values = torch.zeros(
                2, families.geometry(model).kv_heads, WINDOW - 1, pico.HEAD_DIM
            )
            layer.is_initialized = True
    return cache


def test_get_mask_sizes_drives_the_length_of_the_mask():
    model, calls = spied("llama")
    feed(model, prompt(3), cache_of(model, lambda i: BoxLayer(50)), pads=[7, 0])
    assert calls[-1].mask.shape == (2, 1, 3, 53)


# -- what the attention function is given


@pytest.mark.parametrize("name", NAMES)
def test_position_ids_reach_the_attention_function(name):
    model, calls = spied(name)
    positions = torch.arange(8).expand(2, -1)
    model(prompt(8), position_ids=positions)
    assert all(torch.equal(c.rest["position_ids"], positions) for c in calls) and len(calls) == pico.LAYERS


@pytest.mark.parametrize("name", NAMES)
def test_generate_counts_positions_from_the_first_real_token(name):
    """Left padding stands at position 0; each later step brings one position per row."""
    model, calls = spied(name)
    generate(model, prompt(8), 2, pads=[3, 0])
    first, last = calls[0].rest["position_ids"], calls[-1].rest["position_ids"]
    assert first.tolist() == [[0, 0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert last.tolist() == [[5], [8]]


@pytest.mark.parametrize(("name", "softcap"), [("gemma2", 2.0), ("llama", None), ("gemma3_text", None)])
def test_softcap_arrives_where_the_family_has_one(name, softcap):
    model, calls = spied(name)
    feed(model, prompt(4))
    assert {c.rest.get("softcap") for c in calls} == {softcap}


@pytest.mark.parametrize("name", NAMES)
def test_scaling_arrives(name):
    model, calls = spied(name)
    feed(model, prompt(4))
    expected = 0.3 if name == "granite" else pico.HEAD_DIM**-0.5
    assert {c.rest["scaling"] for c in calls} == {expected}


@pytest.mark.parametrize("name", NAMES)
def test_no_family_sends_attention_sinks(name):
    model, calls = spied(name)
    feed(model, prompt(4))
    assert all(c.rest.get("s_aux") is None for c in calls)


@pytest.mark.parametrize("name", MIXED)
def test_sliding_layers_get_plain_tensors(name):
    model, calls = spied(name)
    feed(model, prompt(8), cache_of(model, lambda i: BoxLayer()))
    assert [type(c.key).__name__ for c in calls] == ["Tensor", "Box", "Box"]


@pytest.mark.parametrize("name", MIXED)
def test_sliding_layers_get_their_sliding_mask(name):
    model, calls = spied(name)
    feed(model, prompt(24))
    i, j = torch.arange(24).unsqueeze(1), torch.arange(24)
    assert torch.equal(calls[0].mask[0, 0], (j <= i) & (j > i - WINDOW))
    assert calls[1].mask is None or torch.equal(calls[1].mask[0, 0], j <= i)


# -- masks


def test_a_mask_function_registered_class_wide_is_used():
    model, calls = spied("llama")
    feed(model, prompt(8), pads=[3, 0])
    assert all(c.mask is not None for c in calls)


def test_a_name_without_a_mask_function_loses_the_padding():
    """Why `attach` registers one: without it the attention function gets no mask at all."""
    got = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        got.append(attention_mask)
        return sdpa_attention_forward(module, query, key, value, None)

    AttentionInterface.register("maskless", spy)
    model = pico.build("llama")
    model.set_attn_implementation("maskless")
    feed(model, prompt(8), pads=[3, 0])
    assert got == [None] * pico.LAYERS


def test_sdpa_mask_is_boolean_and_true_means_attend():
    padding = torch.tensor([[False, True, True, True]])
    mask = sdpa_mask(batch_size=1, q_length=4, kv_length=4, attention_mask=padding)
    assert mask.dtype == torch.bool and mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].tolist() == [
        [False] * 4,
        [False, True, False, False],
        [False, True, True, False],
        [False, True, True, True],
    ]


@pytest.mark.parametrize(("query", "stored"), [(4, 4), (1, 9)])
def test_sdpa_mask_may_be_none_without_padding(query, stored):
    assert sdpa_mask(batch_size=1, q_length=query, kv_length=stored, q_offset=stored - query) is None


def test_sdpa_mask_of_a_later_chunk_ends_with_its_last_token():
    mask = sdpa_mask(batch_size=1, q_length=2, kv_length=5, q_offset=3)
    assert mask[0, 0].tolist() == [[True, True, True, True, False], [True] * 5]


# -- the sliding layer


def _fill(layer, length):
    layer.update(torch.zeros(1, 2, length, 16), torch.zeros(1, 2, length, 16))
    return layer.keys.untyped_storage().nbytes()


def test_a_stock_sliding_layer_keeps_a_view_of_the_prompt():
    """The wart that StockSlidingLayer repairs; when this fails, transformers has repaired it too and ours can
    go.
    """
    assert _fill(DynamicSlidingWindowLayer(WINDOW), 100) == 100 * 2 * 16 * 4


def test_our_sliding_layer_keeps_the_window():
    assert _fill(StockSlidingLayer(WINDOW), 100) == (WINDOW - 1) * 2 * 16 * 4


def test_our_sliding_layer_returns_what_upstreams_returns():
    ours, theirs = StockSlidingLayer(WINDOW), DynamicSlidingWindowLayer(WINDOW)
    for length in (20, 1, 5, 40, 1):
        x, y = torch.randn(1, 2, length, 16), torch.randn(1, 2, length, 16)
        for a, b in zip(ours.update(x, y), theirs.update(x, y), strict=True):
            assert torch.equal(a, b)


# -- what attention with a small cache from birth stores (lowkey.attention)


def test_a_static_cache_counts_in_place():
    """Why a layer adds 0 to what it read before it stores: else the number would move under its hands."""
    layer = StaticLayer(8)
    layer.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    seen = layer.get_seq_length()
    copy = seen + 0
    layer.update(torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4))
    assert int(seen) == 5 and int(copy) == 3


@pytest.mark.parametrize("new", [DynamicLayer, partial(StaticLayer, 8)], ids=["dynamic", "static"])
@pytest.mark.parametrize("width", [0, 3, 9])
def test_keys_and_values_of_different_widths_pass_a_cache(new, width):
    """Of width 0 too: the place of values where keys hold everything."""
    layer = new()
    keys, values = torch.randn(2, 1, 5, 6), torch.randn(2, 1, 5, width)
    layer.update(keys[:, :, :4], values[:, :, :4])
    got = layer.update(keys[:, :, 4:], values[:, :, 4:])
    assert [tuple(x.shape[:2]) + tuple(x.shape[3:]) for x in got] == [(2, 1, 6), (2, 1, width)]
    assert (
        torch.equal(got[0][:, :, :5], keys)
        and torch.equal(got[1][:, :, :5], values)
        and int(layer.get_seq_length()) == 5
    )


def test_cached_beams_are_reordered_with_values_of_width_0():
    cache = DynamicCache()
    cache.update(torch.randn(2, 1, 3, 4), torch.zeros(2, 1, 3, 0), 0)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.layers[0].keys[0], cache.layers[0].keys[1]) and cache.layers[0].values.shape == (
        2,
        1,
        3,
        0,
    )


@pytest.mark.parametrize("stored", [4, 9])
def test_no_mask_means_causal_from_the_first_stored_token(stored):
    """An empty static cache is longer than the text: token i sees slots up to i, not the last ones."""
    assert sdpa_mask(batch_size=1, q_length=4, kv_length=4) is None
    x, module = torch.randn(1, 2, stored, 8), pico.build("llama").model.layers[0].self_attn
    module.num_key_value_groups = 1
    out, _ = sdpa_attention_forward(module, x[:, :, :4], x, x, None, scaling=1.0)
    for i in range(4):
        weights = torch.softmax(x[:, :, i].unsqueeze(2) @ x[:, :, : i + 1].mT, -1)
        assert torch.allclose(out[:, i], (weights @ x[:, :, : i + 1]).squeeze(2), atol=1e-5)


def test_a_module_without_own_parameters_is_not_initialised():
    """Of code that is not transformers' own; why the output projection is a class of its own."""
    asked = []

    class Own(PreTrainedModel):
        config_class = LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.part = torch.nn.Sequential(torch.nn.Linear(2, 2))
            self.post_init()

        def _init_weights(self, module):
            super()._init_weights(module)
            asked.append(type(module).__name__)

    Own(LlamaConfig())
    assert asked == ["Linear"]


def test_a_head_dim_of_0_is_taken_for_none_given():
    """Why a rotary embedding of width 0 is one of our own."""
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, head_dim=0)
    assert len(LlamaRotaryEmbedding(config=config).inv_freq) == 8


def test_restarting_positions_separate_documents_without_a_cache():
    model = pico.build("llama")
    arguments = {
        "config": model.config,
        "inputs_embeds": torch.zeros(1, 6, pico.HIDDEN),
        "attention_mask": None,
    }
    arguments |= {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    packed = create_causal_mask(**arguments, past_key_values=None)
    assert not packed[0, 0, 3:, :3].any() and packed[0, 0, 5, 3:].all()
    assert create_causal_mask(**arguments, past_key_values=DynamicCache()) is None
