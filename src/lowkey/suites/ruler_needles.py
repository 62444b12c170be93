"""RULER's eight tasks that hide facts (needles) in a text or among other facts."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from random import Random

from lowkey.suites.hiding import Made, Maker, fitted, running_text, stream_from, words_of, woven
from lowkey.suites.key_words import keys_of
from lowkey.suites.sample import Source

NOISE_PASSAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_FACT = "One of the special magic {kind}s for {key} is: {value}."
_INTRODUCTION = (
    "Some special magic {kind}s are hidden in the following text. Remember them, since a question about the "
    "{kind}s comes at the end.\n\n"
)
_ASK_ONE = "\n\nWhat is the special magic {kind} for {keys} that the text names?"
_ASK_ALL = "\n\nWhat are all the special magic {kind}s for {keys} that the text names?"
_OPEN_ONE = " The special magic {kind} for {keys} that the text names is"
_OPEN_ALL = " The special magic {kind}s for {keys} that the text names are"
_DEPTHS = 40  # places at which a fact may stand, evenly spaced, as in the paper


@dataclass(frozen=True)
class _Needles:
    """What a task hides.

    Args:
        hay: `noise`, one passage repeated; `essay`, running text; `facts`, other facts.
        kind: what a value is, `number` or `uuid`.
        uuid_keys: whether keys are uuids; otherwise two words.
        keys: number of keys that are hidden.
        values: number of values of each key that is asked for.
        asked: number of keys that are asked for.
    """

    hay: str
    kind: str = "number"
    uuid_keys: bool = False
    keys: int = 1
    values: int = 1
    asked: int = 1


NEEDLES: dict[str, _Needles] = {
    "niah_single_1": _Needles("noise"),
    "niah_single_2": _Needles("essay"),
    "niah_single_3": _Needles("essay", "uuid"),
    "niah_multikey_1": _Needles("essay", keys=4),
    "niah_multikey_2": _Needles("facts"),
    "niah_multikey_3": _Needles("facts", "uuid", uuid_keys=True),
    "niah_multivalue": _Needles("essay", values=4),
    "niah_multiquery": _Needles("essay", keys=4, asked=4),
}


def _random_uuid(rng: Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def hidden_needles(task: str, source: Source, tokens: int) -> Maker:
    """Makes cases of one of the eight tasks.

    Args:
        task: a name of `NEEDLES`.
        source: what cases are made of.
        tokens: tokens of an answer.
    """
    kind = NEEDLES[task]
    passage = [f"{word} " for word in NOISE_PASSAGE.split()]
    essay = words_of(running_text(source)) if kind.hay == "essay" else []

    def make(rng: Random) -> Made:
        names = keys_of(rng)

        def fact() -> tuple[str, str]:
            key = _random_uuid(rng) if kind.uuid_keys else next(names)
            return key, _random_uuid(rng) if kind.kind == "uuid" else str(rng.randrange(10**6, 10**7))

        needles: list[tuple[str, str]] = []
        for _ in range(kind.keys):
            key, value = fact()
            needles += [(key, value), *((key, fact()[1]) for _ in range(kind.values - 1))]
        facts = [_FACT.format(kind=kind.kind, key=key, value=value) for key, value in needles]
        depths = [i / (_DEPTHS - 1) for i in rng.sample(range(_DEPTHS), len(facts))]
        asked = rng.sample(list(dict.fromkeys(key for key, _ in needles)), kind.asked)
        answers = tuple(value for name in asked for key, value in needles if key == name)
        keys = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])} and {asked[-1]}"
        words = {"kind": kind.kind, "keys": keys}
        one = len(answers) == 1
        question = (_ASK_ONE if one else _ASK_ALL).format(**words)
        opening = (_OPEN_ONE if one else _OPEN_ALL).format(**words)
        first = stream_from(rng, essay or passage)
        others: list[str] = []  # words of other facts, as many as were wanted yet

        def hay(count: int) -> list[str]:
            if kind.hay != "facts":
                return first(count)
            while len(others) < count:
                key, value = fact()
                told = _FACT.format(kind=kind.kind, key=key, value=value)
                others.extend(f"{word} " for word in told.split())
            return others[:count]

        def build(count: int) -> str:
            return _INTRODUCTION.format(kind=kind.kind) + woven(hay(count), facts, depths)

        context = fitted(source, tokens, question + opening, build, f"ruler {task}")
        return Made(context, question, opening, answers)

    return make
