"""Needle-in-a-haystack tasks, from any text and any tokenizer. They show which attention heads retrieve.

A case is a prompt of token ids that ends with a question, the ids that answer it, and the positions in the
prompt of the needle, of the right answer c2 and of wrong answers c1 (the letters of arXiv:2410.19258).
Sentences are inserted as ids, so their positions are known. The published code searches for them afterwards
by overlap of token sets, and may find another sentence.
"""

from __future__ import annotations

import itertools
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lowkey.core.options import Checked, option
from lowkey.core.types import LowkeyError

# One-word nouns. The embedded model was trained with them as keys: each, with its leading space, is one of
# its tokens.
# fmt: off
KEYS = [
    "oak", "river", "door", "lamp", "horse", "bread", "chair", "ship", "stone", "garden", "clock",
    "window", "bridge", "candle", "mirror", "table", "forest", "paper", "silver", "letter", "mountain",
    "cousin", "doctor", "island", "kitchen", "market", "orange", "pencil", "queen", "rabbit", "school",
    "tower", "village", "winter", "yellow", "apple", "basket", "castle", "dragon", "engine", "feather",
    "guitar", "hammer", "insect", "jacket", "kettle", "ladder", "monkey",
]
PEOPLE = ["Anna", "Tom", "Mary", "John", "Alice", "Peter", "Ruth", "David", "Sarah", "James", "Laura", "Paul"]
KINDS_OF_THINGS = [
    "small", "golden", "wooden", "broken", "heavy", "quiet", "green", "narrow", "painted", "round",
    "white", "empty",
]
THINGS = [
    "door", "lamp", "chair", "ship", "garden", "clock", "bridge", "mirror", "table", "letter", "island",
    "tower",
]
# fmt: on
# Task `copy`: tokens of the block, tokens of it that are shown again, and tokens that are the answer.
COPIED_BLOCK, CUE, COPIED = 24, 16, 4
# What ends a sentence, and what may follow that within the same token.
CLOSING, QUOTES = (".", "!", "?"), " )\"'\u2019\u201d"

Encode = Callable[[str], list[int]]
Span = tuple[int, int]  # (start, stop)


@dataclass(frozen=True)
class Drawing(Checked):
    """How cases are drawn.

    Args:
        cases: number of cases.
        context: length of a case in tokens, at most.
        depths: number of places in the text at which the needle is put.
        seed: seed of all random choices.
    """

    cases: int = option(100, at_least=1, at_most=10**6)
    context: int = option(1024, at_least=8, at_most=2**24)
    depths: int = option(10, at_least=1, at_most=1000)
    seed: int = option(0, at_least=0)


@dataclass(frozen=True)
class Fact:
    """A key and its value: the sentence that states it and the question that asks for it."""

    key: str
    value: str

    @property
    def statement(self) -> str:
        """The sentence that states the fact, with its leading space."""
        return f" Remember {self.key} {self.value}."

    @property
    def question(self) -> str:
        """The words that ask for the value; the value is expected next."""
        return f" Recall {self.key}"

    @property
    def answer(self) -> str:
        """The value with its leading space."""
        return f" {self.value}"


def draw_facts(rng: random.Random, count: int, keys: Sequence[str] = KEYS, digits: int = 3) -> list[Fact]:
    """Random facts with distinct keys.

    Args:
        rng: source of random numbers.
        count: number of facts.
        keys: words to choose keys from.
        digits: number of digits of a value.
    """
    return [Fact(key, f"{rng.randrange(10**digits):0{digits}d}") for key in rng.sample(list(keys), count)]


