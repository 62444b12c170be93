"""Problems with an exact answer, which are solved by writing: GSM8K (arXiv:2110.14168), MATH
(arXiv:2103.03874) and the problems of the AIME.

They have no context: what is compressed is what the model itself wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from lowkey.suites.fetching import Published, published_records
from lowkey.suites.files import Record
from lowkey.suites.sample import Source, Suite, SuiteSample

_MARK = "####"  # stands before the final number of GSM8K
_BOXED = "\\boxed{"
_GSM8K_QUESTION = (
    "{problem}\n\nThink step by step. End with a line that holds four number signs and then the number only, "
    "like: #### 42"
)
_MATH_QUESTION = "{problem}\n\nThink step by step, and put the final answer inside \\boxed{{}}."
_AIME_QUESTION = (
    "{problem}\n\nThink step by step. The answer is a whole number from 0 to 999; put it inside \\boxed{{}}."
)
_GSM8K_FILE = Published(("test.jsonl", "gsm8k/test.jsonl"), "openai/gsm8k", "main")
_MATH_FILE = Published(("math500.jsonl", "test.jsonl", "math/test.jsonl"), "HuggingFaceH4/MATH-500")
_AIME_FILES = {
    "aime24": Published(("aime24.jsonl", "aime_2024.jsonl"), "HuggingFaceH4/aime_2024", split="train"),
    "aime25": Published(("aime25.jsonl", "aime_2025.jsonl"), "math-ai/aime25"),
}
_TOKENS = {"gsm8k": 512, "math": 2048, "aime24": 8192, "aime25": 8192}


def _solved(suite: str, task: str, number: int, words: str, answer: str, record: Record) -> SuiteSample:
    """A problem with its answer."""
    level = record.values.get("level", record.values.get("difficulty"))
    return SuiteSample(
        suite=suite,
        task=task,
        number=number,
        context="",
        question=words.format(problem=record.text("question" if suite == "gsm8k" else "problem")),
        answers=(answer,),
        metric="math" if suite == "math" else "number",
        tokens=_TOKENS[task],
        meta={"level": level} if isinstance(level, int | str) else {},
    )


def _gsm8k(task: str, source: Source) -> Iterator[SuiteSample]:
    for number, record in enumerate(published_records("gsm8k", _GSM8K_FILE, source)):
        mark, answer = record.text("answer").rpartition(_MARK)[1:]
        if not mark or not re.fullmatch(r"-?[\d,]+(\.\d+)?", answer.strip()):
            raise record.refuse(f"answer does not end with {_MARK!r} and a number")
        yield _solved("gsm8k", task, number, _GSM8K_QUESTION, answer.strip(), record)


def _math(task: str, source: Source) -> Iterator[SuiteSample]:
    for number, record in enumerate(published_records("math", _MATH_FILE, source)):
        # the first publication has the answer in the solution only
        given = "answer" in record.values
        answer = record.text("answer") if given else boxed(record.text("solution")) or ""
        if not answer:
            raise record.refuse("has no answer, and its solution has no \\boxed{}")
        yield _solved("math", task, number, _MATH_QUESTION, answer, record)


def _aime(task: str, source: Source) -> Iterator[SuiteSample]:
    for number, record in enumerate(published_records(f"aime {task}", _AIME_FILES[task], source)):
        answer = str(record.get("answer")).strip()
        if not re.fullmatch(r"\d{1,3}", answer):
            raise record.refuse("answer is no whole number from 0 to 999")
        yield _solved("aime", task, number, _AIME_QUESTION, answer, record)


def boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{...}` of a text, braces inside it included; None without one."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth, begin = 1, start + len(_BOXED)
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[begin:i]
    return None


GSM8K = Suite(
    "word problems of primary school whose answer is a number",
    "2110.14168",
    ("gsm8k",),
    _gsm8k,
    (),
    "`test.jsonl` with `question` and `answer`",
)
MATH = Suite(
    "competition problems whose answer is a formula or a number",
    "2103.03874",
    ("math",),
    _math,
    (),
    "`math500.jsonl` or `test.jsonl` with `problem` and `answer` or `solution`",
)
AIME = Suite(
    "problems of the AIME, whose answers are whole numbers up to 999",
    "",
    tuple(_AIME_FILES),
    _aime,
    (),
    "`aime24.jsonl`, `aime25.jsonl` with `problem` and `answer`",
)
