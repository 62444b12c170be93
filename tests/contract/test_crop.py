"""`crop` leaves what a cache that never saw the removed tokens holds, or is refused and changes nothing."""

from __future__ import annotations

from functools import cache as cached

import pytest
import torch
from branching import close, filled
from cache_kinds import CASES, KINDS, agree
from failing_calls import same, state
from pico import attached, feed, generate, prompt, stock

from lowkey import LowkeyError, load_cache, make_cache
from lowkey.catalog import make_policy

FEW = [
    "stock",
    "bits-kivi4",
    "plan-exact",
    "exact",
    "snapkv",
    "h2o",
    "think",
    "matching",
    "merged-snapkv-kivi4",
    "dynamic",
]
QUICK = [
    pytest.param(*case, marks=[] if case[0] in FEW and case[1] == "llama" else pytest.mark.slow)
    for case in CASES
]
# kinds whose calls of several tokens do not give what single steps give
NO_GUESSES = [name for name in KINDS if name.startswith("every") or name == "exact-prefill"]
STEPS, GUESSES = 36, 6  # longer than a window and a block of 32 tokens


@cached
def grown(kind, name, pads, length):
    """A cache that has read a prompt and taken some of the steps of `STEPS`, so that its windows are full."""
    ids = prompt(30, batch=len(pads))
    if not length:
        return filled(kind, name, ids, pads)
    before = grown(kind, name, pads, length - 1).branch()
    feed(attached(name), prompt(STEPS, batch=len(pads), seed=2)[:, length - 1 : length], before, pads)
    return before


def lived(kind, name, pads, length=STEPS):
    return grown(kind, name, tuple(pads), length).branch()


@pytest.mark.parametrize(("kind", "name"), QUICK)
def test_a_recorded_call_leaves_what_its_kept_tokens_leave(kind, name):
    """A call of six guesses, of which the first stay, is as many steps of decoding."""
    model, pads, guesses = attached(name), [5, 0], prompt(GUESSES, seed=5)
    straight, more = lived(kind, name, pads), prompt(3, seed=6)
    if kind in NO_GUESSES:
        with pytest.raises(LowkeyError, match="activate_past_recording: "):
            straight.activate_past_recording()
        return
    for kept in range(GUESSES + 1):
        cache = lived(kind, name, pads)
        cache.activate_past_recording()
        feed(model, guesses, cache, pads)
        agree(cache, "a call is recorded")
        cache.crop(kept - GUESSES)
        state(cache), state(straight)  # without free slots
        assert agree(cache, "cropped") == straight.nbytes(), kept
        close(feed(model, more, cache, pads), feed(model, more, straight.branch(), pads))
        feed(model, guesses[:, kept : kept + 1], straight, pads) if kept < GUESSES else None


@pytest.mark.parametrize(("kind", "name"), QUICK)
def test_recorded_steps_are_taken_back_bit_by_bit(kind, name):
    """Also over evictions that took place between them."""
    model, ids = attached(name), prompt(STEPS, batch=1, seed=2)
    for kept in (0, 1, 4):
        cache, straight = lived(kind, name, [0], STEPS - 5), lived(kind, name, [0], STEPS - 5)
        # not a longer `lived`: sums are rounded by where tokens lie, and every branch moves them
        feed(model, ids[:, STEPS - 5 : STEPS - 5 + kept], straight, splits=[1] * kept) if kept else None
        with cache.recording():
            feed(model, ids[:, -5:], cache, splits=[1] * 5)
            agree(cache, "steps are recorded")
            cache.crop(kept - 5)
        assert same(state(cache), state(straight)) and agree(cache, "cropped") == straight.nbytes()
        assert torch.equal(*(feed(model, ids[:, :1], held) for held in (cache, straight)))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_an_unrecorded_crop_is_exact_or_refused(kind, name):
    model, pads, more = attached(name), [5, 0], prompt(3, seed=6)
    exact = kind in ("stock", "plan", "plan-pre", "plan-4", "exact") and name == "llama"
    for removed in (1, 5, STEPS):
        cache, straight = lived(kind, name, pads), lived(kind, name, pads, STEPS - removed)
        before, held = state(cache), cache.nbytes()
        try:
            cache.crop(-removed)
        except LowkeyError as refusal:
            assert "\n" not in str(refusal) and "call cache.activate_past_recording()" in str(refusal)
            assert same(state(cache), before) and agree(cache, "refused") == held and not exact
            continue
        assert agree(cache, "cropped") == straight.nbytes()
        assert [layer.get_seq_length() for layer in cache.layers] == [30 + STEPS - removed] * 3
        close(feed(model, more, cache, pads), feed(model, more, straight, pads), 2e-2)
    cache = lived(kind, name, pads)
    if any(getattr(layer, "front_start", 0) for layer in cache.layers):
        with pytest.raises(LowkeyError, match=r"tokens were evicted since|have left the sliding window"):
            cache.crop(-STEPS - 1)
        assert same(state(cache), before)


