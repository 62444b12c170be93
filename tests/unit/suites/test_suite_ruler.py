"""Generated samples: exactly as long as they should be, and solvable by reading."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from lowkey.core.errors import LowkeyError
from lowkey.suites import SUITES, Source, load_samples, scored
from lowkey.suites.hiding import stream_from, words_of, woven

LENGTH = 3000
GENERATED = [(name, task) for name, suite in SUITES.items() for task in suite.generated]


def size(source, sample) -> int:
    text = sample.context + "".join(turn.question for turn in sample.asked) + sample.opening
    return source.count(text) + source.reserved + sum(turn.tokens for turn in sample.asked)


def made(tokenizer, name, task, **more):
    source = Source(tokenizer, length=LENGTH, reserved=7, **{"cases": 2, **more})
    return source, load_samples(name, source, [task])


@pytest.mark.parametrize(("name", "task"), GENERATED)
def test_prompts_have_the_exact_length(tokenizer, name, task):
    source, samples = made(tokenizer, name, task)
    assert [size(source, sample) for sample in samples] == [LENGTH, LENGTH]
    assert samples[0].context != samples[1].context
    for sample in samples:
        assert [scored(sample, " ".join(turn.answers), i) for i, turn in enumerate(sample.asked)] == [
            1
        ] * len(sample.asked)


def test_a_longer_run_begins_with_the_cases_of_a_shorter_one(tokenizer):
    one = made(tokenizer, "ruler", "niah_single_2", cases=1)[1]
    two = made(tokenizer, "ruler", "niah_single_2", cases=2)[1]
    assert one == two[:1] and made(tokenizer, "ruler", "niah_single_2", cases=1, seed=1)[1] != one


NEEDLE = re.compile(r"One of the special magic (number|uuid)s for (\S+) is: ([0-9a-f-]+)\.")
HIDDEN = {  # keys and values that are hidden, at least; keys that are asked for
    "niah_single_1": (1, 1, 1),
    "niah_single_2": (1, 1, 1),
    "niah_single_3": (1, 1, 1),
    "niah_multikey_1": (4, 4, 1),
    "niah_multikey_2": (12, 12, 1),
    "niah_multikey_3": (6, 6, 1),
    "niah_multivalue": (1, 4, 1),
    "niah_multiquery": (4, 4, 4),
}


@pytest.mark.parametrize("task", HIDDEN)
def test_needles_answer_the_question(tokenizer, task):
    for sample in made(tokenizer, "ruler", task)[1]:
        found = NEEDLE.findall(sample.context)
        values: dict[str, list[str]] = {}
        for _, key, value in found:
            values.setdefault(key, []).append(value)
        keys, least, asked = HIDDEN[task]
        assert len(values) >= keys and len(found) >= least
        wanted = [key for key in values if key in sample.question]
        assert len(wanted) == asked and all(key in sample.opening for key in wanted)
        assert sorted(sample.answers) == sorted(v for key in wanted for v in values[key])


def test_variables_are_traced_through_the_chain(tokenizer):
    for sample in made(tokenizer, "ruler", "vt")[1]:
        value = re.search(r"value (\d+)", sample.question)[1]
        known = set()
        for name, what in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", sample.context):
            if what == value or what in known:
                known.add(name)
        assert len(known) == 5 and known == set(sample.answers)


def test_common_words_are_the_most_common(tokenizer):
    for sample in made(tokenizer, "ruler", "cwe")[1]:
        counts = Counter(re.findall(r"\d+\. ([a-z-]+)", sample.context))
        ranked = counts.most_common()
        assert {word for word, _ in ranked[:10]} == set(sample.answers)
        assert ranked[9][1] > ranked[10][1]


def test_frequent_words_are_the_three_most_frequent(tokenizer):
    for sample in made(tokenizer, "ruler", "fwe")[1]:
        counts = Counter(re.findall(r"\b[a-z]{6}\b", sample.context.split("\n\n", 1)[1])).most_common()
        assert [word for word, _ in counts[:3]] == list(sample.answers)
        assert counts[2][1] > counts[3][1]


def test_questions_stand_among_other_paragraphs(tokenizer, examples):
    folder = examples / "ruler"
    for task, answer in (("qa_1", "Anders Vell"), ("qa_2", "green")):
        source, samples = made(tokenizer, "ruler", task, folder=folder, cases=3)
        assert {size(source, sample) for sample in samples} == {LENGTH}
        assert any(sample.answers == (answer,) for sample in samples)
        for sample in samples:
            assert sample.answers[0] in sample.context and sample.context.count("Document ") > 2


def test_questions_without_a_file_say_which_one_is_missing(tokenizer):
    with pytest.raises(LowkeyError, match=r"ruler qa_1: has no questions; give --data-dir.*squad\.json"):
        made(tokenizer, "ruler", "qa_1")


def test_a_length_that_is_too_short_is_refused(tokenizer):
    with pytest.raises(LowkeyError, match=r"length 128: ruler vt takes at least \d+ tokens; give more"):
        load_samples("ruler", Source(tokenizer, length=128), ["vt"])


def test_published_prompts_are_cut_before_the_question(tokenizer, tmp_path):
    """The record has the form of the authors' files, older (no prefix apart) and newer."""
    context = "A special magic uuid is hidden. What is it?\nOne of the special magic uuids for a is: b."
    question = "\nWhat is the special magic uuid for a mentioned in the provided text?"
    opening = " The special magic uuid for a mentioned in the provided text is"
    old = {"index": 0, "input": context + question + opening, "outputs": ["b"], "length": 60}
    new = {**old, "input": context + question, "answer_prefix": opening}
    (tmp_path / "niah_single_3.jsonl").write_text(f"{json.dumps(old)}\n{json.dumps(new)}\n")
    source = Source(tokenizer, folder=tmp_path)
    for sample in load_samples("ruler", source, ["niah_single_3"]):
        assert (sample.context, sample.question, sample.opening) == (context, question, opening)


