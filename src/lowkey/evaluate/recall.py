"""1-hop recall: facts hidden in running text, asked for at the end.

A fact says ` Remember oak 482.`; its question is ` Recall oak` and the answer ` 482`. The key is the word right before
the value in both, so that any model which copies in context can answer and the score measures the cache, not knowledge.
Works on token ids, with any tokenizer and any haystack text. The embedded model was trained on the same sentences.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.evaluate.settings import Setting
from lowkey.progress import Progress
from lowkey.types import LowkeyError, device_of

# One-word nouns; the embedded model knows these as keys (each, with its leading space, is a single token of it).
# fmt: off
KEYS = [
    "oak", "river", "door", "lamp", "horse", "bread", "chair", "ship", "stone", "garden", "clock", "window",
    "bridge", "candle", "mirror", "table", "forest", "paper", "silver", "letter", "mountain", "cousin", "doctor", "island",
    "kitchen", "market", "orange", "pencil", "queen", "rabbit", "school", "tower", "village", "winter", "yellow", "apple",
    "basket", "castle", "dragon", "engine", "feather", "guitar", "hammer", "insect", "jacket", "kettle", "ladder", "monkey",
]
# fmt: on

Encode = Callable[[str], list[int]]


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


def draw_facts(rng: random.Random, count: int, keys: Sequence[str] = KEYS) -> list[Fact]:
    """`count` facts with distinct keys and three-digit values."""
    return [Fact(key, f"{rng.randrange(1000):03d}") for key in rng.sample(list(keys), count)]


@dataclass(frozen=True)
class Episode:
    """`prompt` ends with the question; `answer` is the text that a correct model writes next."""

    prompt: list[int]
    question: list[int]
    answer: list[int]


def weave(rng: random.Random, haystack: Sequence[int], inserts: Sequence[Sequence[int]], length: int) -> list[int]:
    """Exactly `length` ids: a random stretch of `haystack` with `inserts` put in, in order, at random places."""
    room = length - sum(map(len, inserts))
    if room < 0:
        raise LowkeyError(f"context {length}: {len(inserts)} facts alone take {length - room} tokens; give a longer context")
    if len(haystack) < room:
        raise LowkeyError(f"data: {len(haystack)} tokens cannot fill a context of {length}; give a longer text or a shorter context")
    start = rng.randrange(len(haystack) - room + 1)
    cuts = [0, *sorted(rng.randrange(room + 1) for _ in inserts), room]
    out: list[int] = []
    for i, (a, b) in enumerate(itertools.pairwise(cuts)):
        out += haystack[start + a : start + b]
        out += inserts[i] if i < len(inserts) else []
    return out


def draw_episode(
    rng: random.Random, encode: Encode, haystack: Sequence[int], context: int, facts: int = 8, keys: Sequence[str] = KEYS
) -> Episode:
    """One case of `context` ids (beginning-of-text and question not counted) with `facts` facts, one of them asked."""
    drawn = draw_facts(rng, facts, keys)
    asked = rng.choice(drawn)
    body = weave(rng, haystack, [encode(f.statement) for f in drawn], context)
    question = encode(asked.question)
    return Episode(body + question, question, encode(asked.answer))


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Setting],
    haystack: Sequence[int],
    context: int,
    cases: int,
    seed: int,
    progress: Progress,
) -> dict[str, dict]:
    """Share of `cases` in which greedy decoding writes exactly the asked value, by the setting's name."""
    rng = random.Random(seed)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    episodes = [draw_episode(rng, encode, haystack, context) for _ in range(cases)]
    hits = {s.name: 0 for s in settings}
    for episode in progress(episodes, "recall"):
        for setting in settings:
            hits[setting.name] += _answers(model, tokenizer, setting, episode)
    return {name: {"exact_match": count / cases} for name, count in hits.items()}


def _answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting, episode: Episode) -> bool:
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.tensor([start + episode.prompt], device=device_of(model))
    wanted = len(episode.answer)
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), past_key_values=setting.make(), max_new_tokens=wanted, do_sample=False, pad_token_id=0
    )
    return out[0, ids.shape[1] :].tolist() == episode.answer
