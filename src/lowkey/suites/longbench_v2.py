"""LongBench v2 (arXiv:2412.15204): questions with four choices about texts of 8 thousand to 2 million words.

The published file is `data.json`, a list of records with `context`, `question`, `choice_A` to `choice_D`,
`answer`, `domain`, `difficulty` and `length`. The tasks here are its domains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from lowkey.suites.fetching import Published, published_records
from lowkey.suites.prompts import PROMPTS, filled, templates
from lowkey.suites.sample import Source, Suite, SuiteSample

_DOMAINS = {
    "single_document": "Single-Document QA",
    "multi_document": "Multi-Document QA",
    "in_context_learning": "Long In-context Learning",
    "dialogue": "Long-dialogue History Understanding",
    "code": "Code Repository Understanding",
    "structured": "Long Structured Data Understanding",
}
_LETTERS = ("A", "B", "C", "D")
# The last sentence of the authors' prompt asks for this very form, which their metric looks for.
_PROMPT = (
    "Read the text.\n\n{context}\n\nAnswer the question about it.\n\nQuestion: {question}\n(A) {choice_A}\n"
    '(B) {choice_B}\n(C) {choice_C}\n(D) {choice_D}\n\nAnswer like this: "The correct answer is (letter)".'
)
_TOKENS = 128
_MOST_RECORDS = 10**6


def _samples(task: str, source: Source) -> Iterator[SuiteSample]:
    place = Published(("data.json", "longbench_v2.json", "data.jsonl"), "THUDM/LongBench-v2", split="train")
    own = templates(source.folder, PROMPTS).get(task, _PROMPT)
    names = {domain: name for name, domain in _DOMAINS.items()}

    def mine() -> Iterator[SuiteSample]:
        every = replace(source, cases=_MOST_RECORDS)
        for record in published_records("longbench_v2", place, every):
            domain = record.text("domain")
            if domain not in names:
                raise record.refuse(f"domain {domain[:40]!r} is not one of {', '.join(names)}")
            answer = record.text("answer")
            if answer not in _LETTERS:
                raise record.refuse(f"answer is {answer[:40]!r} and must be A, B, C or D")
            if names[domain] != task:
                continue
            wanted = ("context", "question", *(f"choice_{letter}" for letter in _LETTERS))
            context, question = filled(own, {name: record.text(name) for name in wanted})
            yield SuiteSample(
                suite="longbench_v2",
                task=task,
                number=0,
                context=context,
                question=question,
                answers=(answer,),
                metric="letter",
                tokens=_TOKENS,
                choices=_LETTERS,
                meta={"difficulty": record.text("difficulty"), "length": record.text("length")},
            )

    for number, sample in enumerate(islice(mine(), source.cases)):
        yield replace(sample, number=number)


LONGBENCH_V2 = Suite(
    "503 questions with four choices about long texts, in six domains",
    "2412.15204",
    tuple(_DOMAINS),
    _samples,
    (),
    "`data.json`, a list with `context`, `question`, `choice_A` to `choice_D`, `answer`, `domain`",
)
