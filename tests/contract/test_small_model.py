"""Caches beside a small model that reads along: bytes, failures, copies and refusals."""

from __future__ import annotations

import gc
import re

import pico
import pytest
import reach
import torch
from pico import attached, prompt, stock
from small_pairs import guided, read, small

import lowkey
from lowkey.core.types import LowkeyError
from lowkey.policies import POLICIES, SnapKV
from lowkey.storage.exact import Exact

EVERY = pytest.mark.parametrize("name", pico.SMALL)


def agree(cache):
    """Bytes held, checked against the formula and against what the cache keeps alive."""
    held = reach.held(cache)
    assert held == cache.nbytes() == cache.predicted_nbytes()
    assert 0 <= cache.small_nbytes() <= held
    return held


@EVERY
def test_a_full_budget_is_the_full_cache(name):
    ids = prompt(40)
    logits = read(guided(name, "100%", every=3), ids, [25, *[1] * 15])
    torch.testing.assert_close(logits, stock("llama")(ids).logits, rtol=1e-4, atol=1e-5)


@EVERY
@pytest.mark.parametrize("options", [{}, {"every": 3}, {"window": 4, "kernel": 3}, {"allocator": "global"}])
def test_bytes_held_are_those_reported_and_predicted(name, options):
    ids, cache = prompt(70), guided(name, "30%", **options)
    assert agree(cache) == 0
    for piece in ids.split([40, 1, 1, 1, 1, 20, 1, 1, 1, 3], 1):
        read(cache, piece, piece.shape[1])
        agree(cache)
    of_small = cache.small_nbytes()
    heads, width = 2, pico.HEAD_DIM
    assert of_small >= 2 * 2 * 2 * heads * 70 * width * 4
    cache.reset()
    assert agree(cache) == 0
    again, fresh = read(cache, ids, 70), read(guided(name, "30%", **options), ids, 70)
    assert torch.equal(again, fresh)


@EVERY
@pytest.mark.parametrize("budget", ["30%", "24 tokens"])
def test_what_matching_needs_is_given_up_behind_it(name, budget):
    cache = guided(name, budget, matched_queries=16)
    read(cache, prompt(30, 1), 30)
    assert all(layer.queries.shape[3] == 1 and not layer.top.numel() for layer in cache.small.layers)


@EVERY
def test_a_budget_of_bytes_holds_the_small_models_cache_too(name):
    ids, most = prompt(80, 1), guided(name, "99%")
    read(most, ids, 80)
    bytes_allowed = most.nbytes() - 9000
    cache = guided(name, f"{bytes_allowed} B")
    read(cache, ids, 80)
    assert bytes_allowed - 2500 < agree(cache) <= bytes_allowed
    with pytest.raises(LowkeyError, match=r"budget .*: 80 tokens in one row take .*; give that"):
        read(guided(name, "4 KiB"), ids, 80)


@EVERY
def test_a_failed_call_changes_neither_model(name):
    ids, options = prompt(60, 1), {"every": 2}
    cache, other = guided(name, "40%", **options), guided(name, "40%", **options)
    read(cache, ids[:, :40], 40)
    before = agree(cache)
    for size in (1, 7):
        with pytest.raises(ValueError, match="boom"), cache.reading(ids[:, 40 : 40 + size]):
            raise ValueError("boom")
        assert (cache.get_seq_length(), cache.small.get_seq_length()) == (40, 40)
        assert agree(cache) == before
    with pytest.raises(LowkeyError), cache.reading(ids[:, 40:47]):
        attached("llama")(ids[:, 40:47].repeat(2, 1), past_key_values=cache)
    assert agree(cache) == before
    last = read(cache, ids[:, 40:], [1] * 20)
    assert torch.equal(last, read(other, ids, [40, *[1] * 20])[:, 40:])


@EVERY
def test_a_question_that_is_forgotten_is_forgotten_by_both(name):
    ids, model, cache = prompt(60, 1), attached("llama"), guided(name, "50%", window=6)
    lowkey.prefill(model, pico.tokenizer(), cache, ids, question=6)
    agree(cache)
    assert cache.small.get_seq_length() == cache.get_seq_length() == 54
    asked = read(cache, ids[:, 54:], 6)
    agree(cache)
    other = guided(name, "50%", window=6)
    lowkey.prefill(model, pico.tokenizer(), other, ids, question=6)
    assert torch.equal(asked, read(other, ids[:, 54:], 6))