def test_published_counting_tasks_are_cut_too(tokenizer, tmp_path):
    (tmp_path / "cwe").mkdir()
    prompt = "1. a 2. b\nQuestion: Which words are common? Answer: The words are:"
    (tmp_path / "cwe" / "validation.jsonl").write_text(json.dumps({"input": prompt, "outputs": ["a", "b"]}))
    (sample,) = load_samples("ruler", Source(tokenizer, folder=tmp_path), ["cwe"])
    assert sample.context == "1. a 2. b" and sample.opening == " Answer: The words are:"


# -- stories and shared contexts


def test_a_story_says_where_people_are(tokenizer):
    for sample in made(tokenizer, "babilong", "qa1", cases=4)[1]:
        where = {}
        for person, room in re.findall(
            r"(\w+) (?:moved|went|travelled|journeyed) to the (\w+)\.", sample.context
        ):
            where[person] = room
        assert where[re.search(r"Where is (\w+)\?", sample.question)[1]] == sample.answers[0]


def test_turns_ask_for_values_of_one_object(tokenizer):
    for sample in made(tokenizer, "scbench", "kv")[1]:
        table = json.loads(re.search(r"\{.*\}", sample.context)[0])
        assert len(sample.asked) == 5
        for turn in sample.asked:
            assert (table[re.search(r'"(\w+)"', turn.question)[1]],) == turn.answers


def test_turns_ask_about_one_list_of_numbers(tokenizer):
    for sample in made(tokenizer, "scbench", "mf")[1]:
        numbers = json.loads(re.search(r"\[.*\]", sample.context)[0])
        told = {
            "largest": max(numbers),
            "smallest": min(numbers),
            "most frequent": Counter(numbers).most_common(1)[0][0],
        }
        for turn in sample.asked:
            word = next(word for word in told if word in turn.question)
            assert turn.answers == (str(told[word]),)


# -- texts


def test_the_user_s_texts_are_taken(tokenizer, tmp_path):
    text = "Nobody had seen the heron. " * 40
    (tmp_path / "own.txt").write_text(text)
    for more in ({"folder": tmp_path}, {"texts": {"own": text}}):
        (sample, *_) = made(tokenizer, "ruler", "niah_single_2", **more)[1]
        assert sample.context.count("Nobody had seen the heron.") > 20


def test_a_text_of_a_few_words_is_refused(tokenizer):
    with pytest.raises(LowkeyError, match="data: the text 'too short' has 2 words"):
        made(tokenizer, "ruler", "niah_single_2", texts={"own": "too short"})


def test_facts_stand_between_sentences_in_order():
    import random

    words = words_of("One two three. " * 40)
    assert stream_from(random.Random(0), words)(250)[0] == "One "
    told = woven(words[:12], ["FIRST.", "LAST."], [0.0, 1.0])
    assert told.startswith("FIRST. One") and told.endswith("three. LAST.")
