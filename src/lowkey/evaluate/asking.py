"""Ask a model over a cache: the prompt around a question, greedy writing that ends where the model ends, and
the bytes that the answer was written from.
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
# Called with a name and a measurement: what the measurement gives, or gave earlier under that name.
Once = Callable[[str, Callable[[], Any]], Any]


def anew(name: str, measure: Callable[[], Any]) -> Any:
    """Measure without looking for an earlier value: the `Once` of a caller that saves nothing."""
    return measure()


@dataclass(frozen=True)
class Frame:
    """What stands before and after the user's only message: `before` MESSAGE `after`.

    Both parts are empty without a chat template.

    Args:
        tokenizer: the tokenizer.
        chat: whether the tokenizer's chat template is used.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Frame:
        """The frame of the tokenizer's chat template, or an empty one if it has none."""
        return cls(tokenizer, bool(getattr(tokenizer, "chat_template", None)))

    @cached_property
    def _parts(self) -> tuple[str, str]:
        """The text before and after a message.

        Raises:
            LowkeyError: the template leaves out the user's message.
        """
        if not self.chat:
            return "", ""
        before, placeholder, after = self._templated([("user", PLACEHOLDER)], True).partition(PLACEHOLDER)
        if not placeholder:
            raise LowkeyError(
                "tokenizer: its chat template leaves out the user's message; give a tokenizer with another "
                "template"
            )
        return before, after

    def _templated(self, turns: Iterable[tuple[str, str]], asks: bool) -> str:
        """Messages in the chat template.

        Args:
            turns: (role, content) of each message.
            asks: whether the beginning of the model's turn is added.
        """
        messages = [{"role": role, "content": words} for role, words in turns]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))

    def encode(self, words: str) -> list[int]:
        """Ids of `words`, without special tokens."""
        return self.tokenizer(words, add_special_tokens=False, verbose=False).input_ids

    @property
    def start(self) -> list[int]:
        """Ids before the message. A template brings its own beginning-of-text token."""
        if self.chat:
            return self.encode(self._parts[0])
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    def question(self, words: str, opening: str = "") -> list[int]:
        """Ids of the end of a prompt.

        Args:
            words: the last words of the message.
            opening: words that the answer is to begin with.

        Returns:
            Ids of `words`, of what the template puts after the message, and of `opening`.
        """
        if self.chat:
            return self.encode(words + self._parts[1] + opening)
        return self.encode(words + ("\n" + opening if opening else ""))

    def ends(self, model: PreTrainedModel) -> set[int]:
        """Ids that end an answer: those of the generation config, the tokenizer's, and the special token that
        the template puts after a model's turn. Either of the first two may leave some out.
        """
        configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = {*(configured if isinstance(configured, list) else [configured]), self.tokenizer.eos_token_id}
        if self.chat:
            # The template is rendered with a finished answer, and what follows the answer is looked at. Only
            # a special token counts: templates may put plain text there.
            messages = self._templated([("user", "?"), ("assistant", PLACEHOLDER)], False)
            behind = self.encode(messages.partition(PLACEHOLDER)[2])
            ends |= set(behind[:1]) & set(self.tokenizer.all_special_ids)
        return {int(i) for i in ends if i is not None}


@dataclass(frozen=True)
class Written:
    """What the model wrote.

    Args:
        ids: ids of the answer, without the id that ended it.
        held: bytes of the cache when the answer began: prompt and question.
    """

    ids: list[int]
    held: int


@torch.no_grad()
def write_answer(
    model: PreTrainedModel, cache: LowkeyCache, ids: Tensor, ends: set[int], most: int
) -> Written:
    """Continue ids greedily.

    Args:
        model: the model, attached.
        cache: has seen the first ids, or none.
        ids: (1, t), of which those that the cache has not seen are read.
        ends: ids that end the answer.
        most: number of tokens that are written at most.
    """
    # a question that the cache has not stored is read here, and the answer begins behind it
    new, out = ids[:, cache.get_seq_length() :], []
    with cache.reading(new):
        logits = model(new, past_key_values=cache, logits_to_keep=1).logits
    held = cache.nbytes()
    while (token := int(logits[0, -1].argmax())) not in ends:
        out.append(token)
        if len(out) == most:
            break
        new = ids.new_tensor([[token]])
        with cache.reading(new):
            logits = model(new, past_key_values=cache, logits_to_keep=1).logits
    return Written(out, held)


def check_budgets(settings: Sequence[Setting], refeed: bool, tokens: int, question: int) -> None:
    """Check that budgets hold a question that is asked again, before anything is measured.

    Args:
        settings: the settings.
        refeed: whether the question is asked again.
        tokens: tokens of the prompt with the question.
        question: tokens of the question.

    Raises:
        LowkeyError: a setting's budget does not hold the question.
    """
    for setting in settings:
        if setting.evicts and (refeed or setting.needs_second_pass):
            cache = setting.make()
            policy = cache.origin.policy_in_use if cache.origin else None
            if policy is not None:
                check_question(policy, tokens, question, cache.evicting[0].exact)


def read_context(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    setting: Setting,
    ids: Tensor,
    question: int,
    refeed: bool,
    answer: Sequence[int] = (),
) -> LowkeyCache:
    """A cache of the setting that is ready for `write_answer`.

    A setting that does not evict, or whose question is not asked again, gives an empty cache: `write_answer`
    then reads the whole prompt.

    Args:
        model: the model, attached.
        tokenizer: its tokenizer.
        setting: the setting.
        ids: (1, t), the prompt, which ends with the question.
        question: tokens of the question.
        refeed: whether a setting that evicts chooses with the question in view and is then asked again over
            what it kept. Otherwise the question is read as a part of the prompt.
        answer: ids of the right answer, for a setting that is shown it. It is asked again over what it kept.
    """
    cache = setting.make()
    if setting.sees_answer:
        shown = torch.cat([ids, tensor_of(model, list(answer))], 1)
        prefill(model, tokenizer, cache, shown, question + len(answer))
    elif setting.evicts and (refeed or setting.needs_second_pass):
        prefill(model, tokenizer, cache, ids, question)
    return cache


def tensor_of(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Ids as a tensor (1, t) on the model's device."""
    return torch.tensor([ids], device=device_of(model))
