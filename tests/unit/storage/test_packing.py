"""Packed storage: every scheme on every form of keys and values against matrices rounded by hand."""

from __future__ import annotations

import math

import pytest
import torch
from packing_by_hand import (
    BLOCK,
    HEADS,
    LENGTH,
    PADS,
    D,
    close,
    effective,
    group_size,
    oracle,
    packed,
    plan,
    tolerance,
)
from pico import attached, feed, prompt, real, stock

import lowkey
from lowkey import Exact
from lowkey.storage.packing import SCHEMES, Unpacked, scheme

# -- the oracle: whole matrices, loops


@pytest.mark.defines(
    "packings", "int8", "int4", "int2", "kivi8", "kivi4", "kivi2", "hadamard8", "hadamard4", "hadamard2"
)
@pytest.mark.parametrize("pads", [[0], PADS], ids=str)
def test_packed_storage_is_the_dense_definition(name, form, pads):
    model, ids = attached("llama"), prompt(LENGTH, batch=len(pads))
    expected = oracle(ids, name, form, effective(name, None), pads, [LENGTH])
    close(
        real(feed(model, ids, packed(model, name, form), pads), pads), real(expected, pads), tolerance(name)
    )


EXACTS = {"sinks": Exact(sinks=3), "both": Exact(3, 7), "prefill-exact": Exact(3, 7, "exact")}
SPLITS = [[LENGTH], [30, 20, 50], [45, 40] + [1] * 15]


@pytest.mark.parametrize("splits", SPLITS, ids=["one-shot", "chunks", "decoding"])
@pytest.mark.parametrize("exact", EXACTS.values(), ids=EXACTS)
@pytest.mark.parametrize(
    ("name", "form"), [("int4", "plain"), ("kivi4", "plain"), ("kivi4", "merged-pre"), ("hadamard4", "post")]
)
def test_packing_with_exact_tokens_is_the_dense_definition(name, form, exact, splits):
    model, ids = attached("llama"), prompt(LENGTH)
    expected = oracle(ids, name, form, exact, PADS, splits)
    close(
        real(feed(model, ids, packed(model, name, form, exact), PADS, splits), PADS),
        real(expected, PADS),
        tolerance(name),
    )


def test_every_scheme_differs_from_stock_beyond_the_tolerance(name, form):
    """Guards the tests above and below."""
    ids = prompt(LENGTH)
    error = feed(attached("llama"), ids, packed(attached("llama"), name, form)) - feed(stock("llama"), ids)
    assert error.abs().mean() > tolerance(name) / 20


# -- bytes


def hand_bytes(name, side, heads, width, tokens, itemsize=4):
    """Of `tokens` stored tokens of `heads` latents of `width` numbers."""
    bits = int(name[-1])
    if side == "keys" and name.startswith("kivi"):
        return heads * width * (tokens // BLOCK) * (BLOCK * bits // 8 + 2 * itemsize)
    size = group_size(width, bits)
    return heads * tokens * math.ceil(width / 32) * (size * bits // 8 + 2 * itemsize)


SHAPES = {  # (heads, width) of keys and of values
    "plain": ((4, 16), (4, 16)),
    "post": ((4, 10), (4, 5)),
    "pre": ((4, 5), (4, 10)),
    "merged": ((2, 10), (1, 36)),
    "merged-pre": ((1, 20), (2, 18)),
}


@pytest.mark.parametrize("pads", [[0, 0], PADS], ids=str)
@pytest.mark.parametrize("exact", [None, Exact(3, 7)], ids=["default", "both"])
def test_held_bytes_are_the_predicted_bytes_and_those_by_hand(name, form, exact, pads):
    model, ids, seen = attached("llama"), prompt(LENGTH), 0
    cache = lowkey.make_cache(model, plan(model, form), bits=name, exact=exact)
    setting = Exact(4, 32) if exact is None and form == "plain" else effective(name, exact)
    for size in [2, 40, 1, 1, 56]:
        seen += size
        feed(model, ids[:, seen - size : seen], cache, pads)
        for layer in cache.layers:
            layer.make_compact()  # no room for further steps
        stored = max(0, seen - setting.recent)
        # the last row to have a block ready decides; one that has not begun may be the last
        if name.startswith("kivi"):
            stored = min(
                max(0, seen - (p % BLOCK if p < seen else BLOCK - 1) - setting.recent) // BLOCK * BLOCK
                for p in pads
            )
        row = sum(
            hand_bytes(name, side, *SHAPES[form][i], stored) for i, side in enumerate(("keys", "values"))
        )
        row += HEADS * (seen - stored + setting.sinks) * 2 * D * 4 + setting.sinks * 4
        # where a row begins, its position, and where counting ends
        row += 8 * (3 if setting.recent or name.startswith("kivi") else 2)
        assert cache.nbytes() == cache.predicted_nbytes() == 3 * 2 * row


def test_kivi_bytes_in_numbers():
    """One row of 100 tokens, 36 exact and 4 sinks: 4 heads of 16 key channels in 2 blocks of 16 + 8 bytes, 64
    tokens of 8 + 8; 3 places and those of the sinks."""
    cache = lowkey.make_cache(attached("llama"), bits="kivi4")
    feed(attached("llama"), prompt(100, batch=1), cache)
    assert cache.nbytes() == 3 * (
        4 * 16 * 2 * (16 + 8) + 4 * 64 * (8 + 8) + 4 * (36 + 4) * 2 * 16 * 4 + 24 + 4 * 4
    )


@pytest.mark.parametrize("width", [1, 5, 10, 16, 32, 33, 48, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_packed_takes_the_bytes_it_says(width, dtype):
    for name in SCHEMES:
        for packing in (scheme(name).keys, scheme(name).values, Unpacked()):
            held = packing.pack(torch.randn(2, 3, 64, width).to(dtype))
            assert sum(t.nbytes for t in held) == 2 * 3 * packing.nbytes(64, width, dtype.itemsize)
