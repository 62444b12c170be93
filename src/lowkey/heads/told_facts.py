"""Texts with facts in them, for what policies learn: a novel alone never says what a number or a name is."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowkey.heads.needles import sentence_ends, weave

# Neither a key, nor a wording, nor a number of so many digits stands in a task that lowkey measures with, so
# that nothing which learns from these facts has seen the tasks.
# fmt: off
TOWNS = [
    "Paris", "Vienna", "Oxford", "Lisbon", "Boston", "Geneva", "Dublin", "Madrid", "Bombay", "Naples",
    "Venice", "Berlin", "Athens", "Moscow", "Quebec", "Havana", "Prague", "Bremen", "Cairo", "Delhi",
    "Milan", "Turin", "Leeds", "York", "Bath", "Rome", "Lyon", "Basel", "Dover", "Derby", "Cadiz", "Lima",
]
# fmt: on
WORDINGS = (
    " Nobody in {key} had more than {value} guests.",
    " The road to {key} is {value} yards long.",
    "\n{key} = {value}\n",
    " In {key} they counted {value} sheep.",
    " (See {key}, page {value}.)",
)
DIGITS = (2, 4, 6)


def with_facts(rows: Tensor, tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> Tensor:
    """Windows of text, each with random facts between its sentences.

    Args:
        rows: ids (n, t); each begins with the tokenizer's beginning-of-text token, if it has one.
        tokenizer: the tokenizer.
        count: facts of each window, at most as many as there are `TOWNS`; 0 changes nothing.
        seed: of the facts and their places.

    Returns:
        Ids (n, t): as much less of each text as its facts take.

    Raises:
        LowkeyError: the facts alone are longer than a window.
    """
    if not count:
        return rows
    rng, out = random.Random(seed), []
    first = 0 if tokenizer.bos_token_id is None else 1
    for row in rows.tolist():
        words = [
            rng.choice(WORDINGS).format(key=key, value="".join(rng.choices("0123456789", k=digits)))
            for key, digits in zip(rng.sample(TOWNS, count), rng.choices(DIGITS, k=count), strict=True)
        ]
        facts = [tokenizer(said, add_special_tokens=False).input_ids for said in words]
        body = row[first:]
        out.append(row[:first] + weave(rng, body, facts, len(body), sentence_ends(tokenizer, body)))
    return torch.tensor(out)
