"""A call that is refused, interrupted or fails leaves a cache as it was."""

from __future__ import annotations

import contextlib

import pico
import pytest
import torch
from cache_kinds import evicting
from dynamic_plans import make_plan
from failing_calls import FAILURES, LENGTH, NOT_REFUSED, call, cut, same, state
from pico import attached, prompt

import lowkey
from lowkey import LowkeyError, make_cache
from lowkey.policies import POLICIES
from lowkey.storage.exact import Exact

KINDS = {
    "stock": lambda m: make_cache(m),
    "bits-8": lambda m: make_cache(m, bits=8),
    "kivi4": lambda m: make_cache(m, bits="kivi4"),
    "plan-pre": lambda m: make_cache(m, pico.plan(m, layout="pre_rope")),
    "plan-exact": lambda m: make_cache(m, pico.plan(m, sinks=3, recent=5)),
    "plan-kivi": lambda m: make_cache(m, pico.plan(m), bits="kivi2", exact=Exact(2, 33)),
    "snapkv": lambda m: make_cache(m, policy=evicting("snapkv")),
    "every-global": lambda m: make_cache(m, policy=evicting("h2o", every=2, allocator="global")),
    "razor": lambda m: make_cache(m, policy=evicting("razor")),
    "think": lambda m: make_cache(m, policy=evicting("think")),
    "plan-tova": lambda m: make_cache(m, pico.plan(m), evicting("tova", every=3)),
    "dynamic": lambda m: make_cache(m, make_plan(m.config.model_type.replace("_text", ""), "post_rope")),
}
CASES = [(kind, "llama") for kind in KINDS] + [
    (kind, "gemma2") for kind in ("stock", "bits-8", "snapkv", "dynamic")
]


def fails(failure, model, cache, ids):
    with pytest.raises((Exception, KeyboardInterrupt)) as told:
        FAILURES[failure](model, cache, ids)
    if not failure.startswith(("interrupt", "a mask")):
        assert told.type is LowkeyError and "\n" not in str(told.value), told.value


