"""LooGLE (arXiv:2311.04939): questions about long documents, whose evidence stands near or far apart.

The published files are `TASK.jsonl` with `input`, `title` and `qa_pairs`, or one question a line with
`context`, `question` and `answer`. The metrics are those that need no other model.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import islice
from typing import Any

from lowkey.core import files
from lowkey.core.options import shown
from lowkey.suites.fetching import Published, published_records
from lowkey.suites.files import Record
from lowkey.suites.prompts import PROMPTS, filled, templates
from lowkey.suites.sample import Source, Suite, SuiteSample

_QA = "Read the document.\n\n{context}\n\nAnswer the question briefly.\n\nQuestion: {question}\nAnswer:"
_CLOZE = (
    "Read the document.\n\n{context}\n\nNames in this sentence are replaced by <mask-0>, <mask-1> and so on. "
    "Write a line for each, like: <mask-0>: name\n\n{question}\n"
)
_SUMMARY = "Read the document.\n\n{context}\n\nWrite a summary of it.\n\nSummary:"
_PROMPTS = {
    "shortdep_qa": _QA,
    "shortdep_cloze": _CLOZE,
    "longdep_qa": _QA,
    "longdep_summarization": _SUMMARY,
}
_TOKENS = {"shortdep_qa": 300, "shortdep_cloze": 50, "longdep_qa": 500, "longdep_summarization": 500}


def _pairs(task: str, record: Record) -> Iterator[tuple[str, tuple[str, ...], dict[str, str | int | float]]]:
    """Question, answers and further knowledge of each pair of a record."""
    if "qa_pairs" not in record.values:  # one question a line
        yield (
            record.text("question", empty=task == "longdep_summarization"),
            _answers(task, record, record.get("answer")),
            {},
        )
        return
    if task == "longdep_summarization":
        yield "", (record.text("output"),), {}
        return
    listed = record.get("qa_pairs")
    if isinstance(listed, str):  # the data set on the hub has the list as text
        listed = _parsed(listed, record)
    if not isinstance(listed, list) or not listed:
        raise record.refuse(f"qa_pairs is {shown(listed)} and must be a list of pairs")
    for pair in listed:
        if not isinstance(pair, dict) or not isinstance(pair.get("Q"), str) or "A" not in pair:
            raise record.refuse(f"a pair is {shown(pair)} and must have Q and A")
        kind = pair.get("type")
        yield pair["Q"], _answers(task, record, pair["A"]), {"type": kind} if isinstance(kind, str) else {}


def _parsed(listed: str, record: Record) -> Any:
    """A list that was written as text, by Python or as JSON."""
    try:
        return files.parse_json(listed)
    except ValueError:
        pass
    try:
        return ast.literal_eval(listed)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise record.refuse("qa_pairs is text that is no list") from None


def _answers(task: str, record: Record, answer: Any) -> tuple[str, ...]:
    """The answer as texts; of a cloze, `<mask-0>: name` for each mask."""
    if task == "shortdep_cloze":
        if isinstance(answer, str):
            answer = _parsed(answer, record)
        if not isinstance(answer, dict) or not answer or not all(isinstance(v, str) for v in answer.values()):
            raise record.refuse(f"the answer of a cloze is {shown(answer)} and must give a name by mask")
        return tuple(f"{mask}: {name}" for mask, name in answer.items())
    if not isinstance(answer, str) or not answer.strip():
        raise record.refuse(f"an answer is {shown(answer)} and must be a text that is not empty")
    return (answer,)


def _samples(task: str, source: Source) -> Iterator[SuiteSample]:
    own = templates(source.folder, PROMPTS).get(task, _PROMPTS[task])
    place = Published((f"{task}.jsonl", f"data/{task}.jsonl"), "bigai-nlco/LooGLE", task)
    every = (
        (record, pair)
        for record in published_records(f"loogle {task}", place, source)
        for pair in _pairs(task, record)
    )
    for number, (record, (question, answers, meta)) in enumerate(islice(every, source.cases)):
        document = record.text("input" if "input" in record.values else "context")
        context, asked = filled(own, {"context": document, "question": question})
        yield SuiteSample(
            suite="loogle",
            task=task,
            number=number,
            context=context,
            question=asked,
            answers=answers,
            metric="masks" if task == "shortdep_cloze" else "rouge_l",
            tokens=_TOKENS[task],
            meta=meta,
        )


LOOGLE = Suite(
    "questions, gaps and summaries of long documents",
    "2311.04939",
    tuple(_PROMPTS),
    _samples,
    (),
    "`TASK.jsonl` with `input` and `qa_pairs`, or with `context`, `question` and `answer`",
)
