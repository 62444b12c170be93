"""BABILong (arXiv:2406.10149): small stories whose sentences are scattered in a long text.

The stories are generated after the first five tasks of bAbI (arXiv:1502.05698), with our own code. All twenty
tasks are read from a folder with the published files, `TASK.jsonl` or `TASK.json` with `input`, `question`
and `target`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from lowkey.suites.fetching import Published, published_records
from lowkey.suites.hiding import fitted, running_text, stream_from, words_of, woven
from lowkey.suites.prompts import PROMPTS, filled, templates
from lowkey.suites.sample import Source, Suite, SuiteSample

_PEOPLE = ("Mary", "John", "Sandra", "Daniel")
_ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_THINGS = ("apple", "football", "milk")
_SIDES = {"north": "south", "south": "north", "east": "west", "west": "east"}
_MOVES = ("moved to", "went to", "travelled to", "journeyed to")
_TOKENS = 20
_PROMPT = (
    "Facts about {about} are hidden in the following text. Take what happened last.\n\n{context}\n\nAnswer "
    "with one word.\n\nQuestion: {question}\nAnswer:"
)
_ABOUT = {
    "qa1": "people and where they are",
    "qa2": "people, things and where they are",
    "qa3": "people, things and where they were",
    "qa4": "where rooms lie",
    "qa5": "who gave what to whom",
}
_NUMBERS = ("none", "one", "two", "three", "four", "five")
_ANIMALS = ("cat", "mouse", "sheep", "wolf")
_COLOURS = ("gray", "green", "white", "yellow")
# The words that an answer may be, by task: the metric refuses an answer that names two of them.
_LABELS: dict[str, tuple[str, ...]] = {
    "qa1": _ROOMS,
    "qa2": _ROOMS,
    "qa3": _ROOMS,
    "qa4": _ROOMS,
    "qa5": ("Bill", "Fred", "Jeff", "Mary", *_THINGS, "cake"),
    "qa6": ("yes", "no"),
    "qa7": _NUMBERS,
    "qa8": (*_THINGS, "nothing"),
    "qa9": ("yes", "no"),
    "qa10": ("yes", "no", "maybe"),
    "qa11": _ROOMS,
    "qa12": _ROOMS,
    "qa13": _ROOMS,
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": _ANIMALS,
    "qa16": _COLOURS,
    "qa17": ("yes", "no"),
    "qa18": ("yes", "no"),
    "qa19": (),
    "qa20": ("bored", "hungry", "thirsty", "tired", "bedroom", "garden", "kitchen", "apple", "football"),
}


@dataclass(frozen=True)
class _Story:
    """A story.

    Args:
        facts: its sentences in order.
        question: what is asked about it.
        answer: the right word.
    """

    facts: tuple[str, ...]
    question: str
    answer: str


def _whereabouts(rng: Random) -> _Story:
    """People move; where is one of them?"""
    where: dict[str, str] = {}
    facts = []
    for _ in range(6):
        person = rng.choice(_PEOPLE)
        where[person] = rng.choice([room for room in _ROOMS if room != where.get(person)])
        facts.append(f"{person} {rng.choice(_MOVES)} the {where[person]}.")
    asked = rng.choice(list(where))
    return _Story(tuple(facts), f"Where is {asked}?", where[asked])


def _carried(rng: Random) -> tuple[list[str], str, list[str]]:
    """A person takes a thing, carries it through rooms and drops it, among others who move.

    Returns:
        The sentences, the thing and the rooms in which it was, in order.
    """
    person, *others = rng.sample(_PEOPLE, 3)
    thing = rng.choice(_THINGS)
    rooms = rng.sample(_ROOMS, 3)
    facts = [f"{person} {rng.choice(_MOVES)} the {rooms[0]}.", f"{person} took the {thing} there."]
    for room in rooms[1:]:
        other = rng.choice(others)
        facts.append(f"{other} {rng.choice(_MOVES)} the {rng.choice(_ROOMS)}.")
        facts.append(f"{person} {rng.choice(_MOVES)} the {room}.")
    facts.append(f"{person} dropped the {thing}.")
    facts.append(f"{person} {rng.choice(_MOVES)} the {rng.choice([r for r in _ROOMS if r != rooms[-1]])}.")
    return facts, thing, rooms


def _thing(rng: Random) -> _Story:
    """Where is a thing that was carried?"""
    facts, thing, rooms = _carried(rng)
    return _Story(tuple(facts), f"Where is the {thing}?", rooms[-1])


def _thing_before(rng: Random) -> _Story:
    """Where was a thing before it came to a room?"""
    facts, thing, rooms = _carried(rng)
    later = rng.randrange(1, len(rooms))
    question = f"Where was the {thing} before the {rooms[later]}?"
    return _Story(tuple(facts), question, rooms[later - 1])


def _sides(rng: Random) -> _Story:
    """Rooms lie beside each other: which one lies on a side of another?"""
    first, second, third = rng.sample(_ROOMS, 3)
    one, two = rng.sample(list(_SIDES), 2)
    facts = (f"The {first} is {one} of the {second}.", f"The {third} is {two} of the {second}.")
    side, answer = rng.choice([(one, first), (two, third)])
    if rng.random() < 0.5:
        return _Story(facts, f"What is {side} of the {second}?", answer)
    return _Story(facts, f"What is the {answer} {side} of?", second)


def _given(rng: Random) -> _Story:
    """Things are given from one to another: who gave, who received, and what?"""
    people = ("Bill", "Fred", "Jeff", "Mary")
    facts = []
    gifts = rng.sample((*_THINGS, "cake"), 3)
    pairs = rng.sample([(a, b) for a in people for b in people if a != b], 3)
    for thing, (giver, taker) in zip(gifts, pairs, strict=True):
        facts.append(f"{giver} {rng.choice(('gave', 'handed', 'passed'))} the {thing} to {taker}.")
    thing, (giver, taker) = rng.choice(list(zip(gifts, pairs, strict=True)))
    asked = [
        (f"Who gave the {thing} to {taker}?", giver),
        (f"Who received the {thing}?", taker),
        (f"What did {giver} give to {taker}?", thing),
    ]
    return _Story(tuple(facts), *rng.choice(asked))


_STORIES: dict[str, Callable[[Random], _Story]] = {
    "qa1": _whereabouts,
    "qa2": _thing,
    "qa3": _thing_before,
    "qa4": _sides,
    "qa5": _given,
}


def _published_file(task: str, folder: Path | None) -> Published | None:
    """Where the published file of a task is; None if the folder has none and the task can be generated."""
    place = Published(
        (f"{task}.jsonl", f"{task}.json", f"data/{task}.jsonl"), "RMT-team/babilong", "4k", task
    )
    if task not in _STORIES or (folder and any((folder / name).exists() for name in place.names)):
        return place
    return None


def _samples(task: str, source: Source) -> Iterator[SuiteSample]:
    own = templates(source.folder, PROMPTS).get(task, _PROMPT)
    place = _published_file(task, source.folder)
    cases = _generated(task, source, own) if place is None else _published(task, place, source, own)
    for number, (context, question, answer) in enumerate(cases):
        yield SuiteSample(
            suite="babilong",
            task=task,
            number=number,
            context=context,
            question=question,
            answers=(answer,),
            metric="label",
            tokens=_TOKENS,
            choices=_LABELS[task],
        )


def _published(task: str, place: Published, source: Source, own: str) -> Iterator[tuple[str, str, str]]:
    for record in published_records(f"babilong {task}", place, source):
        fields = {"context": record.text("input"), "question": record.text("question"), "about": "the story"}
        yield *filled(own, fields), record.text("target")


def _generated(task: str, source: Source, own: str) -> Iterator[tuple[str, str, str]]:
    words = words_of(running_text(source))
    for number in range(source.cases):
        rng = Random(f"{source.seed} babilong {task} {number}")
        story, first = _STORIES[task](rng), stream_from(rng, words)
        depths = sorted(rng.random() for _ in story.facts)

        def put(context: str, story: _Story = story) -> tuple[str, str]:
            return filled(own, {"context": context, "question": story.question, "about": _ABOUT[task]})

        def build(
            count: int, story: _Story = story, first: Callable = first, depths: list[float] = depths
        ) -> str:
            return put(woven(first(count), story.facts, depths), story)[0]

        question = put("")[1]
        yield fitted(source, _TOKENS, question, build, f"babilong {task}"), question, story.answer


BABILONG = Suite(
    "small stories whose sentences are scattered in a long text; five tasks are generated",
    "2406.10149",
    tuple(_LABELS),
    _samples,
    tuple(_STORIES),
    "`*.txt` to hide the stories in; or `TASK.jsonl`, `TASK.json` with `input`, `question` and `target`",
)
