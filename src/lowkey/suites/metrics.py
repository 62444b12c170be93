"""Scores of answers, from 0 for wrong to 1 for right, as the suites publish them.

A metric takes what was said and the question with its answers. Where a question has several right answers,
the best one counts, unless the metric says otherwise.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from lowkey.core.errors import LowkeyError
from lowkey.suites.maths import boxed
from lowkey.suites.sample import SuiteSample, Turn

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_LETTER_SENTENCE = re.compile(r"correct answer is\s*\(?([A-D])\b")
_EXTRA = "run pip install 'lowkey[eval]'"


def scored(sample: SuiteSample, said: str, turn: int = 0) -> float:
    """The score of an answer.

    Args:
        sample: the case.
        said: what the model wrote, without the opening.
        turn: number of the question, 0 for the first.

    Returns:
        From 0 to 1.

    Raises:
        LowkeyError: the library that computes the metric is not there.
    """
    for stop in sample.stop:
        said = said.partition(stop)[0] if said.strip() else said
    return float(METRICS[sample.metric](said, sample.asked[turn]))


# -- strings, as RULER compares them


def _string_match_all(said: str, turn: Turn) -> float:
    """Share of the answers that stand in what was said, in any case of letters (RULER)."""
    return sum(answer.lower() in said.lower() for answer in turn.answers) / len(turn.answers)


def _string_match_part(said: str, turn: Turn) -> float:
    """Whether one of the answers stands in what was said, in any case of letters (RULER)."""
    return max(float(answer.lower() in said.lower()) for answer in turn.answers)


# -- words, as SQuAD and LongBench compare them


def _f1(said: Sequence[str], answer: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, each as often as it stands there."""
    common = sum((Counter(said) & Counter(answer)).values())
    return 2 * common / (len(said) + len(answer)) if common else 0.0