@pytest.mark.parametrize("new", [1, 6])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_failed_call_changes_nothing(kind, name, new):
    model, ids, more = attached(name), prompt(LENGTH, batch=1), prompt(new, batch=1, seed=1)
    straight = KINDS[kind](model)
    call(model, straight, ids)
    expected = call(model, straight, more)
    held = KINDS[kind](model)
    call(model, held, ids)
    before, size = state(held), held.nbytes()
    for failure in FAILURES:
        if failure in NOT_REFUSED.get(kind, ()) or (
            name == "gemma2" and failure == "interrupt in the first attention"
        ):
            continue
        fails(failure, model, held, more)
        assert [layer.get_seq_length() for layer in held.layers] == [LENGTH] * 3, failure
        assert held.nbytes() == size and same(state(held), before), failure
    assert torch.equal(call(model, held, more), expected)
    assert (
        same(state(held), state(straight)) and held.nbytes() == straight.nbytes() == held.predicted_nbytes()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_call_after_a_failure_gives_the_usual_logits(kind):
    """One token with positions of its own: nothing asks the cache for its length before tokens come again."""
    model, ids, more = attached("llama"), prompt(LENGTH, batch=1), prompt(1, batch=1, seed=1)
    caches = [KINDS[kind](model) for _ in range(2)]
    for held in caches:
        call(model, held, ids)
    with pytest.raises(KeyboardInterrupt):
        cut("mlp", 1, model, caches[0], more)
    at = torch.tensor([[LENGTH]])
    assert torch.equal(*(call(model, held, more, position_ids=at) for held in caches))


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_call_that_fails_leaves_a_fresh_cache(kind):
    model, ids, held = attached("llama"), prompt(LENGTH, batch=1), KINDS[kind](attached("llama"))
    with pytest.raises(KeyboardInterrupt):
        cut("mlp", 1, model, held, ids)
    assert held.get_seq_length() == held.nbytes() == held.predicted_nbytes() == 0 and not held.is_initialized
    assert torch.equal(
        call(model, held, ids[:, :9].repeat(2, 1)), call(model, KINDS[kind](model), ids[:, :9].repeat(2, 1))
    )


def test_a_length_asked_within_a_pass_is_refused_and_not_guessed():
    model, held = attached("llama"), make_cache(attached("llama"), bits=8)
    call(model, held, prompt(LENGTH, batch=1))
    handle = (
        model.get_decoder().layers[1].register_forward_pre_hook(lambda *_: held.get_seq_length() and None)
    )
    try:
        with pytest.raises(LowkeyError, match="within a forward pass"):
            call(model, held, prompt(3, batch=1))
    finally:
        handle.remove()
    assert held.get_seq_length() == LENGTH
    call(model, held, prompt(3, batch=1))
    assert held.get_seq_length() == LENGTH + 3


def test_bytes_may_be_asked_within_a_pass():
    model, held, sizes = attached("llama"), make_cache(attached("llama"), bits=8), []
    handle = (
        model.get_decoder()
        .layers[2]
        .register_forward_pre_hook(lambda *_: sizes.append((held.nbytes(), held.predicted_nbytes())))
    )
    call(model, held, prompt(LENGTH, batch=1))
    handle.remove()
    assert sizes[0][0] == sizes[0][1] == held.nbytes() * 2 // 3


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("name", ["kvzip", "snapkv"])
def test_a_prefill_that_fails_leaves_no_settings_behind(name, stop):
    """In its first, second and third forward pass; KVzip makes one for every piece of the text."""
    model, ids = attached("llama"), prompt(LENGTH, batch=1)
    held = make_cache(model, policy=POLICIES[name]("20 tokens", **({"chunk": 10} if name == "kvzip" else {})))
    passes = []

    def count(*_):
        passes.append(0)
        if len(passes) == stop:
            raise KeyboardInterrupt

    handle = model.get_decoder().layers[1].mlp.register_forward_pre_hook(count)
    try:
        with pytest.raises(KeyboardInterrupt) if stop == 1 or name == "kvzip" else contextlib.nullcontext():
            lowkey.prefill(model, pico.tokenizer(), held, ids, question=4)
    finally:
        handle.remove()
    if len(passes) == stop:
        assert held.nbytes() == held.get_seq_length() == 0
        assert not any(layer.frozen or layer.score_only_tokens for layer in held.evicting)
        lowkey.prefill(model, pico.tokenizer(), held, ids, question=4)
    fresh = make_cache(model, policy=held.origin.policy)
    lowkey.prefill(model, pico.tokenizer(), fresh, ids, question=4)
    assert same(state(held), state(fresh))


def test_a_refused_crop_puts_back_the_layers_that_were_cropped():
    """The sliding layer before it, whose window is not full, can be cropped; the layer behind cannot."""
    model = attached("gemma2")
    held = make_cache(model, bits=8, exact=Exact(0, 5))
    call(model, held, prompt(10, batch=1))
    before = state(held)
    with pytest.raises(LowkeyError, match="would have to be exact again"):
        held.crop(-2)
    assert [layer.get_seq_length() for layer in held.layers] == [10] * 3 and same(state(held), before)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_cropped_cache_in_stock_form_holds_what_is_left(name):
    model, held, short = attached(name), *(make_cache(attached(name)) for _ in range(2))
    call(model, held, prompt(12, batch=1))
    call(model, short, prompt(12, batch=1)[:, :9])
    held.crop(-3)
    assert held.nbytes() == held.predicted_nbytes() == short.nbytes()


def test_bits_out_of_a_file_are_told_in_one_line():
    model = pico.attached("llama")
    with pytest.raises(LowkeyError, match=r"^bits .* packed storage is one of") as refusal:
        make_cache(model, policy=POLICIES["snapkv"]("50%"), bits="a\nb")
    assert len(str(refusal.value).splitlines()) == 1
