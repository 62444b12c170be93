"""Questions about a text whose short answers stand in it: the share of them that survives compression.

A text is about a dozen paragraphs about invented things, in random order. Each question is about one of them,
and the others distract. Small models answer only some of such questions, so the full cache is asked first,
and every other setting is asked what the full cache got right: the score then measures the cache and not the
model.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import string
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cache.cache import LowkeyCache
from lowkey.core.files.measured import Measured
from lowkey.core.progress import Progress
from lowkey.core.types import LowkeyError
from lowkey.evaluate.asking import (
    Frame,
    Written,
    check_budgets,
    read_context,
    tensor_of,
    write_answer,
)
from lowkey.evaluate.settings import Setting
from lowkey.models import families

TEXT_LENGTH = 1300  # tokens of a text, at most
ANSWER_LENGTH = 16  # tokens of an answer, at most
ASKING = 64  # tokens that a question and its template may take
DEALS = 3  # how many times the paragraphs are dealt into texts, at most
LEAST_QUESTIONS = 20  # a share of fewer questions says little
QUESTION_PROMPT = "\n\nAnswer this question about the text in a few words: {question}"
ARTICLES = ("a", "an", "the")


@dataclass(frozen=True)
class Item:
    """A question.

    Args:
        number: its number among all questions.
        question: the words.
        answers: answers that count as right; each stands in the paragraph.
    """

    number: int
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Paragraph:
    """A paragraph and the questions about it.

    Args:
        text: the paragraph.
        items: its questions.
    """

    text: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Text:
    """A text that is asked about.

    Args:
        ids: ids of the template's beginning and of the paragraphs; a question is appended.
        items: the questions.
    """

    ids: list[int]
    items: list[Item]


def embedded_paragraphs() -> list[Paragraph]:
    """The paragraphs that ship with lowkey and were written for it."""
    content = (package_files("lowkey") / "data" / "questions.json").read_text(encoding="utf-8")
    paragraphs, number = [], 0
    for paragraph in json.loads(content)["paragraphs"]:
        items = [
            Item(number + i, q["question"], tuple(q["answers"])) for i, q in enumerate(paragraph["questions"])
        ]
        paragraphs.append(Paragraph(paragraph["text"], tuple(items)))
        number += len(items)
    return paragraphs


def draw_texts(
    frame: Frame, paragraphs: Sequence[Paragraph], seed: int, length: int = TEXT_LENGTH
) -> list[Text]:
    """Deal paragraphs in random order into texts.

    Args:
        frame: the chat template.
        paragraphs: the paragraphs.
        seed: seed of the order.
        length: number of ids of a text at most.

    Returns:
        Texts that ask each question once. The last text is filled up with paragraphs that it does not ask
        about.

    Raises:
        LowkeyError: a paragraph is longer than a text.
    """
    rng = random.Random(seed)
    deck = rng.sample(list(paragraphs), len(paragraphs))
    sizes = {id(p): len(frame.encode(p.text + "\n\n")) for p in deck}
    room = length - len(frame.start)
    if any(size > room for size in sizes.values()):
        raise LowkeyError(
            f"questions: a text of {length} tokens does not hold the longest paragraph; use a model with "
            "more positions"
        )
    dealt: list[list[Paragraph]] = [[]]
    for paragraph in deck:
        if sum(sizes[id(p)] for p in (*dealt[-1], paragraph)) > room:
            dealt.append([])
        dealt[-1].append(paragraph)
    # The last text would be shorter than the others: it is filled up with paragraphs that other texts ask
    # about.
    last = list(dealt[-1])
    for more in (p for p in deck if p not in last):
        if sum(sizes[id(p)] for p in (*dealt[-1], more)) <= room:
            dealt[-1].append(more)
    rng.shuffle(dealt[-1])
    texts = []
    for shown, asked_about in zip(dealt, [*dealt[:-1], last], strict=True):
        items = [item for p in asked_about for item in p.items]
        ids = frame.start + frame.encode("\n\n".join(p.text for p in shown))
        texts.append(Text(ids, rng.sample(items, len(items))))
    return texts


def _question(frame: Frame, item: Item) -> list[int]:
    """Ids of a question."""
    return frame.question(QUESTION_PROMPT.format(question=item.question))


def normalised_words(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles, as SQuAD compares them (arXiv:1606.05250)."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in plain.split() if word not in ARTICLES]


def is_right_answer(said: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in what was said, as whole words."""
    words = f" {' '.join(normalised_words(said))} "
    return any(f" {' '.join(normalised_words(answer))} " in words for answer in answers)


