"""RULER's questions whose paragraphs stand among those of other questions: SQuAD (arXiv:1606.05250) as qa_1
and HotpotQA (arXiv:1809.09600) as qa_2, from files in the user's folder.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from lowkey.core import files
from lowkey.core.errors import LowkeyError
from lowkey.core.options import shown
from lowkey.suites.files import FORMAT_REMEDY, Record
from lowkey.suites.hiding import Made, Maker, fitted
from lowkey.suites.sample import Source

QUESTION_FILES: dict[str, tuple[str, ...]] = {
    "qa_1": ("squad.json", "dev-v2.0.json", "dev-v1.1.json"),
    "qa_2": ("hotpotqa.json", "hotpot_dev_distractor_v1.json"),
}
_MOST_BYTES = 2**31
_INTRODUCTION = "Answer the question from these documents, with the answer alone.\n\n"
_QUESTION = "\n\nAnswer the question from the documents above, with the answer alone.\n\nQuestion: "
_OPENING = " Answer:"


@dataclass(frozen=True)
class _Item:
    """A question.

    Args:
        question: the words.
        answers: answers that count as right.
        needed: numbers of the paragraphs that answer it.
    """

    question: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]


@dataclass(frozen=True)
class _Items:
    """Questions, and all paragraphs of their file."""

    items: list[_Item]
    paragraphs: list[str]


def _listed(value: Any, name: str, place: str) -> list[Record]:
    """A list of objects as records."""
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise LowkeyError(f"{place}: {name} is {shown(value)} and must be a list of objects; {FORMAT_REMEDY}")
    return [Record(v, f"{place}, {name} {i}") for i, v in enumerate(value, 1)]


def _squad(content: Any, place: str) -> _Items:
    """SQuAD: articles with paragraphs with questions. Those without an answer are left out."""
    items, paragraphs = [], []
    if not isinstance(content, dict):
        raise LowkeyError(f"{place}: is {shown(content)} and must be an object with data; {FORMAT_REMEDY}")
    for article in _listed(content.get("data"), "data", place):
        for paragraph in _listed(article.get("paragraphs"), "paragraphs", article.place):
            paragraphs.append(paragraph.text("context"))
            for asked in _listed(paragraph.get("qas"), "qas", paragraph.place):
                answers = [a.text("text") for a in _listed(asked.get("answers"), "answers", asked.place)]
                if answers:
                    unique = tuple(dict.fromkeys(answers))
                    items.append(_Item(asked.text("question"), unique, (len(paragraphs) - 1,)))
    return _Items(items, paragraphs)


def _hotpot(content: Any, place: str) -> _Items:
    """HotpotQA: questions, each with ten paragraphs of which some answer it."""
    items: list[_Item] = []
    numbers: dict[str, int] = {}
    for record in _listed(content, "record", place):
        own, pairs = [], record.get("context")
        for pair in pairs if isinstance(pairs, list) else [pairs]:
            title, sentences = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
            right = isinstance(title, str) and isinstance(sentences, list)
            if not right or not all(isinstance(sentence, str) for sentence in sentences or ()):
                raise record.refuse(f"context has {shown(pair)} and must have pairs of a title and sentences")
            own.append(numbers.setdefault(f"{title}\n{''.join(sentences or ())}", len(numbers)))
        items.append(_Item(record.text("question"), (record.text("answer"),), tuple(own)))
    return _Items(items, list(numbers))


def _read(path: Path, task: str) -> _Items:
    """The questions of a file."""
    content = files.read_bytes(path, f"ruler {task}:", _MOST_BYTES, FORMAT_REMEDY)
    try:
        parsed = files.parse_json(content.decode("utf-8-sig"))
    except ValueError as error:
        reason = " ".join(str(error).split())[:120]
        raise LowkeyError(f"{path}: is no JSON ({reason}); {FORMAT_REMEDY}") from None
    found = (_squad if task == "qa_1" else _hotpot)(parsed, str(path))
    if not found.items:
        raise LowkeyError(f"{path}: has no question with an answer; {FORMAT_REMEDY}")
    return found


def distracted_question(task: str, source: Source, tokens: int) -> Maker:
    """Makes cases of `qa_1` or `qa_2`: the paragraphs of a question among those of others; for the arguments
    see `hidden_needles`.

    Raises:
        LowkeyError: the folder has no file of the kind.
    """
    names = QUESTION_FILES[task]
    folder = source.folder
    path = next((folder / name for name in names if folder and (folder / name).exists()), None)
    if path is None:
        raise LowkeyError(
            f"ruler {task}: has no questions; give --data-dir, a folder with {' or '.join(names)}, or choose "
            "other tasks"
        )
    known = _read(path, task)
    left: list[_Item] = []  # no question is asked twice before all were asked once

    def make(rng: Random) -> Made:
        if not left:
            left.extend(Random(source.seed).sample(known.items, len(known.items)))
        item = left.pop()
        others = [i for i in range(len(known.paragraphs)) if i not in item.needed]
        rng.shuffle(others)
        words = [(i, word) for i in others for word in known.paragraphs[i].split(" ")]
        if not words:
            raise LowkeyError(
                f"{path}: has no paragraph of another question; give a file with more questions"
            )
        order = rng.random()
        question = _QUESTION + item.question

        def build(count: int) -> str:
            # the last of the other documents is cut; if there are too few, each stands there several times
            taken = ((n // len(words), *words[n % len(words)]) for n in range(count))
            other = [" ".join(w[2] for w in own) for _, own in itertools.groupby(taken, lambda w: w[:2])]
            texts = other + [known.paragraphs[i] for i in item.needed]
            Random(order).shuffle(texts)
            return _INTRODUCTION + "\n\n".join(f"Document {n}:\n{text}" for n, text in enumerate(texts, 1))

        context = fitted(source, tokens, question + _OPENING, build, f"ruler {task}")
        return Made(context, question, _OPENING, item.answers)

    return make