def weave(
    rng: random.Random,
    haystack: Sequence[int],
    inserts: Sequence[Sequence[int]],
    length: int,
    ends: Sequence[int] = (),
) -> list[int]:
    """Insert sentences at random places of a random stretch of text.

    Args:
        rng: source of random numbers.
        haystack: ids of the text.
        inserts: ids of each sentence; they keep their order.
        length: number of ids that are returned, inserted ones included.
        ends: places in the haystack at which sentences end. The stretch then begins at such a place and
            sentences are inserted at others, as far as there are any.

    Returns:
        Exactly `length` ids.

    Raises:
        LowkeyError: the inserts alone are longer than `length`, or the haystack is too short to fill it.
    """
    room = _room(length, sum(map(len, inserts)), f"{len(inserts)} facts", len(haystack))
    # A stretch that begins and is cut at sentence ends reads like a text; without any, all places will do.
    starts = [at for at in ends if at + room <= len(haystack)]
    start = rng.choice(starts) if starts else rng.randrange(len(haystack) - room + 1)
    places = [at - start for at in ends if start <= at <= start + room] or range(room + 1)
    cuts = sorted(rng.choice(places) for _ in inserts)
    return _join(haystack[start : start + room], inserts, cuts)[0]


def _room(length: int, taken: int, what: str, available: int) -> int:
    """Number of haystack tokens in a context of `length`, of which `what` takes `taken`."""
    room = length - taken
    if room < 0:
        raise LowkeyError(f"context {length}: {what} alone take {taken} tokens; give a longer context")
    if available < room:
        raise LowkeyError(
            f"data: {available} tokens cannot fill a context of {length}; give a longer text or a shorter "
            "context"
        )
    return room