@pytest.mark.parametrize(
    "kind", ["stock", "bits-8", "bits-kivi4", "plan", "plan-4", "plan-exact", "exact", "rule"]
)
@pytest.mark.parametrize("left", [33, 32, 7, 1])
def test_short_caches_are_cropped_without_recording(kind, left):
    """While nothing has left the window, or everything leaves it in whole blocks."""
    model, ids = attached("llama"), prompt(34)
    cache, straight = filled(kind, "llama", ids), filled(kind, "llama", ids[:, :left])
    if kind in ("bits-8", "plan-exact", "rule"):  # 32, 5 and 8 recent tokens
        with pytest.raises(LowkeyError, match="would have to be exact again"):
            cache.crop(left - 34)
        return
    cache.crop(left - 34)
    assert agree(cache, "cropped") == straight.nbytes()
    close(feed(model, prompt(3, seed=6), cache), feed(model, prompt(3, seed=6), straight), 2e-2)


@pytest.mark.parametrize(("kind", "name"), QUICK)
def test_a_cache_cropped_to_nothing_is_fresh(kind, name):
    cache = filled(kind, name, prompt(30))
    try:
        cache.crop(-30)
    except LowkeyError:
        return
    model, ids = attached(name), prompt(9, seed=1)
    assert cache.get_seq_length() == 0
    close(feed(model, ids, cache), feed(model, ids, KINDS[kind](model)))


@pytest.mark.parametrize(("kind", "name"), QUICK)
def test_prompt_lookup_gives_what_greedy_decoding_gives(kind, name):
    model, ids = attached(name), prompt(7, batch=1).repeat(1, 5)
    cache = KINDS[kind](model)
    if kind in NO_GUESSES or (cache.origin and cache.origin.policy):
        with pytest.raises(LowkeyError, match="activate_past_recording: "):
            generate(model, ids, 20, cache, prompt_lookup_num_tokens=3)
        assert cache.get_seq_length() == cache.nbytes() == 0
        return
    found = generate(model, ids, 20, cache, prompt_lookup_num_tokens=3)
    assert torch.equal(found, generate(model, ids, 20, KINDS[kind](model)))
    agree(cache, "after prompt lookup")


@pytest.mark.parametrize("helper", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["stock", "bits-kivi4", "plan-exact", "rule", "plan-4", "dynamic"])
def test_assisted_decoding_gives_what_greedy_decoding_gives(kind, helper):
    """An assistant that always guesses right, and one that hardly ever does."""
    model, ids, cache = attached("llama"), prompt(30, batch=1), KINDS[kind](attached("llama"))
    found = generate(model, ids, 20, cache, assistant_model=stock(helper))
    assert torch.equal(found, generate(model, ids, 20, KINDS[kind](model)))
    agree(cache, "after assisted decoding")


def test_a_turn_after_speculation_is_an_ordinary_turn():
    """The first call without `crop` ends the recording: a policy evicts again, and nothing more is held."""
    model, cache, straight = attached("llama"), *(lived("snapkv", "llama", [0]) for _ in range(2))
    cache.activate_past_recording()
    for length, kept in ((4, 4), (3, 1)):
        feed(model, prompt(length, batch=1), cache)
        cache.crop(kept - length)
        feed(model, prompt(length, batch=1)[:, :kept], straight, splits=[1] * kept)
    for turn in (prompt(12, batch=1, seed=8), prompt(1, batch=1, seed=9)):
        for held in (cache, straight):
            feed(model, turn, held)
    assert agree(cache, "two turns later") == straight.nbytes()
    with pytest.raises(LowkeyError, match=r"crop\(-3\): tokens were evicted since; at most 1 can be removed"):
        cache.crop(-3)


def test_a_cropped_cache_is_saved_and_loaded(tmp_path):
    """More steps of decoding were taken back than tokens are left."""
    model, more = attached("llama"), prompt(6, batch=1, seed=6)
    cache = make_cache(model, policy=make_policy("snapkv", "100%", {}))
    feed(model, prompt(10, batch=1), cache)
    feed(model, prompt(20, batch=1, seed=1), cache, splits=[1] * 20)
    cache.crop(-25)
    cache.save(tmp_path / "cache")
    again = load_cache(tmp_path / "cache", model)
    assert again.get_seq_length() == 5 and agree(again, "loaded") == cache.nbytes()
    close(
        feed(model, more, again),
        feed(stock("llama"), torch.cat([prompt(10, batch=1)[:, :5], more], 1))[:, 5:],
    )


def test_more_than_all_cannot_be_removed():
    cache = filled("bits-8", "llama", prompt(30))
    with pytest.raises(LowkeyError, match=r"crop\(-31\): 30 tokens were seen; give 0 to -30"):
        cache.crop(-31)
    cache.crop(40)
    assert cache.get_seq_length() == 30
