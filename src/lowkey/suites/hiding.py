"""Prompts of an exact length: facts hidden in running text, which is cut so that the tokenizer counts as many
tokens as are wanted.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowkey.core import text
from lowkey.core.errors import LowkeyError
from lowkey.core.options import shown
from lowkey.suites.sample import Source

_FILLERS = (" .", ".", "\n", " -")  # fill what is left of a length when no further piece fits
_SENTENCE_END = re.compile(r"[.!?][\"'\u2019\u201d)]*\s*$")
_MOST_FILLERS = 64
_MOST_PIECES = 64  # of filling for a token; pieces without text would never fill a context


@dataclass(frozen=True)
class Made:
    """A generated case.

    Args:
        context: the text that is asked about.
        question: the words behind it.
        opening: words that the answer begins with.
        answers: answers that count as right.
    """

    context: str
    question: str
    opening: str
    answers: tuple[str, ...]


Maker = Callable[[random.Random], Made]  # makes a case from random numbers


def running_text(source: Source) -> str:
    """The user's texts: the `.txt` files of the folder, those that were given, or the embedded text.

    Raises:
        LowkeyError: a file is empty or no text.
    """
    if source.folder is not None and source.folder.is_dir():
        found = sorted(source.folder.glob("*.txt"))
        if found:
            return "\n\n".join(text.read_text(path, "data-dir") for path in found)
    return "\n\n".join(source.texts.values()) or text.embedded_text("evaluation")


def words_of(running: str) -> list[str]:
    """The words of a text, each with the white space behind it. Line breaks inside a paragraph are spaces.

    Raises:
        LowkeyError: it has fewer than 50 words.
    """
    flowing = re.sub(r"[ \t]*\n[ \t]*\n\s*", "\n\n", running.strip())
    flowing = re.sub(r"(?<!\n)\n(?!\n)", " ", flowing)
    words = re.findall(r"\S+\s*", flowing + "\n\n")
    if len(words) < 50:
        raise LowkeyError(
            f"data: the text {shown(running)} has {len(words)} words; give one of some thousand"
        )
    return words


def stream_from(rng: random.Random, words: Sequence[str]) -> Callable[[int], list[str]]:
    """Running text from a random sentence on. Where the text ends, it begins anew.

    Args:
        rng: source of random numbers.
        words: of the text.

    Returns:
        Gives the first so many words.
    """
    starts = [0, *(i + 1 for i, word in enumerate(words[:-1]) if _SENTENCE_END.search(word))]
    start = rng.choice(starts)

    def first(count: int) -> list[str]:
        times = (start + count) // len(words) + 1
        return (list(words) * times)[start : start + count]

    return first


def woven(words: Sequence[str], facts: Sequence[str], depths: Sequence[float]) -> str:
    """Facts between the sentences of a text.

    Args:
        words: of the text, each with the white space behind it.
        facts: sentences.
        depths: where each fact stands, from 0 for the beginning to 1 for the end; the nearest end of a
            sentence is taken.
    """
    ends = [0, *(i + 1 for i, word in enumerate(words) if _SENTENCE_END.search(word))]
    places: dict[int, list[str]] = {}
    for fact, depth in sorted(zip(facts, depths, strict=True), key=lambda pair: pair[1]):
        wanted = depth * len(words)
        places.setdefault(min(ends, key=lambda end: abs(end - wanted)), []).append(fact)
    parts: list[str] = []
    for i in range(len(words) + 1):
        parts += [f"{fact} " for fact in places.get(i, ())]
        parts += words[i : i + 1]
    return "".join(parts).rstrip()


def fitted(
    source: Source,
    tokens: int,
    behind: str,
    build: Callable[[int], str],
    what: str,
    least: int = 0,
    argument: str = "length",
) -> str:
    """A context that makes the prompt exactly as long as the source wants it.

    Args:
        source: says how long, with which tokenizer.
        tokens: tokens of the answer, which count too.
        behind: what follows the context, without a template.
        build: gives a context with so many pieces of filling. It must get longer with their number.
        what: the suite and task, for messages.
        least: pieces without which a context is none.
        argument: what the length is called in messages.

    Returns:
        The longest context that fits, with dots behind it for what is left. The prompt is shorter than it
        should be only where the tokenizer joins each dot with what stands around it.

    Raises:
        LowkeyError: the length does not hold the prompt without any filling.
    """
    room = source.length - source.reserved - tokens

    def size(pieces: int) -> int:
        return source.count(build(pieces) + behind)

    if (smallest := size(least)) > room:
        needed = smallest + tokens + source.reserved
        raise LowkeyError(f"{argument} {source.length}: {what} takes at least {needed} tokens; give more")
    # Most pieces have a token or more, so few doublings find a number that is too large.
    low, high = least, max(least + 1, room // 8)
    while size(high) <= room and high < _MOST_PIECES * room:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= room else (low, middle)
    context = build(low)
    for filler in _FILLERS:
        for _ in range(_MOST_FILLERS):
            if source.count(context + filler + behind) > room:
                break
            context += filler
    return context
