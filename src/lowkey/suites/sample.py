"""What a suite gives: samples with a context, a question about it and the answers that count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowkey.core.options import Checked, option


@dataclass(frozen=True)
class Turn:
    """A further question about the same context, asked after the answer to the one before.

    Args:
        question: the words.
        answers: answers that count as right.
        tokens: tokens that the answer takes at most.
        choices: the answers to choose from, where there are such.
    """

    question: str
    answers: tuple[str, ...]
    tokens: int
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class SuiteSample:
    """One case of a suite.

    The prompt is `context + question`, then the beginning of the model's turn, then `opening`. The context
    can be read, and compressed, before the question is known.

    Args:
        suite: name of the suite.
        task: name of the task in its suite.
        number: number of the case in its task, from 0.
        context: the text that is asked about; empty where there is nothing but a question.
        question: the words behind it, with the white space between the two.
        answers: answers that count as right.
        metric: how an answer is scored, a name of `METRICS`.
        tokens: tokens that the answer takes at most.
        opening: words that the answer begins with. They are given and not written by the model.
        choices: the answers to choose from, where there are such.
        stop: texts at which the answer ends.
        turns: further questions about the same context, in order, each scored like the first.
        meta: what else is known about the case, such as its language, its length or its difficulty;
            `cut` is the number of tokens that a context lost in its middle because the prompt was too long.
    """

    suite: str
    task: str
    number: int
    context: str
    question: str
    answers: tuple[str, ...]
    metric: str
    tokens: int
    opening: str = ""
    choices: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()
    meta: Mapping[str, str | int | float] = field(default_factory=dict)

    @property
    def asked(self) -> tuple[Turn, ...]:
        """All questions in order, the first and the further ones."""
        return Turn(self.question, self.answers, self.tokens, self.choices), *self.turns


@dataclass(frozen=True)
class Source(Checked):
    """What samples are made of.

    Args:
        tokenizer: the model's. Lengths are counted with it.
        length: tokens of the prompt, with the template around it, and of the answers together. Generated
            prompts are made as long; a longer sample of a file loses tokens in the middle of its context.
        cases: number of cases of each task at most.
        seed: seed of generated cases.
        texts: running texts by name, in which facts are hidden; empty for the embedded text.
        folder: a folder with the published files of a suite; None to generate, or to fetch from the hub.
        reserved: tokens that the chat template and the beginning-of-text token take.
    """

    tokenizer: Any
    length: int = option(4096, at_least=64, at_most=2**24)
    cases: int = option(20, at_least=1, at_most=10**6)
    seed: int = option(0, at_least=0)
    texts: Mapping[str, str] = option(default_factory=dict, any_text=True)
    folder: Path | None = option(None, any_text=True)
    reserved: int = option(0, at_least=0, at_most=2**20)

    def count(self, text: str) -> int:
        """The tokens of a text, without special tokens."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


@dataclass(frozen=True)
class Suite:
    """A suite.

    Args:
        summary: one line for the command line.
        source: arXiv id of the paper.
        tasks: names of its tasks.
        samples: called with a task and a source, gives the samples of the task.
        generated: tasks whose samples can be made without any file.
        files: what a folder of published files holds, for messages and pages.
    """

    summary: str
    source: str
    tasks: tuple[str, ...]
    samples: Callable[[str, Source], Iterator[SuiteSample]]
    generated: tuple[str, ...]
    files: str
