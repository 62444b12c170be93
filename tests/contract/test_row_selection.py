"""Rows of a batch are selected, reordered and repeated in every kind of cache, as beam search does."""

from __future__ import annotations

import pytest
import torch
from cache_kinds import CASES, KINDS, REREAD, agree, evicting
from pico import attached, feed, generate, prompt, stock

from lowkey import LowkeyError, make_cache
from lowkey.policies import SnapKV

PADS = [5, 0]
CASES = [(kind, name) for kind, name in CASES if kind not in REREAD]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_selected_reordered_and_repeated_rows_are_unchanged(kind, name):
    """Two rows of different length; what follows is what each row alone would give, whichever place it was
    moved to.
    """
    model, ids, more = attached(name), prompt(30), prompt(4, batch=1, seed=3)
    caches = [KINDS[kind](model) for _ in range(4)]
    for cache in caches:
        feed(model, ids, cache, PADS, [27, 1, 1, 1])
    straight, moved, repeated, one = caches
    moved.reorder_cache(torch.tensor([1, 0]))
    repeated.batch_select_indices(torch.tensor([True, False]))
    repeated.batch_repeat_interleave(3)
    one.batch_select_indices(torch.tensor([-1]))
    for cache in (moved, repeated, one):
        agree(cache, "rows moved")
    expected = feed(model, more.expand(2, -1), straight, PADS, [3, 1])
    for cache, pads, rows in (
        (moved, PADS[::-1], [1, 0]),
        (repeated, PADS[:1] * 3, [0, 0, 0]),
        (one, PADS[1:], [1]),
    ):
        found = feed(model, more.expand(len(rows), -1), cache, pads, [3, 1])
        assert (found - expected[rows]).abs().max() < 2e-3, rows
        agree(cache, "rows moved, and a turn later")


@pytest.mark.parametrize("kind", ["stock", "snapkv", "every-global", "dynamic", "plan-razor"])
def test_repeating_rows_of_an_empty_cache_does_nothing(kind):
    cache = KINDS[kind](attached("llama"))
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([0]))
    assert agree(cache, "fresh") == 0 and cache.get_seq_length() == 0


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_beams_over_a_full_budget_are_the_stock_beams(name):
    model, ids = attached(name), prompt(20)
    ours = generate(model, ids, 12, make_cache(model, policy=SnapKV("100%")), PADS, num_beams=3)
    assert torch.equal(ours, generate(stock(name), ids, 12, pads=PADS, num_beams=3))
    assert not torch.equal(ours, generate(stock(name), ids, 12, pads=PADS)), (
        "beams equal greedy: this would test nothing"
    )


@pytest.mark.parametrize("kind", ["stock", "bits-8", "plan", "snapkv", "dynamic"])
def test_several_samples_of_a_filled_row_are_refused(kind):
    """transformers repeats the ids, not the cache: refused with the remedy, before anything changes, and the
    remedy works.
    """
    model, ids = attached("llama"), prompt(20, batch=1)
    cache = KINDS[kind](model)
    feed(model, ids[:, :15], cache)
    with pytest.raises(LowkeyError, match=r"holds 1 row and is given 3; call cache.expand\(3\) first"):
        generate(model, ids, 3, cache, num_return_sequences=3, do_sample=True)
    assert cache.get_seq_length() == 15
    cache.expand(3)
    found = generate(model, ids.repeat(3, 1), 3, cache)
    assert found.shape == (3, 3) and torch.equal(found[:1].expand(3, -1), found)


def test_another_number_of_rows_is_refused_with_the_remedy():
    model, cache = attached("llama"), make_cache(attached("llama"), policy=evicting("snapkv"))
    feed(model, prompt(20, batch=3), cache)
    with pytest.raises(LowkeyError, match="holds 3 rows and is given 2"):
        model(prompt(1, batch=2), past_key_values=cache)
    assert cache.get_seq_length() == 20
