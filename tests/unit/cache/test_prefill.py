"""`prefill`: rows of different length are as they are alone; what it cannot do is refused first."""

from __future__ import annotations

import io

import pico
import pytest
import torch
from pico import attached, padding, prompt
from transformers import DynamicCache

import lowkey
from lowkey.cache.cache import make_cache
from lowkey.core.types import LowkeyError
from lowkey.generate import stream_text
from lowkey.policies import POLICIES

PADS, LENGTH = [31, 0, 12], 60
CASES = [
    ("kvzip", 0),
    ("kvzip", 3),
    ("attention-matching", 0),
    ("attention-matching", 3),
    ("snapkv", 0),
    ("snapkv", 5),
    ("h2o", 5),
    ("expected-attention", 0),
    ("streamingllm", 4),
    ("razor-uniform", 0),
]


def policy(name, budget="35%", **options):
    if name == "razor-uniform":
        return POLICIES["razor"](budget, sinks=2, recent=3, allocator="uniform")
    pieces = {"chunk": 25, "bridge": 4} if name in ("kvzip", "attention-matching") else {}
    return POLICIES[name](budget, sinks=2, recent=3, **pieces, **options)


def filled(name, ids, question, mask=None):
    cache = make_cache(attached("llama"), policy=policy(name))
    lowkey.prefill(attached("llama"), pico.tokenizer(), cache, ids, question, mask)
    return cache


@pytest.mark.parametrize(("name", "question"), CASES)
def test_a_padded_row_is_as_it_is_alone(name, question):
    """Three rows, of which the pieces that KVzip repeats have other lengths and numbers (25 tokens each: 2,
    3, 2).
    """
    ids, more = prompt(LENGTH, 3), prompt(8, 3, seed=7)
    mask, _ = padding(PADS, LENGTH)
    together = filled(name, ids, question, mask)
    seen = LENGTH - question
    assert together.get_seq_length() == seen and together.nbytes() == together.predicted_nbytes()
    longer, positions = padding(PADS, seen + 8)
    with torch.no_grad():
        got = attached("llama")(
            more, attention_mask=longer, position_ids=positions[:, seen:], past_key_values=together
        ).logits
        for row, pad in enumerate(PADS):
            alone = filled(name, ids[row : row + 1, pad:], question)
            want = attached("llama")(more[row : row + 1], past_key_values=alone).logits
            assert (got[row] - want[0]).abs().max() < 1e-4
            for i in range(3):
                pairs = zip(together.kept_positions(i, row), alone.kept_positions(i), strict=True)
                assert all(p.tolist() == q.tolist() for p, q in pairs)


@pytest.mark.parametrize("name", ["kvzip", "snapkv"])
def test_no_slot_goes_to_padding(name):
    cache = filled(name, prompt(LENGTH, 3), 0, padding(PADS, LENGTH)[0])
    kept = [sum(len(p) for i in range(3) for p in cache.kept_positions(i, row)) for row in range(3)]
    assert kept == [round(0.35 * (LENGTH - p) * 12) for p in PADS]


def test_generation_goes_on_after_a_padded_prefill():
    """The question is left to `generate`, under the mask of the whole prompt."""
    ids, (mask, _) = prompt(LENGTH, 3), padding(PADS, LENGTH)
    cache = filled("kvzip", ids, 1, mask)
    out = attached("llama").generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6, do_sample=False
    )[:, LENGTH:]
    for row, pad in enumerate(PADS):
        own = ids[row : row + 1, pad:]
        alone = attached("llama").generate(
            own, past_key_values=filled("kvzip", own, 1), max_new_tokens=6, do_sample=False
        )
        assert torch.equal(alone[0, own.shape[1] :], out[row])


MASK = padding([4, 0], 10)[0]
REFUSED = {
    "question -1": {"question": -1},
    "question 10: row 0 has 10 tokens": {"question": 10},
    "question 11": {"question": 11},
    r"question 2\.5": {"question": 2.5},
    "question 6: row 0 has 6 tokens": {"question": 6, "attention_mask": MASK},
    r"ids of shape \(2, 0\)": {"ids": prompt(10)[:, :0]},
    r"ids of shape \(0, 10\)": {"ids": prompt(10)[:0]},
    r"ids of shape \(10,\)": {"ids": prompt(10)[0]},
    "dtype torch.float32": {"ids": prompt(10).float()},
    r"attention_mask of shape \(2, 9\)": {"attention_mask": MASK[:, 1:]},
    r"attention_mask of shape \(2, 10\)": {"attention_mask": MASK * 2},
    "padding behind tokens": {"attention_mask": MASK.flip(1)},
    "ids of type list": {"ids": [[1, 2], [3, 4]]},
    "the id 97": {"ids": torch.full((2, 10), 97)},
    "-1 is no token": {"ids": torch.full((2, 10), -1)},
    "row 1 has no token": {"attention_mask": MASK * torch.tensor([[1], [0]])},
}


@pytest.mark.parametrize("name", ["kvzip", "snapkv"])
@pytest.mark.parametrize("says", REFUSED)
def test_what_cannot_be_is_refused_before_anything_changes(name, says):
    model, cache = attached("llama"), make_cache(attached("llama"), policy=policy(name))
    with pytest.raises(LowkeyError, match=says):
        lowkey.prefill(model, pico.tokenizer(), cache, **{"ids": prompt(10), **REFUSED[says]})
    assert cache.get_seq_length() == cache.nbytes() == 0
    assert not any(layer.score_only_tokens or layer.frozen for layer in cache.evicting)
    lowkey.prefill(model, pico.tokenizer(), cache, prompt(10), 2, MASK)


@pytest.mark.parametrize("name", ["kvzip", "snapkv"])
def test_a_used_cache_is_refused_and_left_as_it_was(name):
    cache = filled(name, prompt(20), 0)
    before = cache.nbytes(), [p.tolist() for p in cache.kept_positions(1)]
    with pytest.raises(LowkeyError, match="has seen 20 tokens"):
        lowkey.prefill(attached("llama"), pico.tokenizer(), cache, prompt(10))
    assert before == (cache.nbytes(), [p.tolist() for p in cache.kept_positions(1)])


@pytest.mark.parametrize(
    "make", [lambda m: make_cache(m), lambda m: make_cache(m, bits=8)], ids=["stock", "int8"]
)
def test_without_a_policy_it_reads_and_takes_no_question(make):
    model, ids, mask = attached("llama"), prompt(10), MASK
    with pytest.raises(LowkeyError, match="question 2: only a cache with a policy"):
        lowkey.prefill(model, pico.tokenizer(), make(model), ids, 2)
    cache, straight = make(model), make(model)
    lowkey.prefill(model, pico.tokenizer(), cache, ids, attention_mask=mask)
    pico.feed(model, ids, straight, [4, 0])
    more = prompt(3, seed=2)
    assert torch.equal(pico.feed(model, more, cache, [4, 0]), pico.feed(model, more, straight, [4, 0]))


def test_a_cache_of_transformers_is_refused():
    with pytest.raises(LowkeyError, match="cache of type DynamicCache"):
        lowkey.prefill(attached("llama"), pico.tokenizer(), DynamicCache(), prompt(10))


@pytest.mark.parametrize("options", [{}, {"every": 1}])
def test_a_prompt_of_one_token_has_nothing_to_repeat(options):
    model = attached("llama")
    text = [
        stream_text(
            model,
            pico.tokenizer(),
            "a",
            make_cache(model, policy=policy(name, "100%", **options)),
            4,
            io.StringIO(),
        )["text"]
        for name in ("kvzip", "snapkv")
    ]
    assert text[0] == text[1]
