"""Fill a cache as its policy wants it filled."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cache import LowkeyCache
from lowkey.policies.base import Policy


@torch.no_grad()
def prefill(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: LowkeyCache, ids: Tensor, question: int = 0) -> None:
    """Read ids (b, t) into the cache and evict.

    question: so many tokens at the end only say what to keep; they are not stored and are to be given again, with what follows.
    A policy that repeats its context (KVzip) does without them. After a question or a repetition the cache evicts nothing more.
    """
    policy = cache.origin.policy if cache.origin else None
    if policy is not None and policy.repeats:
        _repeated(model, tokenizer, cache, ids[:, : ids.shape[1] - question], policy)
        return
    cache.only_look(question)
    model(ids, past_key_values=cache, logits_to_keep=1)
    cache.only_look(0)
    if question:
        cache.freeze()


def _repeated(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: LowkeyCache, ids: Tensor, policy: Policy) -> None:
    """Read everything, let the model see each piece again behind a request to repeat it, then evict by what was looked at."""
    asking = tokenizer(policy.prompt, add_special_tokens=False, return_tensors="pt").input_ids.to(ids.device).expand(len(ids), -1)  # type: ignore[attr-defined]
    chunk, bridge = policy.chunk, policy.bridge  # type: ignore[attr-defined]
    cache.freeze()
    begin = int(cache.get_seq_length())  # of the text, behind what the cache already held
    model(ids, past_key_values=cache, logits_to_keep=1)
    for start in range(0, ids.shape[1], chunk):
        again = torch.cat([asking, ids[:, max(0, start - bridge) : start + chunk]], 1)
        piece = (begin + start, begin + min(start + chunk, ids.shape[1]))
        cache.only_look(again.shape[1], piece if policy.softmax == "piece" else (0, begin + ids.shape[1]))  # type: ignore[attr-defined]
        model(again, past_key_values=cache, logits_to_keep=1)
    cache.only_look(0)
    cache.freeze(False)
    for layer in cache.evicting:
        layer.evict()
    cache.freeze()
