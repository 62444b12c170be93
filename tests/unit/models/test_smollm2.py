"""The real model answers, and a cache that keeps everything changes nothing.

Needs `lowkey download smollm2`.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from lowkey.cache.cache import cache_of, make_cache
from lowkey.core.text import embedded_text, encode
from lowkey.core.types import Factors
from lowkey.models import families, packaged
from lowkey.policies import SnapKV
from lowkey.storage.codec import LowRank
from lowkey.storage.coded import CodedLayer
from lowkey.storage.exact import Exact

pytestmark = pytest.mark.real
LAYERS, HEADS, DIM = 30, 3, 64
TOKENS = 96


@pytest.fixture(scope="module")
def ids(smollm2):
    return encode(smollm2[1], embedded_text("evaluation"))[None, :TOKENS]


@torch.no_grad()
def logits(model, ids, past):
    return model(ids, past_key_values=past).logits.float()


def full_rank(model):
    """A cache of all directions of every head, turned at random."""

    def turned(i):
        down = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=torch.Generator().manual_seed(i))).Q.to(
            model.dtype
        )
        return Factors(down, down.mT, down, down.mT)

    return cache_of(model, lambda i: CodedLayer(LowRank(turned(i), "post_rope", families.rope(model, i))))


def test_the_real_model_answers_and_ends_its_turn(smollm2):
    model, tokenizer = smollm2
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    cache = make_cache(model)
    said = model.generate(**prompt, past_key_values=cache, max_new_tokens=20, do_sample=False)[
        0, prompt["input_ids"].shape[1] :
    ]
    assert tokenizer.decode(said, skip_special_tokens=True) == "The capital of France is Paris."
    assert tokenizer.decode(said[-1:]) == tokenizer.eos_token == "<|im_end|>"


def test_every_digit_is_a_token(smollm2):
    assert smollm2[1].tokenize("in  1999") == ["in", "ĠĠ", "1", "9", "9", "9"]


@pytest.mark.parametrize(
    "make", [make_cache, lambda m: make_cache(m, policy=SnapKV("100%"))], ids=["plain", "policy"]
)
def test_a_cache_that_keeps_everything_is_the_stock_cache(smollm2, ids, make):
    model, _ = smollm2
    assert torch.equal(logits(model, ids, make(model)), logits(model, ids, DynamicCache()))


def test_all_directions_of_every_head_are_the_stock_cache(smollm2, ids):
    """But for bfloat16, which rounds keys and values again when they are turned: KL of the next token, in
    nats.
    """
    model, _ = smollm2
    stock, ours = (logits(model, ids, past).log_softmax(-1) for past in (DynamicCache(), full_rank(model)))
    assert (stock.exp() * (stock - ours)).sum(-1).mean() < 0.004
    assert (stock.argmax(-1) == ours.argmax(-1)).float().mean() > 0.95


def test_bytes_by_hand_of_the_real_model(smollm2, ids):
    """By hand: 30 layers, keys and values, 3 heads of 64, two bytes each; at int8 a byte each, with two
    bfloat16 for every 32.
    """
    model, _ = smollm2
    plain, packed, cut = (
        make_cache(model),
        make_cache(model, bits=8, exact=Exact()),
        make_cache(model, policy=SnapKV("32 tokens")),
    )
    for cache in (plain, packed, cut):
        logits(model, ids, cache)
        assert cache.nbytes() == cache.predicted_nbytes()
    rows = LAYERS * 2 * HEADS * TOKENS
    assert plain.nbytes() == rows * DIM * 2
    assert rows * (DIM + 8) <= packed.nbytes() < 1.01 * rows * (DIM + 8)
    kept = [len(places) for layer in range(LAYERS) for places in cut.kept_positions(layer)]
    assert sum(kept) == LAYERS * HEADS * 32 and cut.nbytes() < plain.nbytes() / 2


def test_the_folder_of_the_real_model_names_its_source():
    place = packaged.folder("smollm2")
    assert (
        "Apache License" in (place / "LICENSE").read_text()
        and "Apache-2.0" in (place / "README.md").read_text()
    )