class _Asker:
    """Asks questions over caches of one setting. A setting that does not evict reads a text once and answers
    over copies of that cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        frame: Frame,
        setting: Setting,
        refeed: bool,
    ) -> None:
        self.model, self.tokenizer, self.frame = model, tokenizer, frame
        self.setting, self.refeed = setting, refeed
        self.ends = frame.ends(model)
        self.known: tuple[Text, LowkeyCache] | None = None  # the text that was read last, and its cache

    def ask(self, text: Text, item: Item) -> dict:
        """Ask one question.

        Returns:
            `right`: whether the answer counts; `held`: bytes held when it began; `said`: its words.
        """
        question = _question(self.frame, item)
        said = self._written(text, text.ids + question, len(question))
        words = str(self.tokenizer.decode(said.ids))
        return {"right": is_right_answer(words, item.answers), "held": said.held, "said": words}

    def _written(self, text: Text, ids: list[int], question: int) -> Written:
        """The answer to a prompt that ends with `question` tokens of question."""
        tensor = tensor_of(self.model, ids)
        if self.setting.evicts:
            cache = read_context(self.model, self.tokenizer, self.setting, tensor, question, self.refeed)
        else:
            cache = copy.deepcopy(self._read(text))
        return write_answer(self.model, cache, tensor, self.ends, ANSWER_LENGTH)

    def _read(self, text: Text) -> LowkeyCache:
        """The cache that has read the text, made once per text."""
        if self.known is None or self.known[0] is not text:
            self.known, cache = None, self.setting.make()  # frees the cache of the text before
            write_answer(self.model, cache, tensor_of(self.model, text.ids), set(), 1)
            self.known = text, cache
        return self.known[1]


def measure_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Setting],
    wanted: int,
    seed: int,
    progress: Progress,
    refeed: bool = True,
    paragraphs: Sequence[Paragraph] | None = None,
    measured: Measured | None = None,
) -> dict[str, dict]:
    """Share of the questions that the full cache answers which a setting answers too.

    The first setting, which should be the full cache, is asked until it has answered `wanted` questions. If
    there are not as many, paragraphs are dealt into other texts, and what it has not answered is asked again:
    up to `DEALS` times in all, and as long as that finds more.

    Args:
        model: the model, attached.
        tokenizer: its tokenizer.
        settings: what is compared; the first is the control.
        wanted: number of questions that the control is to answer.
        seed: seed of the order of paragraphs.
        progress: shows progress.
        refeed: whether a question is asked again over what a setting kept; see `recall.measure_recall`.
        paragraphs: the paragraphs; None for the embedded ones.
        measured: earlier measurements of the same job.

    Returns:
        By setting: `questions`, the share; `questions_right` of `questions_of`; `questions_kept`, bytes held
        with the question when an answer began, as a share of the control's; `per_question`, 1 for each right
        answer and 0 for each wrong one; and `questions_evidence`, whether there are at least
        `LEAST_QUESTIONS` questions. The control's row also has `questions_asked`, how
        often it was asked; `questions_items`, the numbers of what it answered; and, if these are too few,
        `questions_note`.
    """
    frame, full, others = Frame.of(tokenizer), settings[0], settings[1:]
    deck = embedded_paragraphs() if paragraphs is None else paragraphs
    asker = _Asker(model, tokenizer, frame, full, refeed)
    kept: dict[int, tuple[str, Text, Item]] = {}  # by the item's number
    measured = measured or Measured()
    asked = 0
    for deal in range(DEALS):
        # Each deal has a seed of its own, far from those of a user's neighbouring seeds.
        before, texts = len(kept), draw_texts(frame, deck, seed + 2**32 * deal, _length(model))
        for text in texts:
            longest = max((_question(frame, item) for item in text.items), key=len)
            check_budgets(settings, refeed, len(text.ids) + len(longest), len(longest))
        every = [(text, item) for text in texts for item in text.items if item.number not in kept]
        asked += _ask_control(asker, deal, every, wanted, kept, progress, measured)
        if len(kept) == wanted or len(kept) == before:
            break
    for setting in others:
        asker = _Asker(model, tokenizer, frame, setting, refeed)
        todo = [case for case in kept.values() if f"{case[0]} {setting.name}" not in measured]
        for name, text, item in progress(measured.share(todo), f"questions, {setting.name}"):
            measured.once(f"{name} {setting.name}", lambda: asker.ask(text, item))  # noqa: B023
    measured.gather()
    answers = {s.name: [measured[f"{name} {s.name}"] for name, *_ in kept.values()] for s in settings}
    rows = {name: _row(own, answers[full.name]) for name, own in answers.items()}
    rows[full.name] |= {"questions_asked": asked, "questions_items": list(kept)}
    if len(kept) < LEAST_QUESTIONS:
        remedy = (
            f"give --questions {LEAST_QUESTIONS} or more"
            if len(kept) == wanted
            else "use a model that answers more"
        )
        rows[full.name]["questions_note"] = (
            f"questions: the full cache answers {len(kept)} of {asked} askings, too few to tell caches "
            f"apart; {remedy}"
        )
    return rows


def _ask_control(
    asker: _Asker,
    deal: int,
    every: Sequence[tuple[Text, Item]],
    wanted: int,
    kept: dict[int, tuple[str, Text, Item]],
    progress: Progress,
    measured: Measured,
) -> int:
    """Ask the control until it has answered enough questions.

    Args:
        asker: of the control.
        deal: number of the deal.
        every: the questions.
        wanted: number of answers that are enough.
        kept: what was answered, which is added to.
        progress: shows progress.
        measured: earlier measurements of the same job.

    Returns:
        How many questions were asked.
    """
    # each process asks one question at a time, and what comes behind the last one wanted does not count
    asked, at_once, name = 0, measured.processes.count, asker.setting.name
    blocks = [every[i : i + at_once] for i in range(0, len(every), at_once)]
    for block in progress(blocks, f"questions, {name}"):
        for text, item in measured.share(block):
            measured.once(f"questions {deal} {item.number} {name}", lambda: asker.ask(text, item))  # noqa: B023
        measured.gather()
        for text, item in block:
            key = f"questions {deal} {item.number}"
            asked += 1
            if measured[f"{key} {name}"]["right"]:
                kept[item.number] = key, text, item
            if len(kept) == wanted:
                return asked
    return asked


def _length(model: PreTrainedModel) -> int:
    """Length of a text that this model can read together with a question and an answer."""
    longest = families.max_positions(model)
    return TEXT_LENGTH if longest is None else min(TEXT_LENGTH, longest - ASKING - ANSWER_LENGTH)


def _row(answers: list[dict], full: list[dict]) -> dict:
    """The row's fields from a setting's answers.

    Args:
        answers: what `_Asker.ask` gave for the setting.
        full: what it gave for the control.
    """
    right, total = sum(a["right"] for a in answers), len(answers)
    kept = None
    if answers:
        kept = statistics.fmean(a["held"] for a in answers) / statistics.fmean(a["held"] for a in full)
    return {
        "questions": right / total if total else None,
        "questions_right": right,
        "questions_of": total,
        "questions_kept": kept,
        "questions_evidence": total >= LEAST_QUESTIONS,
        "per_question": [int(a["right"]) for a in answers],
    }
