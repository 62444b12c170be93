"""SCBench (arXiv:2412.10319): several questions, one after the other, about one shared context.

Four tasks of strings and numbers are generated. The others come from the published files,
`scbench_TASK.jsonl` with `context` and `multi_turns`, a list of `input`, `answer` and perhaps `options`. Code
retrieval (RepoQA) and the two mixed tasks need their authors' metrics and are not here.
"""

from __future__ import annotations

import itertools
import json
import string
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from lowkey.core.options import shown
from lowkey.suites.fetching import Published, published_records
from lowkey.suites.files import Record
from lowkey.suites.hiding import fitted
from lowkey.suites.prompts import PROMPTS, PromptedTask, filled, templates
from lowkey.suites.sample import Source, Suite, SuiteSample, Turn

_TURNS = 5  # questions about a generated context
_LETTERS = ("A", "B", "C", "D")
_JSON = "Here is a JSON object.\n\n{context}"
_NAMES = "Here are strings.\n\n{context}"
_LIST = "Here is a list of numbers.\n\n{context}"
_TEXT = "Read this.\n\n{context}"


_TASKS = {
    "kv": PromptedTask(_JSON, "word", 150),
    "prefix_suffix": PromptedTask(_NAMES, "word", 150),
    "vt": PromptedTask(_TEXT, "string_match_all", 30),
    "mf": PromptedTask(_LIST, "first_number", 5),
    "many_shot": PromptedTask(_TEXT, "prefix", 10),
    "choice_eng": PromptedTask(_TEXT, "first_letter", 40),
    "qa_eng": PromptedTask(_TEXT, "contains", 40),
    "qa_chn": PromptedTask(_TEXT, "qa_f1_characters", 40),
    "summary": PromptedTask(_TEXT, "rouge_lsum", 200),
}
_Made = tuple[Callable[[int], str], list[tuple[str, str]]]  # a context of so many items, and the turns


def _word(rng: Random, letters: str = string.ascii_lowercase + string.digits, length: int = 12) -> str:
    return "".join(rng.choices(letters, k=length))


def _pairs(rng: Random) -> _Made:
    """Keys and values in an object of JSON; a turn asks for a value."""
    asked = [(_word(rng), _word(rng)) for _ in range(_TURNS)]
    others: list[tuple[str, str]] = []
    order = rng.random()

    def build(count: int) -> str:
        while len(others) < count:
            others.append((_word(rng), _word(rng)))
        pairs = asked + others[:count]
        Random(order).shuffle(pairs)
        return json.dumps(dict(pairs))

    return build, [(f'What is the value of "{key}"? Write the value alone.', value) for key, value in asked]


def _affixes(rng: Random) -> _Made:
    """Strings; a turn asks for the one with a beginning and an end."""
    asked = [_word(rng, length=20) for _ in range(_TURNS)]
    others: list[str] = []
    order = rng.random()

    def build(count: int) -> str:
        while len(others) < count:
            others.append(_word(rng, length=20))
        words = asked + others[:count]
        Random(order).shuffle(words)
        return "\n".join(words)

    words = "Which string begins with {} and ends with {}? Write the string alone."
    return build, [(words.format(word[:5], word[-5:]), word) for word in asked]


def _numbers(rng: Random) -> _Made:
    """Numbers; turns ask for the largest, the smallest and the most frequent one."""
    low, high, often = 3, rng.randrange(900, 1000), rng.randrange(100, 400)
    others: list[int] = []
    order = rng.random()

    def build(count: int) -> str:
        while len(others) < count:
            others.append(rng.randrange(low + 1, high))
        most = max(Counter(others[:count]).values(), default=0)
        numbers = [low, high, *others[:count], *[often] * (most + 1)]
        Random(order).shuffle(numbers)
        return str(numbers)

    asked = [
        ("largest number", high),
        ("smallest number", low),
        ("most frequent number", often),
        ("largest number", high),
        ("smallest number", low),
    ]
    return build, [(f"What is the {what} of the list? Write the number alone.", str(n)) for what, n in asked]


def _assignments(rng: Random) -> _Made:
    """Chains of assignments; a turn asks for the variables that have a value."""
    used: set[str] = set()

    def name() -> str:
        while (new := _word(rng, string.ascii_uppercase, 5)) in used:
            pass
        used.add(new)
        return new

    def chain() -> tuple[str, list[str], list[str]]:
        value, names = str(rng.randrange(10000, 100000)), [name() for _ in range(3)]
        lines = [f"VAR {names[0]} = {value}"]
        lines += [f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(names)]
        return value, names, lines

    chains = [chain() for _ in range(_TURNS)]
    others: list[str] = []
    order = rng.random()

    def build(count: int) -> str:
        while len(others) < count:
            others.extend(chain()[2])
        # lines of a chain keep their order, whatever stands between them
        lines = [line for _, _, own in chains for line in own]
        places = Random(order).sample(range(len(lines) + count), len(lines))
        text = dict(zip(sorted(places), lines, strict=True))
        rest = iter(others[:count])
        return "\n".join(text[i] if i in text else next(rest) for i in range(len(lines) + count))

    words = "Which variables have the value {}? Name all three."
    return build, [(words.format(value), "\n".join(names)) for value, names, _ in chains]


