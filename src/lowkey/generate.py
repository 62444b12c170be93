"""Generate text over a chosen cache, and report what the cache held."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lowkey.cache.cache import LowkeyCache, make_cache
from lowkey.cache.prefill import prefill
from lowkey.core import text
from lowkey.core.options import shown
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
    draft: int = 0,
) -> dict:
    """Continue a prompt greedily over a new cache.

    Args:
        model: an attached model.
        tokenizer: the model's tokenizer.
        prompt: the text to continue.
        cache: a cache that holds nothing yet.
        tokens: how many new tokens to generate, at most.
        out: gets the text as it comes; None for nowhere.
        draft: if not 0, the cache only drafts so many tokens at a time; see `generate_verified`.

    Returns:
        `text`; `new_tokens`; `tokens_per_s`; `bytes_held`, of the cache at the end; `bytes_full`, of
        transformers' own cache with as many tokens. With `draft` also `verifications` and
        `accepted_per_verification`. Beside a small model also `bytes_small_cache`, which `bytes_held`
        includes, `bytes_small_weights`, which it does not, and `bytes_host`, the part of `bytes_held` that
        was moved to host memory.

    Raises:
        LowkeyError: for an empty prompt, or for more tokens than the model has positions.
    """
    text.check_unicode("prompt", prompt)
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device_of(model))
    if not ids.shape[1]:
        raise LowkeyError("prompt '': is empty; give some text to continue")
    text.check_ids(ids, model)
    _check_positions(model, ids, tokens)
    start = time.perf_counter()
    streamer = _StreamWriter(tokenizer, out) if out is not None else None
    if draft:
        verified = generate_verified(model, tokenizer, cache, ids, tokens, draft, streamer)
        return _summary(model, tokenizer, cache, verified.ids, time.perf_counter() - start) | {
            "verifications": len(verified.accepted),
            "accepted_per_verification": verified.accepted_per_verification,
        }
    if cache.small is not None:
        new = _continued_by_both(model, cache, ids, tokens, streamer)
        return _summary(model, tokenizer, cache, new, time.perf_counter() - start)
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
        streamer=streamer,
    )[0]
    return _summary(model, tokenizer, cache, result[ids.shape[1] :], time.perf_counter() - start)


def _summary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: LowkeyCache,
    new: Tensor,
    seconds: float,
) -> dict:
    """What `stream_text` returns, given the new tokens (n)."""
    beside = {}
    if cache.small is not None:
        beside = {
            "bytes_small_cache": cache.small_nbytes(),
            "bytes_small_weights": cache.small_weights_nbytes(),
            "bytes_host": cache.host_nbytes(),
        }
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "new_tokens": len(new),
        "tokens_per_s": len(new) / seconds,
        "bytes_held": cache.nbytes(),
        "bytes_full": full_cache_bytes(model, cache),
        **beside,
    }


@torch.no_grad()
def _continued_by_both(
    model: PreTrainedModel, cache: LowkeyCache, ids: Tensor, tokens: int, streamer: TextStreamer | None
) -> Tensor:
    """New ids (n) that continue a prompt (1, t) greedily, while a small model reads along."""
    stops, new, unread = _stops(model), list[int](), ids
    if streamer is not None:
        streamer.put(ids[0])
    while len(new) < tokens and (not new or new[-1] not in stops):
        with cache.reading(unread):
            logits = model(unread, past_key_values=cache, logits_to_keep=1).logits
        new.append(int(logits[0, -1].argmax()))
        unread = ids.new_tensor([new[-1:]])
        if streamer is not None:
            streamer.put(unread[0])
    if streamer is not None:
        streamer.end()
    return ids.new_tensor(new)


def _stops(model: PreTrainedModel) -> set[int | None]:
    """The ids that end a text."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return set(ends) if isinstance(ends, list) else {ends}


def _check_positions(model: PreTrainedModel, ids: Tensor, tokens: int) -> None:
    """Refuse more new tokens behind a prompt (b, t) than the model has positions. Raises: LowkeyError."""
    longest = families.max_positions(model)
    if longest is not None and ids.shape[1] + tokens > longest:
        remedy = (
            f"give at most {longest - ids.shape[1]}" if ids.shape[1] < longest else "give a shorter prompt"
        )
        raise LowkeyError(
            f"tokens {tokens}: after a prompt of {ids.shape[1]} they exceed the model's {longest} "
            f"positions; {remedy}"
        )


