"""Asking over a cache: the words around a question, greedy writing that ends where the model ends, and the
bytes it was written from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cache.cache import LowkeyCache
from lowkey.cache.prefill import prefill
from lowkey.core.types import LowkeyError, device_of
from lowkey.evaluate.settings import Setting
from lowkey.storage.budgets import check_question

PLACEHOLDER = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for a message in a template
# (name, measure): what `measure` gives, or gave earlier under that name
Once = Callable[[str, Callable[[], Any]], Any]


def anew(name: str, measure: Callable[[], Any]) -> Any:
    return measure()


@dataclass(frozen=True)
class Frame:
    """Words around the user's only message and before the model's answer: `before` MESSAGE `after`. Both are
    empty without a template.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Frame:
        """The tokenizer's chat template, if it has one."""
        return cls(tokenizer, bool(getattr(tokenizer, "chat_template", None)))

    @cached_property
    def _parts(self) -> tuple[str, str]:
        if not self.chat:
            return "", ""
        before, found, after = self._templated([("user", PLACEHOLDER)], True).partition(PLACEHOLDER)
        if not found:
            raise LowkeyError(
                "tokenizer: its chat template leaves out the user's message; give a tokenizer with another "
                "template"
            )
        return before, after

    def _templated(self, turns: Iterable[tuple[str, str]], asks: bool) -> str:
        messages = [{"role": role, "content": words} for role, words in turns]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))

    def encode(self, words: str) -> list[int]:
        return self.tokenizer(words, add_special_tokens=False, verbose=False).input_ids

    @property
    def start(self) -> list[int]:
        """Ids before the message. A template brings its own beginning of text."""
        if self.chat:
            return self.encode(self._parts[0])
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    def question(self, words: str, opening: str = "") -> list[int]:
        """Ids of the end of the message, of what follows it in the template, and of the words that the answer
        is to begin with.
        """
        return self.encode(
            words + self._parts[1] + opening if self.chat else words + ("\n" + opening if opening else "")
        )

    def ends(self, model: PreTrainedModel) -> set[int]:
        """Ids that end an answer: those of the generation config, the tokenizer's, and what the template puts
        behind a model's turn, which either may leave out."""
        told = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        found = {*(told if isinstance(told, list) else [told]), self.tokenizer.eos_token_id}
        if self.chat:
            behind = self.encode(
                self._templated([("user", "?"), ("assistant", PLACEHOLDER)], False).partition(PLACEHOLDER)[2]
            )
            found |= set(behind[:1]) & set(self.tokenizer.all_special_ids)
        return {int(i) for i in found if i is not None}


@dataclass(frozen=True)
class Written:
    """What the model wrote, its end not among it, and the bytes that were held when it began: prompt and
    question.
    """

    ids: list[int]
    held: int


@torch.no_grad()
def write_answer(
    model: PreTrainedModel, cache: LowkeyCache, ids: Tensor, ends: set[int], most: int
) -> Written:
    """Greedy continuation of ids (1, t), of which the cache has those that it has seen; at most `most`
    tokens.
    """
    new, out = ids[:, cache.get_seq_length() :], []
    logits = model(new, past_key_values=cache, logits_to_keep=1).logits
    held = cache.nbytes()
    while (token := int(logits[0, -1].argmax())) not in ends:
        out.append(token)
        if len(out) == most:
            break
        logits = model(ids.new_tensor([[token]]), past_key_values=cache, logits_to_keep=1).logits
    return Written(out, held)


def check_budgets(settings: Sequence[Setting], refeed: bool, tokens: int, question: int) -> None:
    """Before anything is measured. Errors: LowkeyError for a setting whose budget does not hold a question
    that is to be asked again.
    """
    for setting in settings:
        if setting.evicts and (refeed or setting.needs_second_pass):
            policy = origin.policy if (origin := setting.make().origin) else None
            if policy is not None:
                check_question(policy, tokens, question)


def read_context(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    setting: Setting,
    ids: Tensor,
    question: int,
    refeed: bool,
) -> LowkeyCache:
    """A cache of the setting that is ready for `write_answer`. One that evicts has read ids (1, t) and chosen with
    the question, the last tokens, in view; with `refeed` it is to be asked again, else it reads all of it as
    the prompt, the question with it."""
    cache = setting.make()
    if setting.evicts and (refeed or setting.needs_second_pass):
        prefill(model, tokenizer, cache, ids, question)
    return cache


def tensor_of(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """(1, t)"""
    return torch.tensor([ids], device=device_of(model))
