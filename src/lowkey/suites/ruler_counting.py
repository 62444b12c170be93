"""RULER's tasks that need the whole context: variables traced through assignments, and words counted."""

from __future__ import annotations

import itertools
import string
from random import Random

from lowkey.suites.hiding import Made, Maker, fitted, stream_from, woven
from lowkey.suites.key_words import single_words
from lowkey.suites.ruler_needles import NOISE_PASSAGE
from lowkey.suites.sample import Source

_HOPS = 4  # assignments after the first one
_COMMON, _COMMON_TIMES, _OTHER_TIMES = 10, 30, 3  # words that are asked for, how often they and others stand
_FREQUENT, _ALPHA, _CODED_LETTERS = 3, 2.0, 6
_LEAST_CODED = 60  # coded words, of which the fourth stands less often than the third
_TRACE = "Follow the chains of assignments to variables that are hidden in this text.\n\n"
_TRACE_QUESTION = (
    "\n\nQuestion: Name all variables that have the value {value} in the text above. They are {count} "
    "variables."
)
_TRACE_OPENING = " Answer: By the assignments of the text, the variables with the value {value} are:"
_COMMON_INTRODUCTION = "This is a numbered list of words. Some of them are more common in it than others.\n\n"
_COMMON_QUESTION = "\n\nQuestion: Which 10 words are the most common ones in the list above?"
_COMMON_OPENING = " Answer: The 10 most common words in the list are:"
_FREQUENT_INTRODUCTION = "This is a text of coded words. Find those that stand there most often.\n\n"
_FREQUENT_QUESTION = (
    "\n\nQuestion: Which three coded words stand most often in the text above? Do not count the dots '....'."
)
_FREQUENT_OPENING = " Answer: The three most frequent words of the coded text are:"


def traced_variables(task: str, source: Source, tokens: int) -> Maker:
    """Makes cases of `vt`: a chain of assignments in a text; for the arguments see `hidden_needles`."""
    passage = [f"{word} " for word in NOISE_PASSAGE.split()]

    def make(rng: Random) -> Made:
        names: list[str] = []
        while len(names) <= _HOPS:
            name = "".join(rng.choices(string.ascii_uppercase, k=5))
            names += [name] if name not in names else []
        value = str(rng.randrange(10000, 100000))
        chain = [f"VAR {names[0]} = {value}."]
        chain += [f"VAR {new} = VAR {old}." for old, new in itertools.pairwise(names)]
        depths = sorted(rng.random() for _ in chain)
        question = _TRACE_QUESTION.format(value=value, count=len(names))
        opening = _TRACE_OPENING.format(value=value)
        first = stream_from(rng, passage)

        def build(count: int) -> str:
            return _TRACE + woven(first(count), chain, depths)

        context = fitted(source, tokens, question + opening, build, f"ruler {task}")
        return Made(context, question, opening, tuple(names))

    return make


def common_words(task: str, source: Source, tokens: int) -> Maker:
    """Makes cases of `cwe`: ten words that stand 30 times each among words that stand three times. For the
    arguments see `hidden_needles`.
    """
    # A length below 4096 does not hold 300 common words among others: then each stands fewer times.
    room = source.length - source.reserved - tokens
    times = max(_OTHER_TIMES + 1, min(_COMMON_TIMES, room // 100))

    def make(rng: Random) -> Made:
        drawn = single_words(rng)
        common = list(itertools.islice(drawn, _COMMON))
        others: list[str] = []
        order = rng.random()

        def build(count: int) -> str:
            while len(others) * _OTHER_TIMES < count:
                others.append(next(drawn))
            listed = common * times + [word for word in others for _ in range(_OTHER_TIMES)][:count]
            Random(order).shuffle(listed)
            return _COMMON_INTRODUCTION + " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))

        context = fitted(source, tokens, _COMMON_QUESTION + _COMMON_OPENING, build, f"ruler {task}")
        return Made(context, _COMMON_QUESTION, _COMMON_OPENING, tuple(common))

    return make


def frequent_words(task: str, source: Source, tokens: int) -> Maker:
    """Makes cases of `fwe`: coded words whose frequencies fall as a power of their rank (Zipf), below the
    dots, the most frequent word of all. For the arguments see `hidden_needles`.
    """
    size = max(8, (source.length - tokens) // 50)
    weights = [1 / rank**_ALPHA for rank in range(1, size + 2)]
    total = sum(weights)

    def make(rng: Random) -> Made:
        coded: list[str] = []
        while len(coded) < size:
            word = "".join(rng.choices(string.ascii_lowercase, k=_CODED_LETTERS))
            coded += [word] if word not in coded else []
        order = rng.random()

        def build(count: int) -> str:
            # Shares are exact and not drawn, so the words that are asked for differ in frequency.
            ranked = zip(["....", *coded], weights, strict=True)
            words = [word for word, weight in ranked for _ in range(round(count * weight / total))]
            Random(order).shuffle(words)
            return _FREQUENT_INTRODUCTION + " ".join(words)

        behind = _FREQUENT_QUESTION + _FREQUENT_OPENING
        context = fitted(source, tokens, behind, build, f"ruler {task}", least=_LEAST_CODED)
        return Made(context, _FREQUENT_QUESTION, _FREQUENT_OPENING, tuple(coded[:_FREQUENT]))

    return make
