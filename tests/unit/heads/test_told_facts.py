"""Facts that are told in the texts from which gates learn."""

from __future__ import annotations

import re

import pico
import pytest
import torch

from lowkey.core.types import LowkeyError
from lowkey.evaluate.recall import FORMS
from lowkey.heads.needles import KEYS, KINDS_OF_THINGS, PEOPLE, THINGS
from lowkey.heads.told_facts import DIGITS, TOWNS, WORDINGS, with_facts


def windows(count=2, length=400):
    ids = pico.tokenizer()("It rained. We stayed at home. " * 20, add_special_tokens=False).input_ids
    return torch.tensor([[1, *ids[n : n + length - 1]] for n in range(count)])


def pattern(wording):
    return re.escape(wording).replace(r"\{key\}", r"[A-Z]\w+").replace(r"\{value\}", r"\d+")


def test_every_window_tells_its_own_facts_between_sentences():
    tokenizer, rows = pico.tokenizer(), windows()
    rows[:, 0] = tokenizer.bos_token_id
    told = with_facts(rows, tokenizer, 3, 0)
    assert told.shape == rows.shape and bool((told[:, 0] == tokenizer.bos_token_id).all())
    texts = [tokenizer.decode(row) for row in told]
    for said in texts:
        assert sum(said.count(town) for town in TOWNS) == 3
        numbers = re.findall(r"\d+", said)
        assert len(numbers) == 3 and {len(n) for n in numbers} <= set(DIGITS)
        # what is left is the text; it may begin at another of its sentences
        for wording in WORDINGS:
            said = re.sub(pattern(wording), "", said)
        assert said.removeprefix("<s>").strip() in "It rained. We stayed at home. " * 20
    assert texts[0] != texts[1]
    assert not torch.equal(told, with_facts(rows, tokenizer, 3, 1))
    assert torch.equal(told, with_facts(rows, tokenizer, 3, 0))


def test_no_facts_change_nothing_and_too_many_are_refused():
    rows = windows()
    assert with_facts(rows, pico.tokenizer(), 0, 0) is rows
    with pytest.raises(LowkeyError, match="32 facts alone take"):
        with_facts(rows, pico.tokenizer(), len(TOWNS), 0)


def test_no_task_is_told_beforehand():
    """Keys, wordings and lengths of numbers are those of no task that measures a cache."""
    words = {word.lower() for word in [*KEYS, *PEOPLE, *KINDS_OF_THINGS, *THINGS]}
    assert words.isdisjoint(town.lower() for town in TOWNS)
    assert not {form.digits for form in FORMS.values()} & set(DIGITS)
    assert not {form.statement for form in FORMS.values()} & set(WORDINGS)
