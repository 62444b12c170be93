"""Recall: what the cases look like, and that only a model that knows the answer scores."""

from __future__ import annotations

import random
import re

import pico
import pytest
import torch

from lowkey.evaluate import recall
from lowkey.evaluate.recall import KEYS, Fact, draw_episode, draw_facts, weave
from lowkey.evaluate.settings import Setting, identity
from lowkey.progress import silent
from lowkey.types import LowkeyError

TOKENIZER = pico.tokenizer()
HAYSTACK = TOKENIZER("It was a bright cold day in April, and the clocks were striking. " * 20).input_ids
SEEDS = pytest.mark.parametrize("seed", range(5))


def encode(text: str) -> list[int]:
    return TOKENIZER(text).input_ids


def episode(seed: int = 0, context: int = 300, facts: int = 8) -> recall.Episode:
    return draw_episode(random.Random(seed), encode, HAYSTACK, context, facts)


# -- weave


@SEEDS
@pytest.mark.parametrize("length", [9, 10, 50, 509])
def test_weaving_gives_exactly_the_length(seed, length):
    assert len(weave(random.Random(seed), range(500), [[-1] * 4, [-2] * 5], length)) == length


@SEEDS
def test_inserts_stay_whole_and_in_order(seed):
    inserts = [[-1, -2], [-3], [-4, -5, -6]]
    out = weave(random.Random(seed), range(500), inserts, 60)
    assert [x for x in out if x < 0] == [-1, -2, -3, -4, -5, -6]
    assert out.index(-2) == out.index(-1) + 1 and out.index(-6) == out.index(-4) + 2


@SEEDS
def test_what_is_around_them_is_one_stretch_of_the_text(seed):
    rest = [x for x in weave(random.Random(seed), range(500), [[-1], [-2]], 60) if x >= 0]
    assert rest == list(range(rest[0], rest[0] + 58))


def test_places_differ_from_case_to_case():
    places = {weave(random.Random(seed), range(500), [[-1]], 60).index(-1) for seed in range(20)}
    assert len(places) > 10 and min(places) < 20 and max(places) > 40


@pytest.mark.parametrize("haystack, length", [(500, 4), (10, 60)], ids=["facts do not fit", "text too short"])
def test_what_cannot_be_woven_is_refused_in_one_line(haystack, length):
    with pytest.raises(LowkeyError) as refusal:
        weave(random.Random(0), range(haystack), [[-1] * 5], length)
    assert len(str(refusal.value).splitlines()) == 1 and str(length) in str(refusal.value)


# -- facts and cases


@SEEDS
def test_facts_have_keys_of_their_own_and_three_digits(seed):
    facts = draw_facts(random.Random(seed), 40)
    assert len({f.key for f in facts}) == 40 and {f.key for f in facts} <= set(KEYS)
    assert all(re.fullmatch(r"\d{3}", f.value) for f in facts)


def test_the_keys_are_distinct_words():
    assert len(set(KEYS)) == len(KEYS) and all(re.fullmatch("[a-z]+", key) for key in KEYS)


def test_the_sentences_of_a_fact():
    fact = Fact("oak", "048")
    assert (fact.statement, fact.question, fact.answer) == (" Remember oak 048.", " Recall oak", " 048")


@SEEDS
def test_a_prompt_is_context_and_question(seed):
    case = episode(seed)
    assert len(case.prompt) == 300 + len(case.question)
    assert case.prompt[300:] == case.question


@SEEDS
def test_the_asked_fact_is_in_the_prompt_once(seed):
    case = episode(seed)
    text, key = TOKENIZER.decode(case.prompt), TOKENIZER.decode(case.question).removeprefix(" Recall ")
    assert text.count(f" Remember {key}{TOKENIZER.decode(case.answer)}.") == text.count(f" Remember {key} ") == 1
    assert text.count(" Remember ") == 8


def test_a_seed_gives_the_same_case():
    assert episode(3) == episode(3) != episode(4)


def test_a_context_too_small_for_the_facts_is_refused():
    with pytest.raises(LowkeyError, match="context 16: 8 facts"):
        episode(context=16)


# -- scoring


class Fake(torch.nn.Module):
    """A model that writes `answer(prompt)`."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer, self.asked = answer, []
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def generate(self, ids, *, attention_mask, past_key_values, max_new_tokens, do_sample, pad_token_id):
        assert attention_mask.shape == ids.shape and not do_sample
        text = TOKENIZER.decode(ids[0, 1:])
        self.asked.append((text, past_key_values))
        return torch.cat([ids, torch.tensor([encode(self.answer(text))[:max_new_tokens]])], 1)


def knows(prompt: str) -> str:
    key = prompt.rsplit(" ", 1)[1]
    return " " + re.search(rf" Remember {key} (\d+)\.", prompt)[1]


def score(answer, cases=6, seed=0, names=("full",)):
    model = Fake(answer)
    settings = [Setting(name, identity(), lambda name=name: f"cache of {name}") for name in names]
    return recall.measure(model, TOKENIZER, settings, HAYSTACK, 300, cases, seed, silent), model.asked


@pytest.mark.parametrize(
    "answer, expected",
    [
        (knows, 1.0),
        (lambda prompt: knows(prompt) + " and more", 1.0),
        (lambda prompt: " 9x9", 0.0),
        (lambda prompt: knows(prompt)[:-1], 0.0),
        (lambda prompt: "\n" + knows(prompt), 0.0),
    ],
    ids=["knows", "goes on", "does not", "stops early", "begins late"],
)
def test_only_the_exact_answer_scores(answer, expected):
    assert score(answer)[0] == {"full": {"exact_match": expected}}


def test_half_known_is_half_a_score():
    turns = iter(range(6))
    assert score(lambda prompt: knows(prompt) if next(turns) % 2 else " no")[0]["full"]["exact_match"] == 0.5


def test_every_setting_is_asked_the_same_over_its_own_cache():
    found, asked = score(knows, cases=3, names=("full", "int8"))
    assert list(found) == ["full", "int8"]
    assert [cache for _, cache in asked] == ["cache of full", "cache of int8"] * 3
    assert [text for text, _ in asked[::2]] == [text for text, _ in asked[1::2]]


def test_another_seed_asks_other_questions():
    first, again, other = ([text for text, _ in score(knows, seed=seed)[1]] for seed in (0, 0, 1))
    assert first == again != other


def test_a_prompt_begins_with_the_beginning_of_text(monkeypatch):
    seen = []
    monkeypatch.setattr(Fake, "generate", lambda self, ids, **_: seen.append(ids[0]) or ids)
    score(knows, cases=1)
    assert seen[0][0] == TOKENIZER.bos_token_id
    assert seen[0].tolist().count(TOKENIZER.bos_token_id) == 1
