"""RULER (arXiv:2404.06654): 13 tasks of any length, generated with the model's tokenizer.

The prompts are in our own words; the sentences that hide a fact are those of the paper. A published number
needs the published prompts: a folder with files of the authors' generator (`TASK.jsonl` or
`TASK/validation.jsonl`, with `input`, `outputs` and perhaps `answer_prefix`) is used where it has the task.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice
from random import Random

from lowkey.suites.files import Record, read_records
from lowkey.suites.hiding import Made, Maker
from lowkey.suites.ruler_counting import common_words, frequent_words, traced_variables
from lowkey.suites.ruler_needles import NEEDLES, hidden_needles
from lowkey.suites.ruler_questions import QUESTION_FILES, distracted_question
from lowkey.suites.sample import Source, Suite, SuiteSample

# Called with the task, the source and the tokens of an answer.
_MAKERS: dict[str, Callable[[str, Source, int], Maker]] = {
    **dict.fromkeys(NEEDLES, hidden_needles),
    "vt": traced_variables,
    "cwe": common_words,
    "fwe": frequent_words,
    **dict.fromkeys(QUESTION_FILES, distracted_question),
}
_TOKENS = dict.fromkeys(NEEDLES, 128) | {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
_METRICS = dict.fromkeys(_MAKERS, "string_match_all") | dict.fromkeys(QUESTION_FILES, "string_match_part")
# Where the question of a published prompt begins, and where its answer does.
_ASKS = re.compile(r"\s*\b(?:What (?:is|are) (?:all )?the special magic|Question:)")
_OPENS = re.compile(r"(?<=\?)\s+The special magic |\s+Answer:")


def _samples(task: str, source: Source) -> Iterator[SuiteSample]:
    tokens = _TOKENS[task]
    for number, made in enumerate(_cases(task, source, tokens)):
        yield SuiteSample(
            suite="ruler",
            task=task,
            number=number,
            context=made.context,
            question=made.question,
            opening=made.opening,
            answers=made.answers,
            metric=_METRICS[task],
            tokens=tokens,
        )


def _cases(task: str, source: Source, tokens: int) -> Iterator[Made]:
    """Cases from a file of the authors' generator if the folder has one, else our own."""
    for name in (f"{task}.jsonl", f"{task}/validation.jsonl"):
        if source.folder is not None and (path := source.folder / name).exists():
            yield from map(_published, islice(read_records(path, f"ruler {task}"), source.cases))
            return
    make = _MAKERS[task](task, source, tokens)
    for number in range(source.cases):
        # each case has random numbers of its own, so that a longer run begins with the cases of a shorter one
        yield make(Random(f"{source.seed} {task} {number}"))


def _published(record: Record) -> Made:
    """A record of the authors' generator. Its prompt is cut where the question begins."""
    prompt, answers = record.text("input"), record.texts("outputs")
    starts = list(_ASKS.finditer(prompt))
    if not starts:
        raise record.refuse("input has no question that RULER asks")
    context, asked = prompt[: starts[-1].start()], prompt[starts[-1].start() :]
    if "answer_prefix" in record.values:
        return Made(context, asked, record.text("answer_prefix", empty=True), answers)
    opens = list(_OPENS.finditer(asked))
    cut = opens[-1].start() if opens else len(asked)
    return Made(context, asked[:cut], asked[cut:], answers)


RULER = Suite(
    "13 tasks of any length: hidden facts, chains of variables, frequent words, questions",
    "2404.06654",
    tuple(_MAKERS),
    _samples,
    (*NEEDLES, "vt", "cwe", "fwe"),
    "`*.txt` to hide facts in; `squad.json` for qa_1 and `hotpotqa.json` for qa_2; or `TASK.jsonl` of the "
    "authors' generator, with `input` and `outputs`",
)
