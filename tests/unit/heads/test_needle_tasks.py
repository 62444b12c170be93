"""Needle tasks: spans contain what they say, the answer is right, and any tokenizer and text will do."""

from __future__ import annotations

import random
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pico
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import lowkey
from lowkey.core.types import LowkeyError
from lowkey.heads.needles import COPIED, COPIED_BLOCK, CUE, NEEDLE_TASKS, Case, Haystack, draw_case

TEXT = (
    "It was a bright cold day in April, and the clocks were striking. Was it? Nobody knew! So it went on and "
    "on. " * 60
)
SEEDS = pytest.mark.parametrize("seed", range(8))
FORMS = [(name, form) for name, task in NEEDLE_TASKS.items() for form in range(task.forms)]


class Encoding(NamedTuple):
    input_ids: list[int]


def spaced() -> PreTrainedTokenizerFast:
    """As SentencePiece models do: a space of its own before every text, and no <s>."""
    letters = {token: i for i, token in enumerate(["<unk>", "▁", *map(chr, range(33, 127))])}
    raw = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Replace("▁", " ")
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@cache
def haystack(name: str) -> Haystack:
    folder = Path(lowkey.__file__).parent / "data" / "tiny"
    made = {
        "letters": pico.tokenizer,
        "spaced": spaced,
        "words": lambda: AutoTokenizer.from_pretrained(folder),
    }
    return Haystack(made[name](), TEXT)


TOKENIZERS = pytest.mark.parametrize("hay", ["letters", "spaced", "words"], indirect=True)


@pytest.fixture
def hay(request) -> Haystack:
    return haystack(getattr(request, "param", "letters"))


def case_of(
    hay: Haystack, task: str, seed: int = 0, form: int = 0, length: int = 500, depth: float = 0.4
) -> Case:
    return draw_case(NEEDLE_TASKS[task], hay, length, depth, form, random.Random(seed))


def read(hay: Haystack, ids: list[int]) -> str:
    return hay.tokenizer.decode(ids)


def said(hay: Haystack, case: Case, *spans: tuple[int, int]) -> list[str]:
    return [read(hay, case.prompt[a:b]) for a, b in spans]


# -- every task


@TOKENIZERS
@pytest.mark.parametrize(("task", "form"), FORMS)
def test_the_right_answer_stands_in_the_needle(hay, task, form):
    for seed in range(10):
        case = case_of(hay, task, seed, form)
        start, stop = case.right
        assert case.prompt[start:stop] == case.answer != []
        assert any(a <= start < stop <= b for a, b in case.needle)


@TOKENIZERS
@pytest.mark.parametrize(("task", "form"), FORMS)
def test_wrong_answers_read_otherwise_and_stand_elsewhere(hay, task, form):
    for seed in range(10):
        case = case_of(hay, task, seed, form)
        spans = [case.right, *case.wrong]
        assert (
            len(set(said(hay, case, *spans)))
            == len(spans)
            == {"recall": 1, "copy": 1, "facts": 8, "recall2": 3, "comparison": 2}[task]
        )
        ordered = sorted(spans)
        assert all(a[1] <= b[0] for a, b in pairwise(ordered))


@TOKENIZERS
@pytest.mark.parametrize(("task", "form"), FORMS)
@pytest.mark.parametrize("length", [330, 501, 1000])
def test_prompt_and_answer_fill_the_length_with_question_last(hay, task, form, length):
    case = case_of(hay, task, length=length, form=form)
    assert len(case.prompt) + len(case.answer) == length
    assert case.prompt[-len(case.question) :] == case.question
    assert max(b for _, b in case.needle) <= length - len(case.answer) - len(case.question)


@TOKENIZERS
@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_a_prompt_begins_with_the_bos_token_if_there_is_one(hay, task):
    bos = hay.tokenizer.bos_token_id
    assert hay.start == ([] if bos is None else [bos])
    assert case_of(hay, task).prompt[: len(hay.start)] == hay.start
    assert case_of(hay, task).prompt.count(bos) == len(hay.start)