def _plain_words(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _qa_f1(said: str, turn: Turn) -> float:
    """F1 of words (LongBench, InfiniteBench)."""
    return max(_f1(_plain_words(said), _plain_words(answer)) for answer in turn.answers)


def _plain_characters(text: str) -> str:
    """Characters in lower case, without white space, punctuation and symbols of any script."""
    return "".join(c for c in text.lower() if not c.isspace() and unicodedata.category(c)[0] not in "PS")


def _qa_f1_characters(said: str, turn: Turn) -> float:
    """F1 of characters, for Chinese (InfiniteBench)."""
    return max(_f1(_plain_characters(said), _plain_characters(answer)) for answer in turn.answers)


def _chinese_words(text: str) -> list[str]:
    """Words of a Chinese text, as the library jieba divides it."""
    return [word for word in _library("jieba", "pip install jieba").cut(text, cut_all=False) if word.strip()]


def _qa_f1_words_zh(said: str, turn: Turn) -> float:
    """F1 of Chinese words (LongBench)."""

    def words(text: str) -> list[str]:
        return [plain for word in _chinese_words(text) if (plain := _plain_characters(word))]

    return max(_f1(words(said), words(answer)) for answer in turn.answers)


# -- summaries


class _Words:
    """A tokenizer for the library of ROUGE that takes the words of a text as they are."""

    def tokenize(self, text: str) -> list[str]:
        """Words between white space."""
        return text.split()


def _rouge(said: str, turn: Turn, kind: str, tokenizer: _Words | None = None) -> float:
    """F1 of the longest common subsequence of words, by the library rouge_score."""
    scorer = _library("rouge_score.rouge_scorer", _EXTRA).RougeScorer([kind], tokenizer=tokenizer)
    return max(float(scorer.score(answer, said)[kind].fmeasure) for answer in turn.answers)


def _rouge_l(said: str, turn: Turn) -> float:
    """ROUGE-L (LongBench, LooGLE). The library that LongBench uses counts each word once."""
    return _rouge(said, turn, "rougeL")


def _rouge_lsum(said: str, turn: Turn) -> float:
    """ROUGE-L line by line (InfiniteBench, SCBench)."""
    return _rouge(said, turn, "rougeLsum")


def _rouge_l_zh(said: str, turn: Turn) -> float:
    """ROUGE-L of Chinese words (LongBench)."""
    divided = Turn(turn.question, tuple(" ".join(_chinese_words(a)) for a in turn.answers), turn.tokens)
    return _rouge(" ".join(_chinese_words(said)), divided, "rougeL", _Words())


# -- classes, paragraphs and code, as LongBench compares them


def _classification(said: str, turn: Turn) -> float:
    """1 / n if the right class is one of the n classes that were named, else 0. A class whose name is a part
    of the right one does not count as named.
    """

    def of(answer: str) -> float:
        named = [c for c in turn.choices if c in said and (c not in answer or c == answer)]
        return 1 / len(named) if answer in named else 0.0

    return max(of(answer) for answer in turn.answers)


def _count(said: str, turn: Turn) -> float:
    """Share of the numbers that were said which are the right one."""
    numbers = re.findall(r"\d+", said)
    return max(numbers.count(answer.strip()) / len(numbers) if numbers else 0.0 for answer in turn.answers)


def _paragraph(said: str, turn: Turn, word: str) -> float:
    """Share of the numbers that were said which are that of the right paragraph."""
    right = [match for answer in turn.answers if (match := re.search(rf"{word}\s*(\d+)", answer))]
    if not right:
        return 0.0
    return max(_count(said, Turn("", (match[1],), 1)) for match in right)


def _code_sim(said: str, turn: Turn) -> float:
    """Similarity of the first line of code with the right one, by the edits that part them: 1 for equal."""
    lines = (line for line in said.lstrip("\n").split("\n") if not re.search(r"`|#|//", line))
    line = next(lines, "")
    ratio = _library("rapidfuzz.fuzz", _EXTRA).ratio
    return max(float(ratio(line, answer)) / 100 for answer in turn.answers)


def _first_line(metric: Callable[[str, Turn], float]) -> Callable[[str, Turn], float]:
    """A metric of the first line alone, since a model goes on with further examples (LongBench)."""
    return lambda said, turn: metric(said.lstrip("\n").split("\n")[0], turn)


# -- choices and words, as InfiniteBench and LongBench v2 compare them


def _letter(said: str, turn: Turn) -> float:
    """Whether the letter is right in "The correct answer is (A)" (LongBench v2)."""
    found = _LETTER_SENTENCE.search(said.replace("*", ""))
    return float(found is not None and found[1] in turn.answers)


def _first_letter(said: str, turn: Turn) -> float:
    """Whether the letter of a choice is right: the first character, one behind "answer is", or the first that
    stands alone (InfiniteBench).
    """
    said = said.strip()
    letters = "".join(turn.choices)
    if said[:1] and said[0] in letters:
        return float(said[0] in turn.answers)
    plain = re.sub(r"[\s\"'.,?!{}()*]+", " ", said)
    told = re.search(rf"(?:answer is:?|answer:|option is) ?([{letters}])\b", plain)
    alone = next((word for word in plain.split() if len(word) == 1 and word in letters), "")
    return float((told[1] if told else alone) in turn.answers)


def _word(said: str, turn: Turn) -> float:
    """Whether the answer is one of the words that were said, marks put aside (InfiniteBench)."""
    words = re.sub(r"[\n:\"'.,?!{}]", " ", said).split()
    return float(any(answer in words for answer in turn.answers))


def _contains(said: str, turn: Turn) -> float:
    """Whether one of the answers stands in what was said, in any case of letters (InfiniteBench)."""
    return float(any(answer.upper() in said.upper() for answer in turn.answers))


def _prefix(said: str, turn: Turn) -> float:
    """Whether what was said begins with an answer."""
    return float(any(said.strip().startswith(answer.strip()) for answer in turn.answers))


def _label(said: str, turn: Turn) -> float:
    """Whether the first sentence names the right label and no other one that the question does not name
    (BABILong).
    """
    first = re.split(r"[.\n]", said.strip().lower())[0]
    answers = {part for answer in turn.answers for part in re.split(r"[,\s]+", answer.lower()) if part}
    others = {choice.lower() for choice in turn.choices} - answers
    asked = {choice for choice in others if _whole_word(choice, turn.question.lower())}
    return float(
        all(_whole_word(answer, first) for answer in answers)
        and not any(_whole_word(choice, first) for choice in others - asked)
    )


def _whole_word(word: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text) is not None


def _masks(said: str, turn: Turn) -> float:
    """Share of the masks whose name stands on a line with the mask (LooGLE)."""
    lines = [line.strip().lower() for line in said.strip().split("\n") if line.strip()]
    right = 0
    for answer in turn.answers:
        mask, name = (part.strip().lower() for part in answer.split(":", 1))
        right += any(mask in line and name in line for line in lines)
    return right / len(turn.answers)


# -- numbers


def _integers(said: str) -> list[str]:
    return re.findall(r"\d+", said)


def _first_integer(said: str, turn: Turn) -> float:
    """Whether the first digits that were said are the answer (InfiniteBench)."""
    return float(any(_integers(said)[:1] == [answer] for answer in turn.answers))


def _last_integer(said: str, turn: Turn) -> float:
    """Whether the last word is the right whole number (InfiniteBench)."""
    words = re.sub(r"[\n.`'\":]", " ", said).split()
    value = _decimal(words[-1]) if words else None
    return float(value is not None and any(value == _decimal(answer) for answer in turn.answers))


def _first_number(said: str, turn: Turn) -> float:
    """Whether the first number that was said is the right one (InfiniteBench)."""
    found = re.search(r"-?\d+(?:\.\d+)?", said)
    value = _decimal(found[0]) if found else None
    return float(value is not None and any(value == _decimal(answer) for answer in turn.answers))


def _number_prefix(said: str, turn: Turn) -> float:
    """Share of the values in order that are right up to the first wrong one (InfiniteBench)."""
    right = 0
    for value, wanted in zip(_integers(said), turn.answers, strict=False):
        if _decimal(value) != _decimal(wanted):
            break
        right += 1
    return right / len(turn.answers)


def _decimal(written: str) -> Decimal | None:
    """A number as it is written, with thousands separated or a dollar sign; None for anything else."""
    try:
        value = Decimal(written.replace(",", "").replace("$", "").strip())
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def _number(said: str, turn: Turn) -> float:
    """Whether the final number is right: in the last box, behind the last "####", or the last number that was
    said (GSM8K, AIME).
    """
    final = boxed(said)
    if final is None and "####" in said:
        final = said.rpartition("####")[2]
    for text in (final, said):
        found = _NUMBER.findall(text or "")
        if found:
            # behind a mark the first number counts, of a whole text the last one
            value = _decimal(found[0] if text is final else found[-1])
            return float(value is not None and any(value == _decimal(answer) for answer in turn.answers))
    return 0.0


def _math(said: str, turn: Turn) -> float:
    """Whether the formula in the last box is the answer, written alike (MATH). Without a box, what stands
    behind the last "answer is" counts.
    """
    final = boxed(said)
    if final is None:
        final = re.split(r"answer is:?", said)[-1].strip().split("\n")[0].rstrip(".")
    return float(any(_formula(final) == _formula(answer) for answer in turn.answers))


def _formula(written: str) -> str:
    """A formula in one of the ways to write it, after the rules of the authors of MATH."""
    text = written.strip().strip("$").replace("\\!", "").replace("\\,", "").replace("\\ ", "")
    for name in ("\\left", "\\right", "\\%", "%", "^\\circ", "^{\\circ}", "\\$"):
        text = text.replace(name, "")
    text = re.sub(r"\\(?:text|mathrm|mbox)\{ *([^{}]*?) *\}", r"\1", text)
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", text.replace(" ", ""))
    text = re.sub(r"^[a-z]=", "", text)
    value = _decimal(text)
    return text if value is None else str(value.normalize())


def _library(name: str, remedy: str) -> Any:
    """A library that computes a metric. Raises: LowkeyError."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise LowkeyError(f"metric: needs the library {name.split('.')[0]}; {remedy}") from None


METRICS: dict[str, Callable[[str, Turn], float]] = {
    "string_match_all": _string_match_all,
    "string_match_part": _string_match_part,
    "qa_f1": _qa_f1,
    "qa_f1_line": _first_line(_qa_f1),
    "qa_f1_characters": _qa_f1_characters,
    "qa_f1_words_zh": _qa_f1_words_zh,
    "rouge_l": _rouge_l,
    "rouge_l_line": _first_line(_rouge_l),
    "rouge_l_zh": _rouge_l_zh,
    "rouge_lsum": _rouge_lsum,
    "classification_line": _first_line(_classification),
    "count": _count,
    "retrieval": lambda said, turn: _paragraph(said, turn, "Paragraph"),
    "retrieval_zh": lambda said, turn: _paragraph(said, turn, "段落"),
    "code_sim": _code_sim,
    "letter": _letter,
    "first_letter": _first_letter,
    "word": _word,
    "contains": _contains,
    "prefix": _prefix,
    "label": _label,
    "masks": _masks,
    "first_integer": _first_integer,
    "last_integer": _last_integer,
    "first_number": _first_number,
    "number_prefix": _number_prefix,
    "number": _number,
    "math": _math,
}
