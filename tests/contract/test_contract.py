"""Every cache layer: exact at full rank, its definition at low rank, whatever the chunks and the padding."""

from __future__ import annotations

import itertools

import dense
import pico
import pytest
import torch
from pico import attached, feed, generate, lowrank, prompt, real, stock
from storage_kinds import PADS, close, full, merged

import lowkey
from lowkey.backends import naive
from lowkey.backends.segment import Segment
from lowkey.cache.cache import cache_of
from lowkey.core.types import LAYOUTS
from lowkey.models import families
from lowkey.models.attention_interface import Call
from lowkey.ops.quantize import dequantize, quantize
from lowkey.storage.codec import LowRank, Plain
from lowkey.storage.coded import CodedLayer
from lowkey.storage.exact import Exact
from lowkey.storage.packing import PerToken

SPLITS = {"by-one": [1] * 24, "twos": [2] * 12, "uneven": [5, 1, 11, 7], "long-then-one": [23, 1]}


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


def test_exact_prefill_switched_on_equals_the_setting(layout):
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
def test_a_quantised_chunk_attends_to_itself_exactly(chunk):
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