@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_a_seed_gives_the_same_case(hay, task):
    assert case_of(hay, task, 3) == case_of(hay, task, 3) != case_of(hay, task, 4)


# -- the stories


@TOKENIZERS
@SEEDS
@pytest.mark.parametrize("task", ["recall", "facts"])
def test_a_fact_is_asked_by_its_key(hay, seed, task):
    case = case_of(hay, task, seed)
    key = read(hay, case.question).removeprefix(" Recall ")
    assert said(hay, case, *case.needle) == [f" Remember {key}{read(hay, case.answer)}."]
    text = read(hay, case.prompt)
    assert (
        text.count(" Remember ") == {"recall": 1, "facts": 8}[task] and text.count(f" Remember {key} ") == 1
    )
    assert all(f" Remember {word} " in text for word in re.findall(r" Remember (\w+)", text))


def test_values_are_never_the_same(hay):
    for seed in range(300):  # of eight free draws among a thousand, 1 in 36 has two alike
        case = case_of(hay, "facts", seed)
        assert len(set(said(hay, case, case.right, *case.wrong))) == 8


@TOKENIZERS
@SEEDS
def test_two_hops_lead_to_the_answer(hay, seed):
    case = case_of(hay, "recall2", seed)
    text, key = read(hay, case.prompt), read(hay, case.question).removeprefix(" Recall ")
    links = dict(re.findall(r" (\w+) is (\w+)\.", text))
    values = dict(re.findall(r" Remember (\w+) (\d+)\.", text))
    assert len(links) == len(values) == 3 and set(links.values()) == set(values) and key not in values
    assert read(hay, case.answer) == f" {values[links[key]]}"
    assert set(said(hay, case, *case.needle)) == {
        f" Remember {links[key]} {values[links[key]]}.",
        f" {key} is {links[key]}.",
    }
    assert set(said(hay, case, *case.wrong)) == {f" {v}" for k, v in values.items() if k != links[key]}


@TOKENIZERS
@SEEDS
@pytest.mark.parametrize(("form", "word", "choose"), [(0, "older", max), (1, "younger", min)])
def test_a_comparison_asks_for_the_right_favourite(hay, seed, form, word, choose):
    case = case_of(hay, "comparison", seed, form)
    (needle,) = said(hay, case, *case.needle)
    people = re.findall(r" (\w+) is (\d+) years old and likes the( \w+ \w+) best\.", needle)
    assert len({name for name, _, _ in people}) == len({age for _, age, _ in people}) == 2
    right = choose(people, key=lambda p: int(p[1]))
    assert said(hay, case, case.right, *case.wrong) == [
        right[2],
        next(p[2] for p in people if p is not right),
    ]
    question = read(hay, case.question)
    assert f"the {word} one of {people[0][0]} and {people[1][0]}" in question and question.endswith(
        f"the {word} one likes the"
    )


def test_either_person_is_the_older(hay):
    cases = [case_of(hay, "comparison", seed) for seed in range(20)]
    assert {c.right < c.wrong[0] for c in cases} == {True, False}


@TOKENIZERS
@SEEDS
def test_a_copy_goes_on_where_the_block_was_cut(hay, seed):
    case = case_of(hay, "copy", seed)
    ((start, stop),) = case.needle
    block = case.prompt[start:stop]
    assert len(block) == COPIED_BLOCK == len(set(block)) and set(block) <= set(hay.ids)
    assert block[: CUE + COPIED] == case.question + case.answer


# -- where they stand


@TOKENIZERS
@SEEDS
def test_around_the_needle_is_one_stretch_of_the_text(hay, seed):
    case = case_of(hay, "recall", seed)
    ((start, stop),) = case.needle
    rest = case.prompt[len(hay.start) : start] + case.prompt[stop : -len(case.question)]
    assert any(hay.ids[i : i + len(rest)] == rest for i in range(len(hay.ids) - len(rest) + 1))


