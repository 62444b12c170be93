"""Rows of different length go on as they would alone, or are refused before anything is stored."""

from __future__ import annotations

import pytest
import torch
from branching import close, filled
from cache_kinds import CASES, agree
from failing_calls import same, state
from pico import attached, feed, padding, prompt, stock
from transformers import DynamicCache

from lowkey import LowkeyError

PADS = [5, 0]
# four new tokens in one row, and two in the other, with the padding before or behind them
BEFORE, BEHIND = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
SUPPORTED = "stock"
# an integer in 15, or in 3, that rounds the other way
COARSE = dict.fromkeys(("plan-4", "merged-snapkv-kivi4", "mixed-kivi"), 0.05)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_rows_of_different_length_go_on_as_alone(kind, name):
    """KVzip's, too, whose second pass reads pieces of each row."""
    model, ids, more = attached(name), prompt(30), prompt(5, seed=3)
    found = feed(model, more, filled(kind, name, ids, PADS), PADS, [3, 1, 1])
    for row, pad in enumerate(PADS):
        alone = filled(kind, name, ids[row : row + 1, pad:])
        wanted = feed(model, more[row : row + 1], alone, None, [3, 1, 1])
        close(found[row : row + 1], wanted, COARSE.get(kind, 2e-3))


@pytest.mark.parametrize("turn", [BEFORE, BEHIND], ids=["before", "behind"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_an_uneven_turn_is_honoured_or_refused(kind, name, turn):
    """The turn, and then one more token of each row, which lies behind the padding. What is honoured is
    compared with transformers' own cache.
    """
    model, ids, new = attached(name), prompt(30), prompt(5, seed=3)
    cache, mask = filled(kind, name, ids, PADS), padding(PADS, 30)[0]
    longer = torch.cat([mask, turn, torch.ones(2, 1, dtype=torch.long)], 1)
    found, calls = [], [new[:, :4], new[:, 4:]]
    for call in calls:
        before, held = state(cache), cache.nbytes()
        seen = cache.get_seq_length() + call.shape[1]
        try:
            found.append(feed(model, call, cache, mask=longer[:, :seen]))
        except LowkeyError as refusal:
            assert kind != SUPPORTED and "\n" not in str(refusal) and "cache.branch(row)" in str(refusal)
            assert same(state(cache), before) and agree(cache, "refused") == held
            return
    assert torch.equal(turn, BEHIND) or kind == SUPPORTED
    past, wanted = DynamicCache(config=stock(name).config), []
    for call in (ids, *calls):
        wanted.append(feed(stock(name), call, past, mask=longer[:, : past.get_seq_length() + call.shape[1]]))
    real = torch.cat([turn, torch.ones(2, 1, dtype=torch.long)], 1).bool()
    close(torch.cat(found, 1)[real], torch.cat(wanted[1:], 1)[real])


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_rows_of_uneven_turns_go_on_over_branches(kind, name):
    """What the refusals tell one to do."""
    model, ids = attached(name), prompt(30)
    cache = filled(kind, name, ids, PADS)
    for row, (pad, length) in enumerate(zip(PADS, (2, 6), strict=True)):
        more = prompt(length, batch=1, seed=row)
        alone = filled(kind, name, ids[row : row + 1, pad:])
        own = cache.branch(row)
        close(feed(model, more, own, [pad]), feed(model, more, alone), COARSE.get(kind, 2e-3))
        agree(own, "a branch of one row")
