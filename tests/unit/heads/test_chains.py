"""Chains of look-ups: every case is checked by following its table word by word, as a reader would."""

from __future__ import annotations

import random
import re

import pytest
from transformers import ByT5Tokenizer

from lowkey.core.errors import LowkeyError
from lowkey.heads.chains import (
    CHAIN_ENDS,
    FILLER,
    Chain,
    ChainTask,
    draw_chain,
    draw_chains,
    draw_table,
    stopping_tokens,
)
from lowkey.heads.needles import KEYS
from lowkey.models.loading import load_tokenizer


def followed(prompt: str) -> str:
    """The answer to a prompt, by its words alone."""
    table = dict(re.findall(r"(\w+) (\w+)\.", prompt))
    word, words = re.search(r"Follow (\w+):$", prompt)[1], []
    while word in table:
        word = table[word]
        words.append(word)
    return f" {' '.join(words)} = {word}."


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.mark.parametrize("length", [None, 200])
def test_the_answer_follows_from_the_prompt(tokenizer, length):
    task = ChainTask(pairs=12, shortest=3, longest=5)
    for chain in draw_chains(tokenizer, 30, task=task, length=length):
        prompt = tokenizer.decode(chain.prompt, skip_special_tokens=True)
        answer = tokenizer.decode(chain.answer)
        assert answer == followed(prompt)
        assert len(re.findall(r"\w+ \w+\.", prompt)) == 12
        assert 3 <= len(chain.words) <= 5
        assert chain.value == answer.rstrip(".").split()[-1]
        assert tokenizer.decode(chain.prompt[-chain.question :]) == re.search(r" Follow \w+:$", prompt)[0]
        assert length is None or len(chain.prompt) == length


def test_another_tokenizer_gives_the_same_words(tokenizer):
    bytes_of_words = ByT5Tokenizer()
    for a, b in zip(draw_chains(tokenizer, 5, 3), draw_chains(bytes_of_words, 5, 3), strict=True):
        assert a.words == b.words


def test_words_of_a_kind_are_no_words_of_another():
    assert not set(KEYS) & set(CHAIN_ENDS) and not set(FILLER) & {*KEYS, *CHAIN_ENDS}
    assert len(set(CHAIN_ENDS)) == len(CHAIN_ENDS) and len(set(FILLER)) == len(FILLER)


@pytest.mark.parametrize(("pairs", "shortest"), [(48, 1), (48, 2), (5, 4), (1, 1)])
def test_chains_do_not_meet(pairs, shortest):
    for seed in range(50):
        task = ChainTask(pairs=pairs, shortest=shortest, longest=max(shortest, min(pairs, 8)))
        table = draw_table(random.Random(seed), task)
        words = [word for chain in table.chains for word in chain]
        assert len(words) == len(set(words)) and len(table.pairs) == pairs
        assert {chain[-1] for chain in table.chains} <= set(CHAIN_ENDS)
        assert task.shortest <= len(table.chains[0]) - 1 <= task.longest


def test_a_case_depends_on_its_number_and_the_seed_alone(tokenizer):
    assert draw_chains(tokenizer, 5, 1)[:3] == draw_chains(tokenizer, 3, 1)
    assert draw_chains(tokenizer, 3, 1) != draw_chains(tokenizer, 3, 2)


WRITTEN = [
    (" river lamp gold = gold.", True, 3),
    (" river lamp gold = gold. Follow oak", True, 3),
    (" gold = gold.", True, 0),
    (" river lamp gold = gold", False, 3),
    (" river lamp gold = red.", False, 3),
    (" river lamp red = gold.", True, 2),
    (" river lamp gold gold.", False, 3),
    (" river = lamp gold.", False, 1),
    (" river door gold = gold = red.", False, 1),
    ("", False, 0),
]


@pytest.mark.parametrize(("written", "right", "links"), WRITTEN)
def test_only_the_value_of_a_finished_answer_counts(written, right, links):
    chain = Chain(prompt=[0], question=1, answer=[0], words=("river", "lamp", "gold"))
    assert chain.right(written) is right
    assert chain.links(written) == links


def test_filler_may_be_running_text():
    letters = ByT5Tokenizer()
    haystack = list(range(100, 200))
    chain = draw_chain(
        random.Random(0), lambda s: letters(s, add_special_tokens=False).input_ids, haystack=haystack
    )
    filler = chain.prompt[-chain.question - 32 : -chain.question]
    assert filler == list(range(filler[0], filler[0] + 32))
    with pytest.raises(LowkeyError, match="cannot fill"):
        draw_chain(random.Random(0), lambda s: [0], haystack=haystack[:5])


def test_what_does_not_fit_is_refused(tokenizer):
    with pytest.raises(LowkeyError, match="give a longer context or fewer pairs"):
        draw_chains(tokenizer, 1, length=20)
    with pytest.raises(LowkeyError, match="shorter chains"):
        ChainTask(pairs=3)
    with pytest.raises(LowkeyError, match="shorter chains"):
        ChainTask(shortest=5, longest=4)


def test_answers_stop_at_a_full_stop_or_the_end(tokenizer):
    stops = stopping_tokens(tokenizer, 3000)
    assert len(stops) == 3000 and not stops[len(tokenizer) :].any()
    assert stops[tokenizer.eos_token_id]
    for i in (i for chain in draw_chains(tokenizer, 5) for i in chain.answer):
        assert bool(stops[i]) is ("." in tokenizer.decode([i]))
