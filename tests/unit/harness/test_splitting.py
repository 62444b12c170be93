"""Where prompts of lm-eval's tasks are split."""

from __future__ import annotations

import pytest

from lowkey.core.errors import LowkeyError
from lowkey.harness.splitting import context_length

SHOTS = "Question: How many legs has a cat? It is a mammal of the house.\nAnswer: 4\n\n" * 3
NIAH = "Some special magic numbers are hidden.\n{hay}\nWhat is the special magic number for oak mentioned?"


def split(task, document, prompt, scored=False):
    place = context_length(task, document, prompt, scored)
    return None if place is None else (prompt[:place], prompt[place:])


@pytest.mark.parametrize(
    ("task", "document", "context", "question"),
    [
        ("gsm8k", {"question": "How many eyes?"}, SHOTS, "Question: How many eyes?\nAnswer:"),
        (
            "mmlu_anatomy",
            {"question": " Which bone? "},
            "The following are questions.\n\n" + SHOTS,
            "Which bone?\nA. a\nB. b\nAnswer:",
        ),
        ("longbench_trec", {"context": "A text.", "question": "Q"}, "Read.\n\nA text.", "\nQ"),
        ("longbench2_code", {"context": "def f(): 1"}, "<text>\ndef f(): 1", "\n</text>\n\nWhat?\nAnswer:"),
        ("babilong_qa1", {"input": "Mary went.", "question": "Where?"}, "I give.\n\nMary went.", "\nWhere?"),
        ("niah_single_1", {"input": NIAH}, "Some text.\nWhat is more\nhay\n", "What is the special number?"),
        (
            "ruler_qa_squad",
            {},
            "Answer the question based on the given documents. X\n\nDocs\n\n",
            "Answer the question based on the given documents. Q",
        ),
        (
            "boolq",
            {"passage": "Oak is wood.", "question": "is it"},
            "Oak is wood.",
            "\nQuestion: is it?\nAnswer:",
        ),
        ("coqa", {"story": "Once."}, "Once.", "\n\nQ: who\n\nA:"),
        ("my_own", {"context": "In the barn.", "question": "Q"}, "In the barn.", " Q"),
    ],
)
def test_known_tasks_are_split_before_the_question(task, document, context, question):
    assert split(task, document, context + question) == (context, question)


@pytest.mark.parametrize(
    ("task", "document", "prompt"),
    [
        ("hellaswag", {"query": "A man sits down. He"}, "A man sits down. He"),
        ("arc_easy", {"question": "Which is heavy?"}, "Question: Which is heavy?\nAnswer:"),
        (
            "mmlu_law",
            {"question": "Which court has it? " * 9},
            "Questions about law.\n\n" + "Which court has it? " * 9,
        ),
        ("lambada_openai", {"text": "She opened the door"}, "She opened the"),
        ("unknown", None, "Anything"),
    ],
)
def test_a_scored_prompt_without_examples_is_all_context(task, document, prompt):
    assert split(task, document, prompt, scored=True) is None


def test_a_written_answer_without_context_has_none():
    assert context_length("gsm8k", {"question": "How many?"}, "Question: How many?\nAnswer:", False) == 0


def test_an_unknown_task_of_writing_is_refused():
    with pytest.raises(LowkeyError, match=r"task 'odd': where its context ends .* ask-with") as error:
        context_length("odd", {"a": 1}, "Write a poem.", False)
    assert "\n" not in str(error.value)
