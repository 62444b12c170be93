"""A prompt that is read once is continued in many ways, over every kind of cache."""

from __future__ import annotations

import pytest
import reach
import torch
from branching import beams_by_hand, close, filled
from cache_kinds import CASES, KINDS, agree
from failing_calls import same, state
from pico import attached, feed, generate, prompt

from lowkey import LowkeyError

FEW = [
    "stock",
    "bits-kivi4",
    "plan-exact",
    "snapkv",
    "kvzip",
    "attention-matching",
    "every-global",
    "merged-snapkv-kivi4",
    "dynamic",
]
QUICK = [
    pytest.param(*case, marks=[] if case[0] in FEW and case[1] == "llama" else pytest.mark.slow)
    for case in CASES
]
WAYS = 3


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_continuations_of_one_prompt_are_separate_runs(kind, name):
    """Three turns of five tokens: in one batch of copies, each over a branch, and each over a prompt of its
    own.
    """
    model, ids, turns = attached(name), prompt(30, batch=1), prompt(5, batch=WAYS, seed=7)
    cache = filled(kind, name, ids)
    held, before = agree(cache, "filled"), state(cache)
    many = cache.branch()
    many.expand(WAYS)
    together = feed(model, turns, many, splits=[3, 1, 1])
    agree(many, "expanded, and a turn later")
    for row, turn in enumerate(turns.split(1)):
        wanted = feed(model, turn, filled(kind, name, ids), splits=[3, 1, 1])
        branch = cache.branch()
        assert torch.equal(feed(model, turn, branch, splits=[3, 1, 1]), wanted)
        close(together[row : row + 1], wanted)
        agree(branch, "branched, and a turn later")
    assert agree(cache, "after its branches went on") == held and same(state(cache), before)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_branch_shares_maps_and_nothing_else(kind, name):
    cache = filled(kind, name, prompt(30), [5, 0])
    twin = cache.branch()
    assert agree(twin, "branched") == cache.nbytes() > 0
    assert not set(reach.storages(twin, reach.MAPS)) & set(reach.storages(cache, reach.MAPS))
    assert sum(reach.storages([twin, cache]).values()) == 2 * reach.held(cache) + reach.maps(cache)


@pytest.mark.parametrize(("kind", "name"), QUICK)
def test_a_branch_of_some_sequences_is_those_sequences(kind, name):
    model, cache = attached(name), filled(kind, name, prompt(30), [5, 0])
    wanted = feed(model, prompt(3, seed=4), cache.branch(), [5, 0])
    close(feed(model, prompt(3, seed=4)[1:], cache.branch(1), [0]), wanted[1:])
    close(feed(model, prompt(3, seed=4).flip(0), cache.branch([1, 0]), [0, 5]), wanted.flip(0))
    close(feed(model, prompt(3, seed=4)[:1].repeat(2, 1), cache.branch([0, 0]), [5, 5]), wanted[[0, 0]])


@pytest.mark.parametrize(("kind", "name"), QUICK)
def test_several_samples_are_those_of_a_batch(kind, name):
    """The prompt is read once; transformers draws as it does over a cache that read it three times."""
    model, ids = attached(name), prompt(30, batch=1)
    once = filled(kind, name, ids[:, :-1])
    once.expand(WAYS)
    thrice = filled(kind, name, ids[:, :-1].repeat(WAYS, 1))
    torch.manual_seed(1)
    drawn = generate(model, ids, 8, once, num_return_sequences=WAYS, do_sample=True)
    torch.manual_seed(1)
    wanted = generate(model, ids.repeat(WAYS, 1), 8, thrice, do_sample=True)
    assert drawn.shape == (WAYS, 8) and torch.equal(drawn, wanted)
    assert len(drawn.unique(dim=0)) > 1, "all samples are the same: this would test nothing"


@pytest.mark.parametrize(("kind", "name"), QUICK)
def test_beams_over_a_read_prompt_are_those_by_hand(kind, name):
    model, ids = attached(name), prompt(30, batch=1)
    cache = filled(kind, name, ids[:, :-1])
    wanted = beams_by_hand(model, ids, cache.branch(), WAYS, 6)
    cache.expand(WAYS)
    assert torch.equal(generate(model, ids, 6, cache, num_beams=WAYS), wanted)


def test_what_is_not_held_cannot_be_branched():
    cache = filled("bits-8", "llama", prompt(30))
    for given in (2, -1, [], [0, 2], [True], "01"):
        with pytest.raises(LowkeyError, match=r"sequences .*the cache holds 2; give numbers from 0 to 1"):
            cache.branch(given)
    with pytest.raises(LowkeyError, match="sequences 0: the cache holds none yet"):
        KINDS["snapkv"](attached("llama")).branch(0)
    assert KINDS["snapkv"](attached("llama")).branch().nbytes() == 0


@pytest.mark.parametrize("times", [0, -1, 1.0, True, None])
def test_a_cache_is_expanded_at_least_once(times):
    cache = filled("bits-8", "llama", prompt(30))
    with pytest.raises(LowkeyError, match=r"times .*give 1 or more"):
        cache.expand(times)
    cache.expand(1)
    assert cache.nbytes() == filled("bits-8", "llama", prompt(30)).nbytes()
