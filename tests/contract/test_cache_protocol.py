"""Every cache layer: bytes, the cache protocol of transformers, bfloat16, and `make_cache`."""

from __future__ import annotations

import copy

import pico
import pytest
import torch
from pico import attached, feed, lowrank, prompt, real, stock
from storage_kinds import PADS, close, full

import lowkey
from lowkey.core.types import LowkeyError
from lowkey.models import families
from lowkey.storage.exact import Exact

# -- bytes


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gemma3_text", "llama-mqa"])
@pytest.mark.parametrize("rank", [(16, 16), (6, 9)], ids=str)
def test_held_bytes_are_the_predicted_bytes(name, rank, exact, layout):
    model, ids = attached(name), prompt(30)
    cache = lowrank(model, pico.layer_factors(model, *rank), layout, exact)
    # shorter than the recent window, across it, decoding, a second turn
    for piece in ids.split([2, 21, 1, 1, 5], 1):
        feed(model, piece, cache)
        assert cache.nbytes() == cache.predicted_nbytes() > 0


@pytest.mark.parametrize("exact", [Exact(), Exact(sinks=4, recent=6)], ids=["plain", "both"])
def test_held_bytes_by_hand(exact):
    """2 rows, 4 heads, 30 tokens, ranks 6 and 9 in fp32, 3 layers. Of every row, 8 bytes each for where it
    begins, its position and, beside recent tokens, where it ended; 4 for each index of a sink."""
    model = attached("llama")
    cache = lowrank(model, pico.layer_factors(model, 6, 9), "post_rope", exact)
    feed(model, prompt(30), cache)
    latents = 2 * 4 * (30 - exact.recent) * (6 + 9) * 4
    dense_rows = 2 * 4 * (exact.recent + exact.sinks) * (16 + 16) * 4
    assert cache.nbytes() == 3 * (latents + dense_rows + 2 * ((24 if exact.recent else 16) + 4 * exact.sinks))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bytes_by_hand(bits):
    """Per token and head one group of 16 numbers: codes, and a scale and an offset in fp32; two indices per
    row.
    """
    model = attached("llama")
    cache = pico.quantized(model, bits)
    feed(model, prompt(30), cache, splits=[28, 1, 1])
    for layer in cache.layers:
        layer.make_compact()
    assert cache.nbytes() == cache.predicted_nbytes() == 3 * 2 * (2 * 4 * 30 * (16 * bits // 8 + 2 * 4) + 16)


def test_half_the_rank_is_half_the_bytes():
    model, ids = attached("llama"), prompt(30)
    half, whole = (lowrank(model, pico.layer_factors(model, r, r)) for r in (8, 16))
    feed(model, ids, half)
    feed(model, ids, whole)
    offsets = 3 * 2 * 16
    assert 2 * (half.nbytes() - offsets) == whole.nbytes() - offsets


def test_reordering_changes_no_bytes(kind):
    model = attached("gemma2")
    cache = kind(model)
    feed(model, prompt(20), cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.nbytes() == cache.predicted_nbytes()


# -- the rest of transformers' cache protocol


def test_a_reset_cache_is_a_fresh_cache(kind):
    model, ids = attached("llama"), prompt(20)
    cache = kind(model)
    feed(model, ids, cache, PADS)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == cache.predicted_nbytes() == 0
    close(feed(model, ids[:1, :13], cache), feed(model, ids[:1, :13], kind(model)), 0)


def test_a_reset_layer_lets_its_tensors_go(kind):
    cache = kind(attached("llama"))
    feed(attached("llama"), prompt(20), cache)
    layer = cache.layers[0]
    names = list(layer.tensors())
    layer.reset()
    assert all(getattr(layer, name, None) is None or not getattr(layer, name).numel() for name in names)


def test_a_fresh_cache_holds_nothing(kind):
    cache = kind(attached("llama"))
    assert cache.nbytes() == cache.predicted_nbytes() == cache.get_seq_length() == 0


def test_a_cache_survives_copying(kind):
    model, ids = attached("llama"), prompt(20)
    cache = kind(model)
    feed(model, ids, cache)
    twin = copy.deepcopy(cache)
    feed(model, prompt(5, seed=1), twin)
    assert cache.get_seq_length() == 20 and twin.get_seq_length() == 25


def test_positions_that_jump_are_refused():
    model = attached("llama")
    cache = full(model)
    feed(model, prompt(10), cache)
    with pytest.raises(LowkeyError, match="position_ids"):
        model(prompt(3), past_key_values=cache, position_ids=torch.tensor([[20, 21, 22]]))


# -- bf16


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3-partial"])
def test_bf16_at_full_rank_is_as_close_to_fp32_as_stock_bf16(name, layout):
    ids, reference = prompt(), feed(stock(name), prompt(), pads=PADS)
    plain = pico.build(name).bfloat16()
    plain.set_attn_implementation("eager")
    ours = lowkey.attach(pico.build(name).bfloat16())
    error = [
        real(out.float() - reference, PADS).norm()
        for out in (
            feed(ours, ids, full(ours, layout, Exact(3, 5)), PADS, [30, 1, 9]),
            feed(plain, ids, pads=PADS),
        )
    ]
    assert error[0] < 2 * error[1]


def test_bf16_bytes_are_half_the_fp32_bytes(kind):
    model = lowkey.attach(pico.build("llama").bfloat16())
    cache = kind(model)
    feed(model, prompt(20), cache)
    assert cache.nbytes() == cache.predicted_nbytes()


def test_quantised_storage_stays_close():
    ids, reference = prompt(), feed(stock("llama"), prompt())
    eight, four = (
        (feed(attached("llama"), ids, pico.quantized(attached("llama"), b)) - reference).norm()
        / reference.norm()
        for b in (8, 4)
    )
    assert eight < 0.02 < four < 0.3


# -- make_cache


def test_an_unattached_model_is_refused():
    with pytest.raises(LowkeyError, match="attach"):
        lowkey.make_cache(pico.build("llama"))


@pytest.mark.parametrize("bits", [0, 1, 3, 16, "int3"])
def test_other_bits_are_refused(bits):
    with pytest.raises(LowkeyError, match="bits"):
        lowkey.make_cache(attached("llama"), bits=bits)


def test_sliding_layers_keep_stock_storage():
    model = attached("gemma2")
    kinds = [type(layer).__name__ for layer in full(model).layers]
    assert kinds == ["StockSlidingLayer", "CodedLayer", "CodedLayer"]
    assert families.geometry(model).compressible == (1, 2)
