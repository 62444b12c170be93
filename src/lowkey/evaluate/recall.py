"""1-hop recall: facts hidden in running text, asked for at the end.

A fact says ` Remember oak 482.`; its question is ` Recall oak` and the answer ` 482`. The key is the word right before
the value in both, so that any model which copies in context can answer and the score measures the cache, not knowledge.
Works on token ids, with any tokenizer and any haystack text. The embedded model was trained on the same sentences.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey import families
from lowkey.evaluate.settings import Setting
from lowkey.needles import KEYS, Encode, draw_facts, weave
from lowkey.needles import Fact as Fact
from lowkey.prefill import prefill
from lowkey.progress import Progress
from lowkey.types import LowkeyError, device_of


@dataclass(frozen=True)
class Episode:
    """`prompt` ends with the question; `answer` is the text that a correct model writes next."""

    prompt: list[int]
    question: list[int]
    answer: list[int]


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
    refeed: bool = True,
) -> dict[str, dict]:
    """Share of `cases` in which greedy decoding writes exactly the asked value, by the setting's name.

    A setting that evicts chooses with the question in view. refeed: the question is then asked again over what was kept, so that every
    token of the answer depends on it; else, as the papers of this field do, the question saw the whole context and the first token is free.
    """
    rng = random.Random(seed)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    episodes = [draw_episode(rng, encode, haystack, context) for _ in range(cases)]
    hits = {s.name: 0 for s in settings}
    for episode in progress(episodes, "recall"):
        for setting in settings:
            hits[setting.name] += answers(model, tokenizer, setting, episode, refeed)
    return {name: {"exact_match": count / cases} for name, count in hits.items()}


def check_positions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
    """Errors: LowkeyError for a context that leaves no room for a question, asked twice, and its answer."""
    fact = draw_facts(random.Random(0), 1)[0]
    asked, answer = (len(tokenizer(words, add_special_tokens=False).input_ids) for words in (fact.question, fact.answer))
    longest, room = families.positions(model), 1 + 2 * asked + answer
    if longest is not None and context + room > longest:
        raise LowkeyError(
            f"context {context}: a question and its answer take {room} tokens more, beyond the model's {longest} positions; "
            f"give at most {longest - room}, or another task than recall"
        )


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting, episode: Episode, refeed: bool) -> bool:
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.tensor([start + episode.prompt], device=device_of(model))
    cache = setting.make()
    if setting.evicts and (refeed or setting.repeats):
        prefill(model, tokenizer, cache, ids, len(episode.question))
    out = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=len(episode.answer),
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist() == episode.answer