@TOKENIZERS
@SEEDS
@pytest.mark.parametrize("task", ["recall", "comparison", "copy"])
@pytest.mark.parametrize("depth", [0.3, 0.9])
def test_needles_and_questions_follow_a_full_stop(hay, seed, task, depth):
    case = case_of(hay, task, seed, depth=depth)
    for at in (case.needle[0][0], len(case.prompt) - len(case.question)):
        before = read(hay, case.prompt[len(hay.start) : at]).strip()
        assert before.endswith((".", "!", "?")) or at == len(hay.start)


@SEEDS
def test_the_needle_stands_at_its_depth(hay, seed):
    begins = [case_of(hay, "recall", seed, length=1000, depth=d / 10).needle[0][0] for d in range(11)]
    assert begins[0] == len(hay.start) and begins == sorted(begins)
    # a sentence has at most 65 letters
    assert all(d * 97 - 70 <= at <= d * 98 + 1 for d, at in enumerate(begins))


def test_other_facts_stand_anywhere(hay):
    places = [case_of(hay, "facts", seed, length=1000).wrong[0][0] for seed in range(30)]
    assert min(places) < 300 and max(places) > 700


@pytest.mark.parametrize("depth", [0, 0.25, 1])
def test_a_text_without_sentences_is_cut_at_the_very_depth(depth):
    hay = Haystack(pico.tokenizer(), "on and on " * 100)
    ((start, _),) = case_of(hay, "recall", depth=depth, length=300).needle
    taken = len(" Remember oak 123." + " Recall oak" + " 123")
    assert abs(start - 1 - depth * (299 - taken)) <= 0.5 + 2 * depth * len("mountain")


def test_quotes_may_follow_the_end_of_a_sentence():
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "Yes.”": 1, 'no."': 2, "no": 3}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert Haystack(PreTrainedTokenizerFast(tokenizer_object=raw), 'no Yes.” no no." no').ends == [2, 4]


# -- tokens


def test_the_embedded_model_gets_its_training_sentences():
    hay = haystack("words")
    for text in (" Remember oak 482.", " Recall oak"):
        assert hay.encode(text) == hay.tokenizer(text, add_special_tokens=False).input_ids


def test_no_space_is_added_before_a_sentence():
    hay = haystack("spaced")
    assert hay.encode(" Recall oak") == [
        hay.tokenizer.convert_tokens_to_ids(c.replace(" ", "▁")) for c in " Recall oak"
    ]


class Pairs:
    """Two characters make a token, so that a part may begin and end in the middle of one."""

    bos_token_id = None

    def __call__(self, text: str, **_: object) -> Encoding:
        return Encoding(
            [sum(256**i * ord(c) for i, c in enumerate(text[at : at + 2])) for at in range(0, len(text), 2)]
        )

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i % 256) + chr(i // 256) for i in ids)


@pytest.mark.parametrize(
    ("part", "span"),
    [("cdef", (1, 3)), ("bcd", (0, 2)), ("cde", (1, 3)), ("d", (1, 2)), ("gh", (3, 4)), ("ab", (0, 1))],
)
def test_a_part_takes_every_token_that_holds_some_of_it(part, span):
    assert Haystack(Pairs(), TEXT).insert("abcdefgh", part).right == span


# -- refusals


@pytest.mark.parametrize(
    ("task", "text", "length", "match"),
    [
        ("facts", TEXT, 100, "context 100: the needle and its question alone take"),
        ("recall", "Too short.", 200, "data: 10 tokens cannot fill a context of 200"),
        ("copy", "aba " * 100, 200, "haystack: 3 different tokens cannot make a block of 24"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(task, text, length, match):
    with pytest.raises(LowkeyError, match=match) as refusal:
        case_of(Haystack(pico.tokenizer(), text), task, length=length)
    assert len(str(refusal.value).splitlines()) == 1
