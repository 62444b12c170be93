"""Generate text over a chosen cache, and report what the cache held."""

from __future__ import annotations

import time
from typing import Any, TextIO

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lowkey.cache.cache import LowkeyCache, make_cache
from lowkey.cache.prefill import prefill
from lowkey.core import text
from lowkey.core.printable import printable
from lowkey.core.types import LowkeyError, device_of
from lowkey.models import families


class _StreamWriter(TextStreamer):
    """Writes new text to a stream as it comes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of text that will not change any more."""
        print(printable(text), flush=True, end="\n" if stream_end else "", file=self.out)


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    cache: LowkeyCache,
    tokens: int,
    out: TextIO | None,
) -> dict:
    """Continue a prompt greedily over a new cache.

    Args:
        model: an attached model.
        tokenizer: the model's tokenizer.
        prompt: the text to continue.
        cache: a cache that holds nothing yet.
        tokens: how many new tokens to generate, at most.
        out: gets the text as it comes; None for nowhere.

    Returns:
        `text`; `new_tokens`; `tokens_per_s`; `bytes_held`, of the cache at the end; `bytes_full`, of
        transformers' own cache with as many tokens.

    Raises:
        LowkeyError: for an empty prompt, or for more tokens than the model has positions.
    """
    text.check_unicode("prompt", prompt)
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device_of(model))
    if not ids.shape[1]:
        raise LowkeyError("prompt '': is empty; give some text to continue")
    text.check_ids(ids, model)
    longest = families.max_positions(model)
    if longest is not None and ids.shape[1] + tokens > longest:
        remedy = (
            f"give at most {longest - ids.shape[1]}" if ids.shape[1] < longest else "give a shorter prompt"
        )
        raise LowkeyError(
            f"tokens {tokens}: after a prompt of {ids.shape[1]} they exceed the model's {longest} "
            f"positions; {remedy}"
        )
    start = time.perf_counter()
    policy = cache.origin.policy_in_use if cache.origin else None
    if policy is not None and policy.needs_second_pass:
        if ids.shape[1] > 1:
            # The last token is kept back as the question: `generate` reads it for the token that follows.
            prefill(model, tokenizer, cache, ids, question=1)
        cache.freeze()  # a prompt of a single token has no context to repeat
    generator: Any = model  # `generate` comes from a mixin that its annotations do not name
    result = generator.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        streamer=_StreamWriter(tokenizer, out) if out is not None else None,
    )[0]
    seconds, new = time.perf_counter() - start, len(result) - ids.shape[1]
    return {
        "text": tokenizer.decode(result[ids.shape[1] :], skip_special_tokens=True),
        "new_tokens": new,
        "tokens_per_s": new / seconds,
        "bytes_held": cache.nbytes(),
        "bytes_full": full_cache_bytes(model, cache),
    }


@torch.no_grad()
def full_cache_bytes(model: PreTrainedModel, cache: LowkeyCache) -> int:
    """Return the bytes of transformers' own cache with as many tokens, measured on a real one."""
    stock = make_cache(model)
    filler = torch.zeros(1, cache.get_seq_length(), dtype=torch.long, device=device_of(model))
    model(filler, past_key_values=stock, logits_to_keep=1)
    return stock.nbytes()