@EVERY
def test_sequences_are_copied_and_chosen_in_both(name):
    ids, options = prompt(60), {"every": 2}
    cache = guided(name, "40%", **options)
    read(cache, ids[:, :40], 40)
    alone = [read(guided(name, "40%", **options), row, [40, *[1] * 20])[:, 40:] for row in ids.split(1)]
    twin = cache.branch([1, 0, 1])
    agree(twin)
    rest = ids[[1, 0, 1], 40:]
    torch.testing.assert_close(read(twin, rest, [1] * 20), torch.cat([alone[i] for i in (1, 0, 1)]))
    agree(cache)
    cache.batch_select_indices(torch.tensor([1]))
    cache.expand(2)
    cache.reorder_cache(torch.tensor([1, 0]))
    agree(cache)
    torch.testing.assert_close(read(cache, rest[[0, 0]], [1] * 20), torch.cat([alone[1]] * 2))


def test_steps_after_the_only_eviction_need_no_small_model():
    """Without `every` and frozen, `generate` goes on alone."""
    ids, model, cache = prompt(60, 1), attached("llama"), guided(budget="40%")
    lowkey.prefill(model, pico.tokenizer(), cache, ids[:, :50], question=4)
    model(ids[:, 46:], past_key_values=cache)
    assert (cache.get_seq_length(), cache.small.get_seq_length()) == (60, 46)
    with cache.reading(ids[:, :1]):
        assert cache.small.get_seq_length() == 46


@pytest.mark.parametrize("bits", [8, "kivi4"])
def test_it_goes_over_ranks_and_integers(bits):
    model, policy = attached("llama"), POLICIES["smallkv-tokens"]("40%", every=4)
    plan = pico.plan(model, 8, 10)
    for options in ({"plan": plan, "bits": bits}, {"bits": bits}, {"plan": plan}):
        cache = lowkey.make_cache(model, policy=policy, small=small(), exact=Exact(2, 6), **options)
        read(cache, prompt(60, 1), [40, *[1] * 20])
        agree(cache)


def test_a_model_with_sliding_layers_may_be_either():
    for model, beside in (("gemma2", "llama"), ("llama", "gemma2")):
        cache = guided(budget="40%", every=3, model=attached(model), beside=attached(beside))
        read(cache, prompt(60, 1), [40, *[1] * 20], attached(model))
        agree(cache)


# -- refusals


def refused(act, says):
    with pytest.raises(LowkeyError, match=re.escape(says)) as error:
        act()
    assert "\n" not in str(error.value)


@EVERY
def test_what_does_not_go_together_is_refused(name):
    model, policy = attached("llama"), POLICIES[name]("40%")
    refused(lambda: lowkey.make_cache(model, policy=policy), "needs a small model of the same tokenizer")
    refused(
        lambda: lowkey.make_cache(model, policy=SnapKV("40%"), small=small()), "no policy lets it read along"
    )
    refused(lambda: lowkey.make_cache(model, small=small()), "no policy lets it read along")
    refused(lambda: lowkey.make_cache(model, policy=policy, small=stock("llama")), "is not attached")
    other = lowkey.attach(pico.build("llama", vocab_size=90))
    refused(lambda: lowkey.make_cache(model, policy=policy, small=other), "so their tokenizers differ")


@EVERY
def test_tokens_that_only_one_has_read_are_refused(name):
    ids, model = prompt(40, 1), attached("llama")
    cache = guided(name, "40%")
    refused(lambda: model(ids, past_key_values=cache), "the small model has read 0 tokens and the model 40")
    assert cache.get_seq_length() == agree(cache) == 0
    read(cache, ids, 40)
    small()(ids[:, :1], past_key_values=cache.small)
    refused(lambda: read(cache, ids[:, :1], 1), "has read 41 tokens, and the model 40")


@EVERY
def test_padding_saving_and_long_texts_are_refused(name, tmp_path):
    ids, model = prompt(40), attached("llama")
    cache, mask = guided(name, "40%"), torch.ones_like(ids)
    mask[0, :3] = 0
    refused(
        lambda: lowkey.prefill(model, pico.tokenizer(), cache, ids, attention_mask=mask), "without padding"
    )
    read(cache, ids, 40)
    refused(lambda: cache.save(tmp_path / "c"), "a small model reads along")
    short = lowkey.attach(pico.build("llama", max_position_embeddings=32))
    refused(lambda: read(guided(name, "40%", beside=short), ids, 40), "exceed the 32 positions of the small")


def test_a_small_model_that_is_gone_is_missed():
    beside = lowkey.attach(pico.build("llama", num_hidden_layers=1))
    cache = guided(budget="40%", beside=beside)
    del beside
    gc.collect()
    refused(lambda: read(cache, prompt(40, 1), 40), "the small model is gone")
