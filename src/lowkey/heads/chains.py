"""Chains of look-ups with answers that can be verified, for any tokenizer.

A prompt lists pairs of words in random order, then words that mean nothing, then a question:

    oak river. lamp gold. river lamp. ... then well so. Follow oak:

The answer is written out look-up by look-up, and its last word is what counts:

    river lamp gold = gold.

Every look-up needs the pair that begins with the word just written, so a cache that has lost the pair breaks
the chain while it is written. The last word of a chain is no key, and each chain of a prompt has its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowkey.core import text
from lowkey.core.errors import LowkeyError
from lowkey.core.options import Checked, option
from lowkey.heads.needles import KEYS, Encode

# fmt: off
CHAIN_ENDS = [
    "red", "blue", "black", "grey", "brown", "pink", "gold", "purple", "rose", "amber", "scarlet", "violet",
    "white", "green", "olive", "copper", "ivory", "coral", "indigo", "crimson", "maroon", "beige", "cream",
    "bronze",
]
FILLER = ["well", "then", "again", "here", "there", "now", "so", "on"]
# fmt: on
STOP, EQUALS = ".", "="  # what ends an answer, and what stands before its value


@dataclass(frozen=True)
class ChainTask(Checked):
    """How chains are drawn.

    Args:
        pairs: number of pairs in the table.
        shortest: fewest look-ups of the chain that is asked for. No other chain of the table is longer.
        longest: most look-ups of the chain that is asked for.
        filler: number of tokens between the table and the question, unless the length of a prompt is given.
    """

    pairs: int = option(24, at_least=1, at_most=len(KEYS))
    shortest: int = option(4, at_least=1, at_most=len(KEYS))
    longest: int = option(8, at_least=1, at_most=len(KEYS))
    filler: int = option(32, at_least=0, at_most=2**20)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shortest <= self.longest <= self.pairs:
            raise LowkeyError(
                f"shortest {self.shortest}, longest {self.longest}, pairs {self.pairs}: a chain "
                "takes from shortest to longest pairs of the table; give more pairs or shorter chains"
            )


@dataclass(frozen=True)
class Table:
    """Pairs of words that make chains.

    Args:
        chains: the words of each chain: its keys in order, then its end. The first is long enough to be asked
            for.
        pairs: (key, next word) of all chains, in the order in which they are told.
    """

    chains: tuple[tuple[str, ...], ...]
    pairs: tuple[tuple[str, str], ...]

    @property
    def statement(self) -> str:
        """The text of all pairs."""
        return "".join(f" {key} {word}{STOP}" for key, word in self.pairs)


def draw_table(rng: random.Random, task: ChainTask) -> Table:
    """Draw a table whose first chain has from `shortest` to `longest` look-ups.

    The other pairs make chains of up to `shortest` look-ups, as far as there are ends.
    """
    keys, ends = iter(rng.sample(KEYS, task.pairs)), iter(rng.sample(CHAIN_ENDS, len(CHAIN_ENDS)))
    sizes, left = [rng.randint(task.shortest, task.longest)], len(CHAIN_ENDS)
    while (rest := task.pairs - sum(sizes)) > 0:
        left -= 1  # chains that may still follow
        sizes.append(rest if left == 1 else min(rest, rng.randint(1, task.shortest)))
    chains = [(*(next(keys) for _ in range(size)), next(ends)) for size in sizes]
    pairs = [pair for chain in chains for pair in pairwise(chain)]
    return Table(tuple(chains), tuple(rng.sample(pairs, len(pairs))))


def question_of(key: str) -> str:
    """The words that ask for the chain from a key on."""
    return f" Follow {key}:"


def answer_of(words: Sequence[str]) -> str:
    """The right answer.

    Args:
        words: all words of the chain behind the key that is asked for; the last is the value.
    """
    return "".join(f" {word}" for word in words) + f" {EQUALS} {words[-1]}{STOP}"


@dataclass(frozen=True)
class Chain:
    """One case.

    Args:
        prompt: ids, which end with the question.
        question: number of ids of the question.
        answer: ids of the right answer.
        words: all words of the answer before its value stands again.
    """

    prompt: list[int]
    question: int
    answer: list[int]
    words: tuple[str, ...]

    @property
    def value(self) -> str:
        """The word at the end of the chain."""
        return self.words[-1]

    def right(self, written: str) -> bool:
        """Whether a text is an answer that ends, and its value is the right one. This is the reward."""
        sentence, stop, _ = written.partition(STOP)
        _, equals, value = sentence.rpartition(EQUALS)
        return bool(stop and equals) and value.strip() == self.value

    def links(self, written: str) -> int:
        """How many look-ups a text has right before its first mistake."""
        said = written.partition(STOP)[0].partition(EQUALS)[0].split()
        right = [a == b for a, b in zip(said, self.words, strict=False)]
        return next((i for i, same in enumerate(right) if not same), len(right))


def draw_chain(
    rng: random.Random,
    encode: Encode,
    task: ChainTask = ChainTask(),
    start: Sequence[int] = (),
    length: int | None = None,
    haystack: Sequence[int] = (),
) -> Chain:
    """Draw one case.

    Args:
        rng: source of random numbers.
        encode: ids of a text, without special tokens.
        task: how chains are drawn.
        start: ids before the table, like the beginning-of-text token.
        length: number of ids of the prompt, which filler fills; None for `task.filler` ids of filler.
        haystack: ids of running text that the filler is cut from; empty for words of `FILLER`.

    Raises:
        LowkeyError: the table and the question alone are longer than `length`, or the haystack is too short.
    """
    table = draw_table(rng, task)
    told, asked = encode(table.statement), encode(question_of(table.chains[0][0]))
    taken = len(start) + len(told) + len(asked)
    room = task.filler if length is None else length - taken
    if room < 0:
        raise LowkeyError(
            f"context {length}: {task.pairs} pairs and a question take {taken} tokens; give a longer context "
            "or fewer pairs"
        )
    words = table.chains[0][1:]
    prompt = [*start, *told, *_filler(rng, encode, room, haystack), *asked]
    return Chain(prompt, len(asked), encode(answer_of(words)), words)


def _filler(rng: random.Random, encode: Encode, room: int, haystack: Sequence[int]) -> list[int]:
    """So many ids that mean nothing."""
    if haystack:
        if len(haystack) < room:
            raise LowkeyError(f"data: {len(haystack)} tokens cannot fill {room}; give a longer text")
        first = rng.randrange(len(haystack) - room + 1)
        return list(haystack[first : first + room])
    # every word takes a token at least
    return encode("".join(f" {rng.choice(FILLER)}" for _ in range(room)))[:room]


def draw_chains(
    tokenizer: PreTrainedTokenizerBase,
    cases: int,
    seed: int = 0,
    task: ChainTask = ChainTask(),
    length: int | None = None,
) -> list[Chain]:
    """Cases behind the tokenizer's beginning-of-text token; each depends on its number and the seed alone.

    Args:
        tokenizer: any tokenizer.
        cases: number of cases.
        seed: seed of the cases.
        task: how chains are drawn.
        length: number of ids of every prompt; None lets tables and `task.filler` decide.

    Raises:
        LowkeyError: see `draw_chain`.
    """

    def encode(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False, verbose=False).input_ids

    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [
        draw_chain(random.Random(f"{seed} {number}"), encode, task, start, length) for number in range(cases)
    ]


def stopping_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
    """Which of so many ids end an answer (vocabulary): those with a full stop, and the end of the text."""
    known = range(min(vocabulary, text.vocabulary(tokenizer)))
    pieces = tokenizer.batch_decode([[i] for i in known])
    ends = torch.zeros(vocabulary, dtype=torch.bool)
    ends[: len(pieces)] = torch.tensor([STOP in piece for piece in pieces])
    if tokenizer.eos_token_id is not None:
        ends[tokenizer.eos_token_id] = True
    return ends
