"""What a compressed cache drafts and the full cache verifies is what the full cache decodes."""

from __future__ import annotations

import pico
import pytest
import torch
from branching import filled
from cache_kinds import CASES, KINDS, agree
from pico import attached, feed, generate, prompt, stock

import lowkey
from lowkey import LowkeyError

FEW = ["stock", "bits-kivi4", "plan-exact", "exact-prefill", "snapkv", "kvzip", "every-global", "dynamic"]
QUICK = [
    pytest.param(*case, marks=[] if case[0] in FEW and case[1] == "llama" else pytest.mark.slow)
    for case in CASES
]


def verified(kind, name, ids, tokens, draft):
    cache = KINDS[kind](attached(name))
    found = lowkey.generate_verified(attached(name), pico.tokenizer(), cache, ids, tokens, draft)
    agree(cache, "after verified decoding")
    return found, cache


def by_hand(kind, name, ids, tokens, wanted, draft):
    """How many guesses each verification accepts: each time a cache of its own reads what is right so far."""
    accepted, done, model = [], 1, attached(name)
    while done < tokens:
        cache, guesses, count = filled(kind, name, ids), [], min(draft, tokens - done - 1)
        read = wanted[:done]
        for _ in range(count):
            for token in read:
                logits = feed(model, torch.tensor([[token]]), cache)
            guesses.append(int(logits[0, -1].argmax()))
            read = guesses[-1:]
        right = 0
        while right < count and guesses[right] == wanted[done + right]:
            right += 1
        accepted.append(right)
        done += right + 1
    return tuple(accepted)


@pytest.mark.parametrize(("kind", "name"), QUICK)
def test_the_full_cache_decodes_the_same(kind, name):
    ids, tokens = prompt(30, batch=1), 24
    wanted = generate(stock(name), ids, tokens)[0].tolist()
    for draft in (1, 4):
        found, cache = verified(kind, name, ids, tokens, draft)
        assert found.ids.tolist() == wanted
        assert found.accepted == by_hand(kind, name, ids, tokens, wanted, draft)
        assert cache.get_seq_length() <= 30 + tokens


@pytest.mark.parametrize("name", ["qwen2", "gemma3_text", "phi3"])
def test_other_models_decode_the_same(name):
    model, ids = attached(name), prompt(30, batch=1, seed=4)
    cache = lowkey.make_cache(model, bits=2)
    found = lowkey.generate_verified(model, pico.tokenizer(), cache, ids, 24, 3)
    assert torch.equal(found.ids, generate(stock(name), ids, 24)[0])
    assert 0 < found.accepted_per_verification < 3


def test_a_full_draft_is_accepted_whole():
    """The first token is the full cache's; then 4 guesses and one more at a time, as far as there is room."""
    for tokens, accepted, drafted in (
        (1, (), ()),
        (2, (0,), (0,)),
        (8, (4, 1), (4, 1)),
        (11, (4, 4), (4, 4)),
    ):
        found, _ = verified("stock", "llama", prompt(30, batch=1), tokens, 4)
        assert (len(found.ids), found.accepted, found.drafted) == (tokens, accepted, drafted)


def test_the_end_of_the_text_ends_it(monkeypatch):
    model, ids = attached("llama"), prompt(30, batch=1)
    wanted = generate(model, ids, 12)[0].tolist()
    monkeypatch.setattr(model.generation_config, "eos_token_id", wanted[6])
    found, _ = verified("bits-8", "llama", ids, 12, 4)
    assert found.ids.tolist() == wanted[: wanted.index(wanted[6]) + 1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ids": prompt(30)}, "give one row"),
        ({"tokens": 0}, "tokens 0: give 1 or more"),
        ({"draft": 0}, "draft 0: give 1 or more"),
        ({"draft": True}, "draft True: give 1 or more"),
        ({"tokens": 500}, "tokens 500: after a prompt of 30"),
    ],
)
def test_bad_input_is_refused_before_anything_is_read(change, says):
    model, cache = attached("llama"), KINDS["bits-8"](attached("llama"))
    with pytest.raises(LowkeyError, match=says):
        lowkey.generate_verified(
            model, pico.tokenizer(), cache, **{"ids": prompt(30, batch=1), "tokens": 4, **change}
        )
    assert cache.get_seq_length() == 0


def test_a_used_cache_is_refused():
    model, cache = attached("llama"), filled("bits-8", "llama", prompt(30, batch=1))
    with pytest.raises(LowkeyError, match="has seen 30 tokens"):
        lowkey.generate_verified(model, pico.tokenizer(), cache, prompt(30, batch=1), 4)