_GENERATED: dict[str, Callable[[Random], _Made]] = {
    "kv": _pairs,
    "prefix_suffix": _affixes,
    "vt": _assignments,
    "mf": _numbers,
}


def _published_file(task: str, folder: Path | None) -> Published | None:
    """Where the published file of a task is; None if the folder has none and the task can be generated."""
    names = (f"scbench_{task}.jsonl", f"{task}.jsonl", f"data/scbench_{task}.jsonl")
    place = Published(names, "microsoft/SCBench", f"scbench_{task}")
    if task not in _GENERATED or (folder and any((folder / name).exists() for name in names)):
        return place
    return None


def _asked(question: str) -> str:
    """A question in its turn."""
    return f"\n\nQuestion: {question}\nAnswer:"


def _answers(record: Record, turn: dict[str, Any], letters: dict[str, str]) -> tuple[str, ...]:
    """The answers of a turn as texts; with options, the letters of those that are right."""
    value = turn.get("answer")
    listed = value if isinstance(value, list) else [value]
    if not listed or not all(isinstance(v, str | int | float) and not isinstance(v, bool) for v in listed):
        raise record.refuse(f"an answer is {shown(value)} and must be a text, a number or a list of them")
    answers = tuple(str(v) for v in listed)
    if not letters:
        return answers
    right = tuple(letter for letter, option in letters.items() if option in answers or letter in answers)
    if not right:
        raise record.refuse(f"the answer {shown(value)} is not one of the options")
    return right


def _turn(record: Record, turn: Any, tokens: int) -> Turn:
    """A published turn."""
    if not isinstance(turn, dict) or not isinstance(turn.get("input"), str):
        raise record.refuse(f"a turn is {shown(turn)} and must have input and answer")
    options = turn.get("options") or []
    if not isinstance(options, list) or not all(isinstance(o, str) for o in options):
        raise record.refuse(f"options are {shown(options)} and must be a list of texts")
    letters = dict(zip(_LETTERS, options, strict=False))
    listed = "".join(f"\n{letter}. {option}" for letter, option in letters.items())
    return Turn(_asked(turn["input"] + listed), _answers(record, turn, letters), tokens, tuple(letters))


def _published(task: str, place: Published, source: Source, own: str) -> Iterator[tuple[str, list[Turn]]]:
    for record in published_records(f"scbench {task}", place, source):
        given = record.get("context")
        if isinstance(given, list) and all(isinstance(n, int | float) for n in given):
            given = str(given)  # a list of numbers
        if not isinstance(given, str) or not given.strip():
            raise record.refuse(f"context is {shown(given)} and must be a text or a list of numbers")
        turns = record.get("multi_turns")
        if not isinstance(turns, list) or not turns:
            raise record.refuse(f"multi_turns is {shown(turns)} and must be a list of turns")
        context = "".join(filled(own, {"context": given}))
        yield context, [_turn(record, turn, _TASKS[task].tokens) for turn in turns]


def _made(task: str, source: Source, own: str) -> Iterator[tuple[str, list[Turn]]]:
    tokens = _TASKS[task].tokens
    for number in range(source.cases):
        build, asked = _GENERATED[task](Random(f"{source.seed} scbench {task} {number}"))
        answers = [tuple(a.split("\n")) for _, a in asked]
        turns = [Turn(_asked(q), a, tokens) for (q, _), a in zip(asked, answers, strict=True)]

        def put(count: int, build: Callable[[int], str] = build) -> str:
            return "".join(filled(own, {"context": build(count)}))

        behind = "".join(turn.question for turn in turns)
        yield fitted(source, tokens * len(turns), behind, put, f"scbench {task}"), turns


def _samples(task: str, source: Source) -> Iterator[SuiteSample]:
    kind = _TASKS[task]
    own = templates(source.folder, PROMPTS).get(task, kind.prompt)
    place = _published_file(task, source.folder)
    cases = _made(task, source, own) if place is None else _published(task, place, source, own)
    for number, (context, (first, *further)) in enumerate(itertools.islice(cases, source.cases)):
        yield SuiteSample(
            suite="scbench",
            task=task,
            number=number,
            context=context,
            question=first.question,
            answers=first.answers,
            metric=kind.metric,
            tokens=kind.tokens,
            choices=first.choices,
            turns=tuple(further),
        )


SCBENCH = Suite(
    "several questions about one shared context; four tasks are generated",
    "2412.10319",
    tuple(_TASKS),
    _samples,
    tuple(_GENERATED),
    "`scbench_TASK.jsonl` with `context` and `multi_turns`, a list of `input`, `answer` and `options`",
)