def _join(
    stretch: Sequence[int], inserts: Sequence[Sequence[int]], cuts: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Insert ids into a stretch of text.

    Args:
        stretch: ids of the text.
        inserts: ids of each insert.
        cuts: insert i goes before `stretch[cuts[i]]`; ascending.

    Returns:
        All ids, and where each insert begins in them.
    """
    out: list[int] = []
    begins: list[int] = []
    for i, (a, b) in enumerate(itertools.pairwise([0, *cuts, len(stretch)])):
        out += stretch[a:b]
        if i < len(inserts):
            begins.append(len(out))
            out += inserts[i]
    return out, begins


@dataclass(frozen=True)
class Case:
    """One case: a prompt, its question, its answer, and where the evidence stands in the prompt.

    Args:
        prompt: ids, with the beginning-of-text token if the tokenizer has one; ends with `question`.
        question: ids of the question.
        answer: ids that a model which answers right writes next.
        needle: spans of the sentences that the answer needs.
        right: span of the right answer (c2), which reads as `answer`.
        wrong: spans of wrong answers (c1), which a model that finds the needle but misreads it would write.
    """

    prompt: list[int]
    question: list[int]
    answer: list[int]
    needle: tuple[Span, ...]
    right: Span
    wrong: tuple[Span, ...]


@dataclass(frozen=True)
class Insert:
    """One sentence that is put into the text.

    Args:
        ids: ids of the sentence.
        needle: whether the answer needs this sentence.
        right: span of the right answer within the sentence.
        wrong: spans of wrong answers within the sentence.
    """

    ids: list[int]
    needle: bool = True
    right: Span | None = None
    wrong: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Story:
    """What a task puts into the text: sentences, the first of them at the depth that is asked for, and a
    question.
    """

    inserts: list[Insert]
    question: list[int]


def sentence_ends(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """The places in `ids` at which a sentence has just ended."""
    closing = {i for i in set(ids) if str(tokenizer.decode([i])).rstrip(QUOTES).endswith(CLOSING)}
    return [at + 1 for at, i in enumerate(ids) if i in closing]


class Haystack:
    """A text as one tokenizer sees it.

    Attributes:
        tokenizer: the tokenizer.
        start: the beginning-of-text id, or no id.
        ids: ids of the text.
        distinct: the different ids of the text, ascending.
        ends: places in `ids` at which a sentence has just ended.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self.tokenizer = tokenizer
        self.start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.ids = self._plain(text)
        self.distinct = sorted(set(self.ids))
        self.ends = sentence_ends(tokenizer, self.ids)

    def _plain(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as it stands after a full stop. By itself, SentencePiece would begin it with a space
        that is not there.
        """
        stop, whole = self._plain("."), self._plain("." + text)
        return whole[len(stop) :] if whole[: len(stop)] == stop else self._plain(text)

    def insert(
        self, text: str, right: str | None = None, wrong: Sequence[str] = (), needle: bool = True
    ) -> Insert:
        """A sentence as an insert.

        Args:
            text: the sentence.
            right: the part of it that is the right answer.
            wrong: parts of it that are wrong answers. Each part occurs in the sentence once.
            needle: whether the answer needs this sentence.
        """
        spans = tuple(self._span(text, part) for part in wrong)
        return Insert(self.encode(text), needle, None if right is None else self._span(text, right), spans)

    def _span(self, text: str, part: str) -> Span:
        """The tokens of `text` that hold some character of `part`."""
        at, ids = text.index(part), self.encode(text)
        through = self.encode(text[: at + len(part)])
        stop = _common(ids, through)
        # The last token of `through` may differ from that of `ids`, where more text is merged into it; then
        # the token at `stop` holds the last characters of the part.
        return _common(ids, self.encode(text[:at])), stop + (stop < len(through))

    def back(self, place: int, least: int) -> int:
        """The last sentence end that is not after `place`.

        Args:
            place: where to begin.
            least: what is returned if no sentence ends between `least` and `place`.

        Returns:
            The place; `place` itself in a text in which no sentence ends.
        """
        if not self.ends:
            return place
        before = bisect_right(self.ends, place)
        return max(least, self.ends[before - 1]) if before else least


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# -- tasks


def _distinct(rng: random.Random, keys: Sequence[str]) -> list[Fact]:
    """Facts whose values are distinct too, so that a wrong answer never reads as the right one."""
    return [
        Fact(key, f"{value:03d}") for key, value in zip(keys, rng.sample(range(1000), len(keys)), strict=True)
    ]


def _facts(count: int) -> Callable[[random.Random, Haystack, int], Story]:
    """A task with `count` facts, of which the first is asked."""

    def draw(rng: random.Random, hay: Haystack, form: int) -> Story:
        asked, *others = _distinct(rng, rng.sample(KEYS, count))
        inserts = [hay.insert(asked.statement, asked.answer)]
        inserts += [hay.insert(f.statement, wrong=[f.answer], needle=False) for f in others]
        return Story(inserts, hay.encode(asked.question))

    return draw


def _two_hops(rng: random.Random, hay: Haystack, form: int) -> Story:
    """Three chains of a link and a fact; with one chain only, its value would be right for being the only
    one.
    """
    names = rng.sample(KEYS, 6)
    facts = _distinct(rng, names[3:])
    statements = [hay.insert(facts[0].statement, facts[0].answer)]
    statements += [hay.insert(f.statement, wrong=[f.answer], needle=False) for f in facts[1:]]
    links = [
        hay.insert(f" {a} is {f.key}.", needle=f is facts[0]) for a, f in zip(names, facts, strict=False)
    ]
    return Story(statements + links, hay.encode(Fact(names[0], "").question))


def _comparison(rng: random.Random, hay: Haystack, form: int) -> Story:
    """The reasoning needle of arXiv:2410.19258: who is older (form 0) or younger (form 1) decides which
    answer is right.
    """
    people, kinds, things = (rng.sample(words, 2) for words in (PEOPLE, KINDS_OF_THINGS, THINGS))
    young = rng.randrange(18, 60)
    ages = rng.sample([young, young + rng.randrange(5, 30)], 2)
    likes = [f" {kind} {thing}" for kind, thing in zip(kinds, things, strict=True)]
    statements = [
        f" {person} is {age} years old and likes the{liked} best."
        for person, age, liked in zip(people, ages, likes, strict=True)
    ]
    asked = (min if form else max)((0, 1), key=ages.__getitem__)
    who = "younger" if form else "older"
    question = (
        f" Question: what does the {who} one of {people[0]} and {people[1]} like best?"
        f" Answer: the {who} one likes the"
    )
    return Story([hay.insert("".join(statements), likes[asked], [likes[1 - asked]])], hay.encode(question))


def _copy(rng: random.Random, hay: Haystack, form: int) -> Story:
    """A block of distinct random tokens, most of which are shown again; the next ones are the answer."""
    if len(hay.distinct) < COPIED_BLOCK:
        raise LowkeyError(
            f"haystack: {len(hay.distinct)} different tokens cannot make a block of {COPIED_BLOCK} to copy; "
            "give a longer text"
        )
    block = rng.sample(hay.distinct, COPIED_BLOCK)
    return Story([Insert(block, right=(CUE, CUE + COPIED))], block[:CUE])


@dataclass(frozen=True)
class NeedleTask:
    """A needle task.

    Args:
        summary: one line for the command line.
        draw: makes the sentences and the question of a case, given a source of random numbers, the haystack
            and the form of the question.
        forms: number of forms that the question has.
    """

    summary: str
    draw: Callable[[random.Random, Haystack, int], Story]
    forms: int = 1


NEEDLE_TASKS: dict[str, NeedleTask] = {
    "recall": NeedleTask("one fact, asked by its key", _facts(1)),
    "facts": NeedleTask("eight facts, one of them asked by its key", _facts(8)),
    "recall2": NeedleTask("three links and three facts; the asked key leads to the fact's key", _two_hops),
    "comparison": NeedleTask(
        "two persons' ages and favourites; the favourite of the older or the younger is asked", _comparison, 2
    ),
    "copy": NeedleTask("a block of random tokens, to be continued when it comes again", _copy),
}


def draw_case(
    task: NeedleTask, haystack: Haystack, length: int, depth: float, form: int, rng: random.Random
) -> Case:
    """Draw one case. Prompt and answer take `length` tokens together.

    The text ends at the end of a sentence, and every insert stands at one, as far as the text has any.

    Args:
        task: the task.
        haystack: the text.
        length: number of tokens.
        depth: where the first insert stands: 0 is the beginning of the text, 1 its end. The others stand
            anywhere.
        form: form of the question.
        rng: source of random numbers.

    Raises:
        LowkeyError: needle and question are longer than `length`, or the text is too short.
    """
    story = task.draw(rng, haystack, form)
    ids = [insert.ids for insert in story.inserts]
    answer = _answer(story)
    taken = sum(map(len, [haystack.start, *ids, story.question, answer]))
    room = _room(length, taken, "the needle and its question", len(haystack.ids))
    begin = haystack.back(rng.randrange(room, len(haystack.ids) + 1), room) - room
    # The stretch of text ends at a sentence end; it begins wherever its length makes it begin.
    depths = [depth, *(rng.random() for _ in ids[1:])]
    cuts = [haystack.back(begin + round(d * room), begin) - begin for d in depths]
    order = sorted(range(len(ids)), key=cuts.__getitem__)
    body, begins = _join(
        haystack.ids[begin : begin + room], [ids[i] for i in order], [cuts[i] for i in order]
    )
    places = {i: at + len(haystack.start) for i, at in zip(order, begins, strict=True)}
    return _case(story, haystack.start + body + story.question, answer, places)


def _answer(story: Story) -> list[int]:
    """The ids of the right answer as they stand in its sentence, so that copying them is what a model must
    do.
    """
    return next(s.ids[slice(*s.right)] for s in story.inserts if s.right is not None)


def _case(story: Story, prompt: list[int], answer: list[int], places: dict[int, int]) -> Case:
    """The case of a story.

    Args:
        story: its sentences and question.
        prompt: ids of the whole prompt.
        answer: ids of the answer.
        places: where each insert begins in the prompt.
    """

    def at(i: int, span: Span) -> Span:
        return places[i] + span[0], places[i] + span[1]

    known = list(enumerate(story.inserts))
    needle = tuple(at(i, (0, len(s.ids))) for i, s in known if s.needle)
    right = next(at(i, s.right) for i, s in known if s.right is not None)
    return Case(
        prompt,
        story.question,
        answer,
        needle,
        right,
        tuple(at(i, span) for i, s in known for span in s.wrong),
    )
