"""GSM8K (arXiv:2110.14168): word problems whose answer is a number.

The published file is `test.jsonl` with `question` and `answer`; the answer ends with `#### NUMBER`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from lowkey.suites import files
from lowkey.suites.sample import Source, Suite, SuiteSample

_MARK = "####"  # stands before the final number
_QUESTION = (
    "{problem}\n\nThink step by step. End with a line that holds four number signs and then the number only, "
    "like: #### 42"
)
_TOKENS = 512


def _samples(task: str, source: Source) -> Iterator[SuiteSample]:
    """The problems of `test.jsonl`, in its order. Raises: LowkeyError."""
    path = files.find_file(source.folder or Path(), ("test.jsonl", "gsm8k/test.jsonl"), "gsm8k")
    for number, record in enumerate(islice(files.read_records(path, "gsm8k"), source.cases)):
        worked = record.text("answer")
        mark, answer = worked.rpartition(_MARK)[1:]
        if not mark or not answer.strip():
            raise record.refuse(f"answer has no {_MARK!r} with a number behind it")
        yield SuiteSample(
            suite="gsm8k",
            task=task,
            number=number,
            context="",
            question=_QUESTION.format(problem=record.text("question")),
            answers=(answer.strip(),),
            metric="number",
            tokens=_TOKENS,
        )


GSM8K = Suite(
    "word problems whose answer is a number, for long answers",
    "2110.14168",
    ("gsm8k",),
    _samples,
    False,
    "`test.jsonl` with `question` and `answer`",
)
