"""A protected prompt: it stays whole, and the budget is of what was decoded behind it."""

from __future__ import annotations

import pytest
import torch
from pico import attached, feed, prompt

import lowkey
from lowkey.catalog import make_policy
from lowkey.core.types import LowkeyError

PROMPT, STEPS, RECENT = 21, 24, 2


def protected(name, budget, **options):
    given = {"protect_prompt": "true", "every": 4, "recent": RECENT, "sinks": 1} | options
    return make_policy(name, budget, {key: str(value) for key, value in given.items()})


@pytest.mark.parametrize("allocator", ["uniform", "ada", "global"])
@pytest.mark.parametrize(("budget", "wanted"), [("25%", 6), ("5 tokens", 5)])
@pytest.mark.parametrize("name", ["snapkv", "random"])
def test_the_prompt_stays_and_the_budget_is_of_the_rest(name, budget, wanted, allocator):
    """Rows of different length keep their own prompts, and after the last eviction as much as was granted."""
    model, pads, ids = attached("llama"), [7, 0], prompt(PROMPT + STEPS)
    cache = lowkey.make_cache(model, policy=protected(name, budget, allocator=allocator))
    feed(model, ids, cache, pads, [PROMPT] + [1] * STEPS)
    counts = torch.zeros(2, 3, 4)
    for layer in range(3):
        for row, pad in enumerate(pads):
            for head, at in enumerate(cache.kept_positions(layer, row)):
                of_prompt = at < PROMPT - pad
                assert at[of_prompt].tolist() == list(range(PROMPT - pad))
                assert set(range(PROMPT + STEPS - pad - RECENT, PROMPT + STEPS - pad)) <= set(at.tolist())
                counts[row, layer, head] = int((~of_prompt).sum())
    assert bool((counts.mean((1, 2)) == wanted).all())
    assert cache.nbytes() == cache.predicted_nbytes()


def test_a_row_keeps_what_it_keeps_alone():
    model, pads, ids = attached("llama"), [7, 0], prompt(PROMPT + STEPS)
    kept = []
    for rows, widths in (((0, 1), pads), ((0,), [0]), ((1,), [0])):
        cache = lowkey.make_cache(model, policy=protected("h2o", "25%"))
        skipped = 7 if rows == (0,) else 0
        feed(model, ids[list(rows), skipped:], cache, widths, [PROMPT - skipped] + [1] * STEPS)
        kept.append([[at.tolist() for at in cache.kept_positions(1, i)] for i in range(len(rows))])
    assert kept[0] == [kept[1][0], kept[2][0]]


def test_a_prompt_read_in_chunks_is_protected_whole(tmp_path):
    """A later turn is not a part of it; it is counted across saving and loading."""
    model, ids = attached("llama"), prompt(PROMPT + STEPS + 9, batch=1)
    cache = lowkey.make_cache(model, policy=protected("knorm", "5 tokens"))
    feed(model, ids[:, : PROMPT + 6], cache, splits=[10, PROMPT - 10] + [1] * 6)
    cache.save(tmp_path / "cache")
    loaded = lowkey.load_cache(tmp_path / "cache", model)
    held = []
    for each in (cache, loaded):
        feed(model, ids[:, PROMPT + 6 :], each, splits=[9] + [1] * (STEPS - 6))
        held.append([at.tolist() for at in each.kept_positions(2)])
    assert held[0] == held[1] and all(at[:PROMPT] == list(range(PROMPT)) for at in held[0])
    assert all(len(at) <= PROMPT + 5 + 3 for at in held[0])


def test_a_cropped_prompt_is_protected_up_to_its_end():
    model, ids = attached("llama"), prompt(PROMPT + STEPS, batch=1)
    cache = lowkey.make_cache(model, policy=protected("knorm", "5 tokens", every=0))
    feed(model, ids[:, :PROMPT], cache)
    cache.crop(-6)
    feed(model, ids[:, PROMPT - 6 : PROMPT + 7], cache, splits=[1] * 13)
    feed(model, ids[:, PROMPT + 7 :], cache)  # a later turn, which evicts
    for at in cache.kept_positions(0):
        assert at[: PROMPT - 6].tolist() == list(range(PROMPT - 6)) and len(at) == PROMPT - 6 + 5


@pytest.mark.parametrize(
    ("name", "budget", "said"),
    [
        ("snapkv", "64 KiB", "budget 64 KiB with protect_prompt: .* give a share"),
        ("think", "25%", "protect_prompt of ThinK: it drops channels"),
    ],
)
def test_what_a_protected_prompt_does_not_go_with_is_refused(name, budget, said):
    with pytest.raises(LowkeyError, match=said):
        protected(name, budget)
