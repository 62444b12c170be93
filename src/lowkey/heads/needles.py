"""Needles in a haystack: tasks that show which attention heads find things, with any tokenizer and any text.

A case is a prompt of token ids that ends with a question, the ids that answer it, and where in the prompt
stand the needle, the right answer c2 and the wrong answers c1 (the letters of arXiv:2410.19258). The places
are known because the sentences are put in as ids; the published code searches for them afterwards by their
overlap of token sets, and can hit another sentence.
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

# One-word nouns; the embedded model knows these as keys (each, with its leading space, is a single token of
# it). fmt: off
KEYS = [
    "oak",
    "river",
    "door",
    "lamp",
    "horse",
    "bread",
    "chair",
    "ship",
    "stone",
    "garden",
    "clock",
    "window",
    "bridge",
    "candle",
    "mirror",
    "table",
    "forest",
    "paper",
    "silver",
    "letter",
    "mountain",
    "cousin",
    "doctor",
    "island",
    "kitchen",
    "market",
    "orange",
    "pencil",
    "queen",
    "rabbit",
    "school",
    "tower",
    "village",
    "winter",
    "yellow",
    "apple",
    "basket",
    "castle",
    "dragon",
    "engine",
    "feather",
    "guitar",
    "hammer",
    "insect",
    "jacket",
    "kettle",
    "ladder",
    "monkey",
]
PEOPLE = ["Anna", "Tom", "Mary", "John", "Alice", "Peter", "Ruth", "David", "Sarah", "James", "Laura", "Paul"]
KINDS_OF_THINGS = [
    "small",
    "golden",
    "wooden",
    "broken",
    "heavy",
    "quiet",
    "green",
    "narrow",
    "painted",
    "round",
    "white",
    "empty",
]
THINGS = [
    "door",
    "lamp",
    "chair",
    "ship",
    "garden",
    "clock",
    "bridge",
    "mirror",
    "table",
    "letter",
    "island",
    "tower",
]
# fmt: on
# of `copy`: tokens of the block, of it that are shown again, and to be written
COPIED_BLOCK, CUE, COPIED = 24, 16, 4
# what ends a sentence, and what may follow it within a token
CLOSING, QUOTES = (".", "!", "?"), " )\"'\u2019\u201d"

Encode = Callable[[str], list[int]]
Span = tuple[int, int]  # (start, stop)


@dataclass(frozen=True)
class Drawing(Checked):
    """How many cases are drawn and how long they are: `context` tokens at most, with `depths` places of the
    needle.
    """

    cases: int = option(100, at_least=1, at_most=10**6)
    context: int = option(1024, at_least=8, at_most=2**24)
    depths: int = option(10, at_least=1, at_most=1000)
    seed: int = option(0, at_least=0)


@dataclass(frozen=True)
class Fact:
    key: str
    value: str

    @property
    def statement(self) -> str:
        return f" Remember {self.key} {self.value}."

    @property
    def question(self) -> str:
        return f" Recall {self.key}"

    @property
    def answer(self) -> str:
        return f" {self.value}"


def draw_facts(rng: random.Random, count: int, keys: Sequence[str] = KEYS, digits: int = 3) -> list[Fact]:
    """`count` facts with distinct keys and values of so many digits."""
    return [Fact(key, f"{rng.randrange(10**digits):0{digits}d}") for key in rng.sample(list(keys), count)]


def weave(
    rng: random.Random,
    haystack: Sequence[int],
    inserts: Sequence[Sequence[int]],
    length: int,
    ends: Sequence[int] = (),
) -> list[int]:
    """Exactly `length` ids: a random stretch of `haystack` with `inserts` put in, in order, at random places.
    ends: where in the haystack sentences end, if the stretch is to begin at such a place and the inserts to
    stand at others, as far as there are any."""
    room = _room(length, sum(map(len, inserts)), f"{len(inserts)} facts", len(haystack))
    starts = [at for at in ends if at + room <= len(haystack)]
    start = rng.choice(starts) if starts else rng.randrange(len(haystack) - room + 1)
    places = [at - start for at in ends if start <= at <= start + room] or range(room + 1)
    cuts = sorted(rng.choice(places) for _ in inserts)
    return _join(haystack[start : start + room], inserts, cuts)[0]


def _room(length: int, taken: int, what: str, available: int) -> int:
    """How many tokens of the haystack are wanted; `what` takes the others."""
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
    """(ids, where each insert begins in them); insert i goes before stretch[cuts[i]], cuts ascending."""
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
    """`prompt` (with the beginning-of-text token, if the tokenizer has one) ends with `question`; a right
    model writes `answer` next.

    needle: where the sentences needed for the answer stand in the prompt; right: c2, which reads as `answer`;
    wrong: every c1, which a model that finds the needle but does not read it well would write.
    """

    prompt: list[int]
    question: list[int]
    answer: list[int]
    needle: tuple[Span, ...]
    right: Span
    wrong: tuple[Span, ...]


@dataclass(frozen=True)
class Insert:
    """One sentence that is put into the text, and the spans of it that are answers; `needle`: the answer
    cannot do without it.
    """

    ids: list[int]
    needle: bool = True
    right: Span | None = None
    wrong: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Story:
    """What a task puts into the text, the first insert at the depth that is asked for, and its question."""

    inserts: list[Insert]
    question: list[int]


def sentence_ends(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """The places in the ids where a sentence has just ended."""
    closing = {i for i in set(ids) if str(tokenizer.decode([i])).rstrip(QUOTES).endswith(CLOSING)}
    return [at + 1 for at, i in enumerate(ids) if i in closing]


class Haystack:
    """A text as one tokenizer sees it. ids: of the text; ends: the places in it where a sentence has just
    ended.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self.tokenizer = tokenizer
        self.start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.ids = self._plain(text)
        self.distinct = sorted(set(self.ids))
        self.ends = sentence_ends(tokenizer, self.ids)

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as it stands after a full stop: alone, SentencePiece would begin it with a space that
        is not there.
        """
        stop, whole = self._plain("."), self._plain("." + text)
        return whole[len(stop) :] if whole[: len(stop)] == stop else self._plain(text)

    def insert(
        self, text: str, right: str | None = None, wrong: Sequence[str] = (), needle: bool = True
    ) -> Insert:
        """A sentence whose parts `right` and `wrong` are answers; each occurs in it once."""
        spans = tuple(self._span(text, part) for part in wrong)
        return Insert(self.encode(text), needle, None if right is None else self._span(text, right), spans)

    def _span(self, text: str, part: str) -> Span:
        """The tokens of `text` that hold some character of `part`."""
        at, ids = text.index(part), self.encode(text)
        through = self.encode(text[: at + len(part)])
        stop = _common(ids, through)
        return _common(ids, self.encode(text[:at])), stop + (stop < len(through))

    def back(self, place: int, least: int) -> int:
        """The last sentence end up to `place`, or `least` when there is none so near; `place` itself in a
        text without any.
        """
        found = bisect_right(self.ends, place)
        return max(least, self.ends[found - 1] if found else least) if self.ends else place


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# -- tasks


def _distinct(rng: random.Random, keys: Sequence[str]) -> list[Fact]:
    """Facts with values of their own too: a wrong answer must not read as the right one."""
    return [
        Fact(key, f"{value:03d}") for key, value in zip(keys, rng.sample(range(1000), len(keys)), strict=True)
    ]


def _facts(count: int) -> Callable[[random.Random, Haystack, int], Story]:
    def draw(rng: random.Random, hay: Haystack, form: int) -> Story:
        asked, *others = _distinct(rng, rng.sample(KEYS, count))
        inserts = [hay.insert(asked.statement, asked.answer)]
        inserts += [hay.insert(f.statement, wrong=[f.answer], needle=False) for f in others]
        return Story(inserts, hay.encode(asked.question))

    return draw


def _two_hops(rng: random.Random, hay: Haystack, form: int) -> Story:
    """Three chains of a link and a fact, so that no value is right for being the only one."""
    names = rng.sample(KEYS, 6)
    facts = _distinct(rng, names[3:])
    statements = [hay.insert(facts[0].statement, facts[0].answer)]
    statements += [hay.insert(f.statement, wrong=[f.answer], needle=False) for f in facts[1:]]
    links = [
        hay.insert(f" {a} is {f.key}.", needle=f is facts[0]) for a, f in zip(names, facts, strict=False)
    ]
    return Story(statements + links, hay.encode(Fact(names[0], "").question))


def _comparison(rng: random.Random, hay: Haystack, form: int) -> Story:
    """The reasoning needle of arXiv:2410.19258: who is older (form 0) or younger (form 1) decides which of
    two answers is right.
    """
    people, kinds, things = (rng.sample(words, 2) for words in (PEOPLE, KINDS_OF_THINGS, THINGS))
    young = rng.randrange(18, 60)
    ages = rng.sample([young, young + rng.randrange(5, 30)], 2)
    likes = [f" {kind} {thing}" for kind, thing in zip(kinds, things, strict=True)]
    said = [
        f" {p} is {age} years old and likes the{x} best."
        for p, age, x in zip(people, ages, likes, strict=True)
    ]
    asked = (min if form else max)((0, 1), key=ages.__getitem__)
    who = "younger" if form else "older"
    question = f" Question: what does the {who} one of {people[0]} and {people[1]} like best? Answer: the {who} one likes the"
    return Story([hay.insert("".join(said), likes[asked], [likes[1 - asked]])], hay.encode(question))


def _copy(rng: random.Random, hay: Haystack, form: int) -> Story:
    """Random tokens, all different; most of them are shown again, and the next are wanted."""
    if len(hay.distinct) < COPIED_BLOCK:
        raise LowkeyError(
            f"haystack: {len(hay.distinct)} different tokens cannot make a block of {COPIED_BLOCK} to copy; give a "
            "longer text"
        )
    block = rng.sample(hay.distinct, COPIED_BLOCK)
    return Story([Insert(block, right=(CUE, CUE + COPIED))], block[:CUE])


@dataclass(frozen=True)
class NeedleTask:
    """`draw` makes a story; `forms` is how many forms its question has."""

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
    """One case; prompt and answer take `length` tokens in all.

    The first insert stands at `depth` of the text (0 its beginning, 1 its end), the others anywhere, all of
    them moved back to the end of a sentence; the text stops at the end of a sentence too, if it has any.
    """
    story = task.draw(rng, haystack, form)
    ids = [insert.ids for insert in story.inserts]
    answer = _answer(story)
    taken = sum(map(len, [haystack.start, *ids, story.question, answer]))
    room = _room(length, taken, "the needle and its question", len(haystack.ids))
    begin = haystack.back(rng.randrange(room, len(haystack.ids) + 1), room) - room
    depths = [depth, *(rng.random() for _ in ids[1:])]
    cuts = [haystack.back(begin + round(d * room), begin) - begin for d in depths]
    order = sorted(range(len(ids)), key=cuts.__getitem__)
    body, begins = _join(
        haystack.ids[begin : begin + room], [ids[i] for i in order], [cuts[i] for i in order]
    )
    places = {i: at + len(haystack.start) for i, at in zip(order, begins, strict=True)}
    return _case(story, haystack.start + body + story.question, answer, places)


def _answer(story: Story) -> list[int]:
    """As it reads in the needle, so that the answer is what there is to copy."""
    return next(s.ids[slice(*s.right)] for s in story.inserts if s.right is not None)


def _case(story: Story, prompt: list[int], answer: list[int], places: dict[int, int]) -> Case:
    """places: where each insert begins in the prompt."""

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