@dataclass(frozen=True)
class Verified:
    """What `generate_verified` found.

    Args:
        ids: (n), the new tokens.
        accepted: how many drafted tokens each verification found right.
        drafted: how many tokens were drafted for each.
    """

    ids: Tensor
    accepted: tuple[int, ...]
    drafted: tuple[int, ...]

    @property
    def accepted_per_verification(self) -> float:
        """The mean of `accepted`; each verification brings one more token, which the full cache chooses."""
        return sum(self.accepted) / max(1, len(self.accepted))


@torch.no_grad()
def generate_verified(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: LowkeyCache,
    ids: Tensor,
    tokens: int,
    draft: int = 4,
    streamer: TextStreamer | None = None,
) -> Verified:
    """Decode greedily as over the full cache, with a compressed cache that drafts (an experiment).

    The compressed cache drafts a few tokens one by one. The full cache then reads all of them in one forward
    pass, and those stay that it would have chosen itself, with the next one of its own. The full cache lies
    in CPU memory and visits the device layer by layer, once for each verification. Where two tokens are tied
    to within rounding, a pass over several tokens may choose another one than a step does.

    Of `model.generation_config` only the end tokens are used. Its logits processors (a repetition penalty,
    forbidden words, a least length) change nothing here.

    Args:
        model: an attached model.
        tokenizer: the model's; policies that have their context repeated need it.
        cache: from `make_cache`, without tokens.
        ids: (1, t), the prompt.
        tokens: new tokens, at most.
        draft: tokens that are drafted for each verification.
        streamer: gets the tokens as they are verified; None for none.

    Returns:
        The new tokens, and how many drafted ones each verification accepted.

    Raises:
        LowkeyError: for several rows, a used cache, no room for so many tokens, or a `draft` below 1.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1 or not ids.shape[1]:
        what = f"of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else shown(ids)
        raise LowkeyError(
            f"ids {what}: rows accept different numbers of drafted tokens; give one row of token ids, (1, "
            "tokens)"
        )
    for name, value in (("tokens", tokens), ("draft", draft)):
        if type(value) is not int or value < 1:
            raise LowkeyError(f"{name} {value!r}: give 1 or more")
    _check_positions(model, ids, tokens)
    prefill(model, tokenizer, cache, ids)
    # transformers' own cache keeps what does not take part in a layer's attention in CPU memory
    full = DynamicCache(config=model.config, offloading=ids.is_cuda)
    new = [int(model(ids, past_key_values=full, logits_to_keep=1).logits[0, -1].argmax())]
    full.activate_past_recording()
    stops = _stops(model)
    if streamer is not None:
        streamer.put(ids[0])
        streamer.put(torch.tensor(new))
    unread, accepted, drafted = list(new), [], []
    while len(new) < tokens and new[-1] not in stops:
        count = min(draft, tokens - len(new) - 1)
        with cache.recording():
            guesses = _drafted(model, cache, unread, count, ids)
            seen = ids.new_tensor([[new[-1], *guesses]])
            wanted = model(seen, past_key_values=full).logits[0].argmax(-1).tolist()
            right = next((i for i, guess in enumerate(guesses) if guess != wanted[i]), count)
            full.crop(right - count)
            # the cache has not read its last guess
            cache.crop(min(0, right - (count - 1)))
        found = [*guesses[:right], wanted[right]]
        found = found[: next((i + 1 for i, token in enumerate(found) if token in stops), len(found))]
        unread = [*(guesses[-1:] if count else unread), wanted[right]] if right == count else [wanted[right]]
        accepted.append(right)
        drafted.append(count)
        new += found
        if streamer is not None:
            streamer.put(torch.tensor(found))
    if streamer is not None:
        streamer.end()
    return Verified(ids.new_tensor(new), tuple(accepted), tuple(drafted))


def _drafted(
    model: PreTrainedModel, cache: LowkeyCache, unread: list[int], count: int, ids: Tensor
) -> list[int]:
    """Greedy guesses over a cache that reads `unread` first; none if `count` is 0."""
    guesses: list[int] = []
    for _ in range(count):
        for token in guesses[-1:] or unread:
            logits = model(ids.new_tensor([[token]]), past_key_values=cache, logits_to_keep=1).logits
        guesses.append(int(logits[0, -1].argmax()))
    return guesses


@torch.no_grad()
def full_cache_bytes(model: PreTrainedModel, cache: LowkeyCache) -> int:
    """Return the bytes of transformers' own cache with as many tokens, measured on a real one."""
    stock = make_cache(model)
    filler = torch.zeros(1, cache.get_seq_length(), dtype=torch.long, device=device_of(model))
    model(filler, past_key_values=stock, logits_to_keep=1)
    return stock.nbytes()
