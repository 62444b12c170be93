"""InfiniteBench (arXiv:2402.13718): texts of more than 100 thousand tokens.

The published files are `TASK.jsonl` with `context`, `input`, `answer` and `options`.
"""

from __future__ import annotations

from collections.abc import Iterator

from lowkey.suites.fetching import Published, published_records
from lowkey.suites.files import Record
from lowkey.suites.prompts import PROMPTS, PromptedTask, filled, templates
from lowkey.suites.sample import Source, Suite, SuiteSample

_LETTERS = ("A", "B", "C", "D")
_HIDDEN = "One thing in this text matters. Remember it.\n\n{context}\n\n{input}"
_PAIRS = "Here is a JSON object.\n\n{context}\n\n{input}"
_BOOK = "Read the book.\n\n{context}\n\nAnswer in a few words.\n\nQuestion: {input}\nAnswer:"
_CHOICE = (
    "Read the book.\n\n{context}\n\nQuestion: {input}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n\nAnswer with the "
    "letter alone.\n\nAnswer:"
)
_SUMMARY = "Read the book.\n\n{context}\n\nWrite a summary of it.\n\nSummary:"
_CHINESE = "阅读以下书籍。\n\n{context}\n\n请简短回答。\n\n问题：{input}\n回答："
_SCRIPT = (
    "Read the dialogue. A name in it is replaced by $$MASK$$.\n\n{context}\n\nWhose name is it? Answer with "
    "the name alone.\n\nAnswer:"
)
_DEBUG = (
    "One function of this code has a mistake that makes it fail.\n\n{context}\n\nWhich one?\nA. {A}\nB. {B}\n"
    "C. {C}\nD. {D}\n\nAnswer with the letter alone.\n\nAnswer:"
)
_RUN = "Here is a module of Python.\n\n{context}\n\n{input} Answer with the number alone.\n\nAnswer:"
_FIND = "{input}\n\n{context}\n\n{input} Answer with the number alone.\n\nAnswer:"
_CALC = (
    "Compute the expression step by step, and write the value after each operation.\n\n{context}\n\nThe "
    "values, separated by spaces:"
)


_TASKS = {
    "passkey": PromptedTask(_HIDDEN, "first_integer", 6),
    "number_string": PromptedTask(_HIDDEN, "first_integer", 12),
    "kv_retrieval": PromptedTask(_PAIRS, "word", 50),
    "longbook_sum_eng": PromptedTask(_SUMMARY, "rouge_lsum", 1200),
    "longbook_choice_eng": PromptedTask(_CHOICE, "first_letter", 40),
    "longbook_qa_eng": PromptedTask(_BOOK, "qa_f1", 40),
    "longbook_qa_chn": PromptedTask(_CHINESE, "qa_f1_characters", 40),
    "longdialogue_qa_eng": PromptedTask(_SCRIPT, "contains", 40),
    "code_debug": PromptedTask(_DEBUG, "first_letter", 5),
    "code_run": PromptedTask(_RUN, "last_integer", 5),
    "math_find": PromptedTask(_FIND, "first_number", 3),
    "math_calc": PromptedTask(_CALC, "number_prefix", 30000),
}


def _texts(record: Record, name: str) -> tuple[str, ...]:
    """A field that is a text, a number or a list of them, as texts."""
    value = record.get(name)
    listed = value if isinstance(value, list) else [value]
    if listed and isinstance(listed[0], list):  # math_calc has a list in a list
        listed = listed[0]
    if not listed or not all(isinstance(v, str | int | float) and not isinstance(v, bool) for v in listed):
        raise record.refuse(f"{name} must be a text, a number or a list of them")
    return tuple(str(v) for v in listed)


def _answers(task: str, record: Record) -> tuple[tuple[str, ...], dict[str, str]]:
    """The answers of a record, and its options by letter."""
    answers = _texts(record, "answer")
    if _TASKS[task].metric != "first_letter":
        return answers, {}
    options = record.texts("options")
    if len(options) != len(_LETTERS):
        raise record.refuse(f"has {len(options)} options instead of {len(_LETTERS)}")
    # The answer is the text of an option; code_debug gives its letter, too.
    right = [letter for letter, option in zip(_LETTERS, options, strict=True) if option in answers]
    if not right:
        raise record.refuse("its answer is not one of its options")
    return tuple(right), dict(zip(_LETTERS, options, strict=True))


def _samples(task: str, source: Source) -> Iterator[SuiteSample]:
    kind, own = _TASKS[task], templates(source.folder, PROMPTS)
    place = Published(
        (f"{task}.jsonl", f"data/{task}.jsonl"), "xinrongzhang2022/InfiniteBench", "default", task
    )
    for number, record in enumerate(published_records(f"infinitebench {task}", place, source)):
        answers, options = _answers(task, record)
        given = record.get("context")
        text = str(given) if isinstance(given, list) else record.text("context")  # a list of numbers
        fields = {"context": text, "input": record.text("input", empty=True), **options}
        context, question = filled(own.get(task, kind.prompt), fields)
        yield SuiteSample(
            suite="infinitebench",
            task=task,
            number=number,
            context=context,
            question=question,
            answers=answers,
            metric=kind.metric,
            tokens=kind.tokens,
            choices=tuple(options),
        )


INFINITEBENCH = Suite(
    "12 tasks on texts of more than 100 thousand tokens",
    "2402.13718",
    tuple(_TASKS),
    _samples,
    (),
    "`TASK.jsonl` with `context`, `input`, `answer`, `options`",
)
