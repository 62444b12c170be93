"""Where the context of a prompt ends and the question begins.

lm-eval hands a model one text. A splitter finds the place with the help of the document that the text was
made of. Names of tasks are lm-eval's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from lowkey.core.errors import LowkeyError

# Called with a document and a prompt: how many characters of the prompt are context; None if unknown.
Splitter = Callable[[Mapping[str, Any], str], int | None]
LABEL = re.compile(r"[\w \-]{0,40}[:.]? ?")  # words like `Question: ` in front of a field


def after(*fields: str) -> Splitter:
    """A splitter behind the last occurrence of a field.

    Args:
        fields: names of fields; the first one that the prompt holds counts.
    """

    def split(document: Mapping[str, Any], prompt: str) -> int | None:
        for name in fields:
            if (words := _words(document, name)) and (place := prompt.rfind(words)) >= 0:
                return place + len(words)
        return None

    return split


def before(*fields: str) -> Splitter:
    """A splitter before the last occurrence of a field and the label that stands in its line.

    What stands before it counts as context if it is longer than the question. Otherwise it is an instruction
    or the beginning of a chat template, and no examples.

    Args:
        fields: names of fields; the first one that the prompt holds counts.
    """

    def split(document: Mapping[str, Any], prompt: str) -> int | None:
        for name in fields:
            if (words := _words(document, name)) and (place := prompt.rfind(words)) >= 0:
                start = prompt.rfind("\n", 0, place) + 1
                start = start if LABEL.fullmatch(prompt[start:place]) else place
                return start if len(prompt[:start].strip()) > len(prompt[start:].strip()) else 0
        return None

    return split


def last_line(*beginnings: str) -> Splitter:
    """A splitter before the last line that begins with one of some words."""

    def split(document: Mapping[str, Any], prompt: str) -> int | None:
        found = max(prompt.rfind("\n" + words) for words in beginnings)
        return found + 1 if found >= 0 else None

    return split


def _words(document: Mapping[str, Any], name: str) -> str:
    """A field of a document that is text, without white space around it; empty for another."""
    value = document.get(name)
    return value.strip() if isinstance(value, str) else ""


# Fields with a text that is asked about, and fields with what is asked, in the order of preference.
CONTEXT_FIELDS = ("context", "passage", "article", "document", "story", "support", "haystack", "background")
QUESTION_FIELDS = (
    *("question", "query", "problem", "Problem", "goal", "question_stem", "prompt"),
    *("sentence", "premise", "ctx", "input", "text"),
)
BY_TASK: tuple[tuple[str, Splitter], ...] = (
    ("niah_*", last_line("What are", "What is")),
    ("ruler_vt", last_line("Question: Find all variables")),
    ("ruler_cwe", last_line("Question: What are the 10 most")),
    ("ruler_fwe", last_line("Question: Do not provide")),
    ("ruler_qa_*", last_line("Answer the question based on the given documents")),
    ("longbench_*", after("context")),
    ("longbench2_*", after("context")),
    ("babilong_*", after("input")),
    ("infinitebench_*", after("context")),
    ("libra_*", after("context")),
    ("scrolls_*", after("text", "input")),
    ("qasper_*", after("abstract")),
    ("gsm*", before("question")),
    ("mmlu*", before("question")),
    ("bbh*", before("input")),
)


def context_length(task: str, document: Mapping[str, Any] | None, prompt: str, scored: bool) -> int | None:
    """How many characters of a prompt are context.

    Args:
        task: name of the task.
        document: what the prompt was made of.
        prompt: the text that the model reads.
        scored: whether given continuations are scored, rather than an answer written.

    Returns:
        The number of characters; 0 if nothing stands before the question; None if continuations are scored
        and all of the prompt is context, since nothing stands before the question or no question was found.

    Raises:
        LowkeyError: an answer is to be written, and no split is known.
    """
    known = document if isinstance(document, Mapping) else {}
    named = [split for pattern, split in BY_TASK if fnmatchcase(task, pattern)]
    usual = (after(*CONTEXT_FIELDS), before(*QUESTION_FIELDS))
    for split in (*named, *usual):
        if (place := split(known, prompt)) is not None:
            return place or (None if scored else 0)
    if scored:
        return None
    raise LowkeyError(
        f"task {task!r}: where its context ends and its question begins is not known; give --protocol "
        f"ask-with, or a document with one of the fields {', '.join(CONTEXT_FIELDS[:4])}"
    )
