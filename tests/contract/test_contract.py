"""What every cache layer promises, over families, layouts and settings."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import dense
import pico
import pytest
import torch
from pico import attached, feed, generate, lowrank, prompt, real, stock

import lowkey
from lowkey.backends import naive
from lowkey.backends.segment import Segment
from lowkey.cache.cache import cache_of
from lowkey.core.types import LAYOUTS, LowkeyError
from lowkey.models import families
from lowkey.models.attention_interface import Call
from lowkey.ops.quantize import dequantize, quantize
from lowkey.storage.codec import LowRank, Plain
from lowkey.storage.coded import CodedLayer, Exact
from lowkey.storage.packing import PerToken

PADS = [7, 0]
EXACTS = {
    "plain": Exact(),
    "sinks": Exact(sinks=3),
    "recent": Exact(recent=5),
    "both": Exact(sinks=4, recent=6),
    "prefill-exact": Exact(sinks=4, recent=6, prefill="exact"),
}
SPLITS = {"by-one": [1] * 24, "twos": [2] * 12, "uneven": [5, 1, 11, 7], "long-then-one": [23, 1]}


@dataclass(frozen=True)
class Kind:
    """A lossy cache; calling it builds one. tolerance: integers may round the other way after a sum in
    another order.
    """

    build: Callable
    tolerance: float = 1e-5

    def __call__(self, model):
        return self.build(model)


def merged(model, rank_k, rank_v):
    """Every two heads share a latent of keys, all of them one of values (grouped in some order and centred)."""
    h = families.geometry(model).kv_heads
    return {
        i: pico.merged_factors(h, rank_k, rank_v, 2, h, seed=i) for i in families.geometry(model).compressible
    }


KINDS = {
    "post": Kind(lambda m: lowrank(m, pico.layer_factors(m, 6, 9), "post_rope")),
    "pre": Kind(lambda m: lowrank(m, pico.layer_factors(m, 6, 9, shared=True), "pre_rope")),
    "post-exact": Kind(
        lambda m: lowrank(m, pico.layer_factors(m, 6, 9, shared=True), "post_rope", Exact(3, 5))
    ),
    "pre-exact": Kind(lambda m: lowrank(m, pico.layer_factors(m, 6, 9), "pre_rope", Exact(3, 5))),
    "merged": Kind(lambda m: lowrank(m, merged(m, 6, 9), "post_rope", Exact(3, 5))),
    "merged-pre": Kind(lambda m: lowrank(m, merged(m, 6, 9), "pre_rope")),
    "8-bit": Kind(lambda m: pico.quantized(m, 8), 1e-3),
    "4-bit": Kind(lambda m: pico.quantized(m, 4), 1e-2),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(params=EXACTS)
def exact(request):
    return EXACTS[request.param]


def full(model, layout="post_rope", exact=None):
    return lowrank(model, pico.layer_factors(model), layout, exact)


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


# -- full rank is the stock model


@pytest.mark.parametrize("name", pico.NAMES)
def test_full_rank_gives_stock_logits_of_padded_rows(name, layout, exact):
    ids = prompt()
    ours = feed(attached(name), ids, full(attached(name), layout, exact), PADS)
    close(real(ours, PADS), real(feed(stock(name), ids, pads=PADS), PADS))


@pytest.mark.parametrize(("name", "layout"), list(zip(pico.NAMES, itertools.cycle(LAYOUTS))))
def test_full_rank_decodes_the_stock_tokens(name, layout):
    ids = prompt(20)
    ours = generate(attached(name), ids, 64, full(attached(name), layout, Exact(3, 6)), PADS)
    assert torch.equal(ours, generate(stock(name), ids, 64, pads=PADS))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text"])
def test_counted_stock_storage_decodes_the_stock_tokens(name):
    ids = prompt(20)
    cache = lowkey.make_cache(attached(name))
    assert torch.equal(
        generate(attached(name), ids, 16, cache, PADS), generate(stock(name), ids, 16, pads=PADS)
    )
    assert cache.nbytes() == cache.predicted_nbytes()


def test_full_rank_beam_search_gives_the_stock_beams(layout):
    ids, model = prompt(20), attached("llama")
    ours = generate(model, ids, 12, full(model, layout, Exact(3, 5)), PADS, num_beams=3)
    assert torch.equal(ours, generate(stock("llama"), ids, 12, pads=PADS, num_beams=3))
    assert not torch.equal(ours, generate(stock("llama"), ids, 12, pads=PADS)), (
        "beams equal greedy: this would test nothing"
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text"])
def test_a_second_turn_at_full_rank_is_a_fresh_full_forward(name, layout, exact):
    first, second, model = prompt(30), prompt(17, seed=1), attached(name)
    cache = full(model, layout, exact)
    feed(model, first, cache, PADS)
    ours = feed(model, second, cache, PADS, [4, 1, 1, 11])
    close(ours, feed(stock(name), torch.cat([first, second], 1), pads=PADS)[:, 30:])


def test_generate_continues_a_cache_that_holds_an_earlier_turn():
    ids, model = prompt(30, batch=1), attached("llama")
    cache = full(model, exact=Exact(2, 4))
    feed(model, ids[:, :20], cache)
    assert torch.equal(generate(model, ids, 10, cache), generate(stock("llama"), ids, 10))


# -- low rank is its definition


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize("splits", [[26], [12] + [1] * 14], ids=str)
@pytest.mark.parametrize("absorb", [None, True, False])
def test_merged_heads_are_the_dense_definition(name, layout, splits, absorb):
    model, setting, ids = attached(name), Exact(3, 5), prompt(26)
    maps = merged(model, 6, 9)
    expected = dense.logits(pico.build(name), ids, maps, layout, setting, pads=PADS, splits=splits)
    cache = cache_of(
        model, lambda i: CodedLayer(LowRank(maps[i], layout, families.rope(model, i), absorb), setting)
    )
    close(real(feed(model, ids, cache, PADS, splits), PADS), real(expected, PADS))
    assert cache.nbytes() == cache.predicted_nbytes()


def test_merged_heads_at_full_rank_give_stock_logits(layout):
    model, ids = attached("llama"), prompt()
    ours = feed(model, ids, lowrank(model, merged(model, pico.HEAD_DIM, pico.HEAD_DIM), layout), PADS)
    close(real(ours, PADS), real(feed(stock("llama"), ids, pads=PADS), PADS))


def test_merged_heads_hold_as_much_as_heads_by_themselves():
    model, ids = attached("llama"), prompt(30)
    sizes = []
    for maps in (merged(model, 6, 9), pico.layer_factors(model, 6, 9)):
        cache = lowrank(model, maps)
        feed(model, ids, cache, splits=[20, 1, 9])
        sizes.append(cache.nbytes())
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", pico.NAMES)
def test_low_rank_is_the_dense_definition(name, layout):
    model, setting = attached(name), Exact(3, 5)
    maps, ids = pico.layer_factors(model, 6, 9), prompt(26)
    expected = dense.logits(pico.build(name), ids, maps, layout, setting, pads=PADS)
    close(real(feed(model, ids, lowrank(model, maps, layout, setting), PADS), PADS), real(expected, PADS))


@pytest.mark.parametrize("splits", [[26], [10, 16], [12] + [1] * 14], ids=str)
def test_every_exact_setting_is_the_dense_definition(layout, exact, splits):
    model = attached("llama")
    maps, ids = pico.layer_factors(model, 5, 8, shared=True), prompt(26)
    expected = dense.logits(pico.build("llama"), ids, maps, layout, exact, pads=PADS, splits=splits)
    ours = feed(model, ids, lowrank(model, maps, layout, exact), PADS, splits)
    close(real(ours, PADS), real(expected, PADS))


def test_up_maps_need_not_be_the_transposed_down_maps(layout):
    model, ids = attached("llama"), prompt(26)
    maps = {
        i: lowkey.core.types.Factors(
            *(x + 0.1 * torch.randn_like(x) for x in vars(f).values() if x is not None)
        )
        for i, f in pico.layer_factors(model, 6, 9).items()
    }
    expected = dense.logits(pico.build("llama"), ids, maps, layout, Exact(2, 3), pads=PADS)
    close(real(feed(model, ids, lowrank(model, maps, layout, Exact(2, 3)), PADS), PADS), real(expected, PADS))


def test_low_rank_differs_from_stock(kind):
    """Guards the tests above and below: the lossy kinds are really lossy."""
    ids = prompt()
    assert (
        feed(attached("llama"), ids, kind(attached("llama"))) - feed(stock("llama"), ids)
    ).abs().max() > 1e-3


# -- how tokens arrive does not matter


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text"])
def test_chunks_give_the_logits_of_one_shot(name, kind, splits):
    model, ids = attached(name), prompt(24)
    close(feed(model, ids, kind(model), splits=splits), feed(model, ids, kind(model)), kind.tolerance)


@pytest.mark.parametrize(
    "splits", [[10, 14], [4, 4, 16], [1] * 24], ids=["one-chunk", "chunk-in-the-padding", "by-one"]
)
def test_chunks_of_padded_rows_give_the_logits_of_one_shot(kind, splits):
    model, ids = attached("llama"), prompt(24)
    close(
        real(feed(model, ids, kind(model), PADS, splits), PADS),
        real(feed(model, ids, kind(model), PADS), PADS),
        kind.tolerance,
    )


@pytest.mark.parametrize("size", [4, 9])
def test_generate_in_prefill_chunks_gives_the_same_tokens(kind, size):
    model, ids = attached("llama"), prompt(24)
    ours = generate(model, ids, 8, kind(model), PADS, prefill_chunk_size=size)
    assert torch.equal(ours, generate(model, ids, 8, kind(model), PADS))


def test_decoding_is_one_forward_of_the_decoded_text(kind):
    model, ids = attached("qwen3"), prompt(20)
    new = generate(model, ids, 12, kind(model))
    whole = feed(model, torch.cat([ids, new], 1), kind(model))
    assert torch.equal(whole[:, 19:-1].argmax(-1), new)


# -- exact prefill: what arrives together sees itself as it came


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text"])
def test_exact_prefill_gives_stock_logits(name, kind):
    model, ids = attached(name), prompt(24)
    cache = kind(model)
    cache.exact_prefill(True)
    close(real(feed(model, ids, cache, PADS), PADS), real(feed(stock(name), ids, pads=PADS), PADS))


def test_exact_prefill_stores_what_compressed_prefill_stores(kind):
    """In the first layer, whose inputs are the same: the prompt is compressed all the same."""
    model, held = attached("llama"), []
    for on in (True, False):
        cache = kind(model)
        cache.exact_prefill(on)
        feed(model, prompt(24), cache, PADS)
        held.append(cache.layers[0].tensors())
    assert all(torch.equal(held[0][n], held[1][n]) for n in held[0])


def test_the_switch_is_the_setting(layout):
    model, ids = attached("llama"), prompt(24)
    maps, splits = pico.layer_factors(model, 6, 9), [10, 12, 1, 1]
    switched = lowrank(model, maps, layout, Exact(3, 5))
    switched.exact_prefill(True)
    close(
        feed(model, ids, switched, PADS, splits),
        feed(model, ids, lowrank(model, maps, layout, Exact(3, 5, "exact")), PADS, splits),
        0,
    )


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_quantised_chunk_sees_itself_exactly_and_the_past_as_stored(chunk):
    """By the loops of `naive`: a single token is no chunk."""
    query, keys, values = torch.randn(3, 2, 4, 8 + chunk, 16, generator=torch.Generator().manual_seed(0))
    layer = CodedLayer(Plain(), None, (PerToken(4), PerToken(4)))
    layer.exact_prefill = True
    for q, k, v in zip(*(x.split([8, chunk], 2) for x in (query, keys, values)), strict=True):
        layer.update(k, v)
        out = layer.attend(k, v, Call(q.unsqueeze(2), None, None, 0.3, None))
    stored_k, stored_v = (dequantize(quantize(y, 4, 16)) for y in (keys, values))
    if chunk > 1:
        stored_k[:, :, 8:], stored_v[:, :, 8:] = keys[:, :, 8:], values[:, :, 8:]
    mask = torch.ones(1, chunk, 8 + chunk, dtype=torch.bool).tril(8)
    assert torch.allclose(
        out, naive.attend([Segment(q.unsqueeze(2), stored_k, stored_v, mask)], 0.3), atol=1e-5
    )


# -- rows do not see each other


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "olmo2"])
def test_a_padded_row_is_the_row_alone(name, kind):
    model, ids = attached(name), prompt(30)
    both = feed(model, ids, kind(model), PADS, [28, 1, 1])
    for row, pad in enumerate(PADS):
        alone = ids[row : row + 1, pad:]
        close(both[row, pad:], feed(model, alone, kind(model), splits=[28 - pad, 1, 1])[0], kind.tolerance)


@pytest.mark.parametrize("recent", [0, 2])
def test_a_row_shorter_than_the_sinks_grows_into_them(layout, recent):
    """The first row begins with two real tokens: its other sink slots stand empty until their tokens come."""
    model, ids, setting, splits = attached("llama"), prompt(14), Exact(sinks=6, recent=recent), [9, 1, 1, 3]
    maps = pico.layer_factors(model, 6, 9)
    expected = dense.logits(pico.build("llama"), ids, maps, layout, setting, pads=PADS, splits=splits)
    close(
        real(feed(model, ids, lowrank(model, maps, layout, setting), PADS, splits), PADS),
        real(expected, PADS),
    )


def test_reordering_moves_everything_a_row_holds(kind):
    model, ids = attached("llama"), prompt(20)
    cache = kind(model)
    feed(model, ids, cache, PADS)
    cache.reorder_cache(torch.tensor([1, 0]))
    more = prompt(6, seed=1)
    straight = kind(model)
    feed(model, ids, straight, PADS)
    close(
        feed(model, more, cache, PADS[::-1]),
        feed(model, more.flip(0), straight, PADS).flip(0),
        kind.tolerance,
    )


def test_selecting_and_repeating_rows(kind):
    model, ids, more = attached("llama"), prompt(20), prompt(6, batch=1, seed=1)
    cache, alone = kind(model), kind(model)
    feed(model, ids, cache, PADS)
    feed(model, ids[:1, 7:], alone)
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    out, expected = feed(model, more.expand(2, -1), cache, [7, 7]), feed(model, more, alone)
    close(out, expected.expand(2, -1, -1), kind.tolerance)


def test_two_live_caches_do_not_disturb_each_other(kind):
    model, first, second = attached("llama"), prompt(20), prompt(20, seed=1)
    a, b = kind(model), kind(model)
    mixed = [
        (feed(model, x, a), feed(model, y, b))
        for x, y in zip(first.split(4, 1), second.split(4, 1), strict=True)
    ]
    close(torch.cat([x for x, _ in mixed], 1), feed(model, first, kind(model), splits=[4] * 5), 0)
    close(torch.cat([y for _, y in mixed], 1), feed(model, second, kind(model), splits=[4] * 5), 0)


def test_the_same_run_twice_is_the_same_bit_for_bit(kind):
    model, ids = attached("llama"), prompt(20)
    runs = [feed(model, ids, kind(model), PADS, [10, 1, 9]) for _ in range(2)]
    assert torch.equal(*runs)


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


def test_crop_is_refused(kind):
    cache = kind(attached("llama"))
    feed(attached("llama"), prompt(20), cache)
    with pytest.raises(LowkeyError, match="crop"):
        cache.crop(-2)


def test_prompt_lookup_decoding_is_refused(kind):
    model = attached("llama")
    ids = prompt(10, batch=1).repeat(1, 3)
    with pytest.raises(LowkeyError, match="crop"):
        generate(model, ids, 8, kind(model), prompt_lookup_num_tokens=3)


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
