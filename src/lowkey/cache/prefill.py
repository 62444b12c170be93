"""Fills a cache with a prompt as the policy of the cache wants it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cache.cache import LowkeyCache
from lowkey.core import text
from lowkey.core.types import LowkeyError
from lowkey.policies import policy_name
from lowkey.policies.base import Policy, SecondPass
from lowkey.storage.budgets import budget_of, check_question


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: LowkeyCache,
    ids: Tensor,
    question: int = 0,
    attention_mask: Tensor | None = None,
    chunk: int | None = None,
) -> None:
    """Read a prompt into a fresh cache and evict.

    The result for a sequence does not depend on the others of the batch. After a question, or with a policy
    that has its context repeated, the cache evicts nothing more.

    Args:
        model: an attached model.
        tokenizer: the model's; policies that have their context repeated need it for the request.
        cache: from `make_cache`, without tokens.
        ids: (b, t), token ids.
        question: so many tokens at the end only choose what is kept. They are not stored; they are to be
            given again, with what follows them. The budget counts them as if they had been. A policy that has
            its context repeated (KVzip) chooses without them.
        attention_mask: (b, t), 1 for tokens and 0 for padding, which must come first; None for no padding.
        chunk: tokens that are read at a time; None for all at once. A policy evicts after every chunk, so
            that memory stays bounded and what it keeps may be another. The question is read with the last.

    Raises:
        LowkeyError: before anything is read: for a used cache, a question that leaves a sequence without
            context or does not fit into the budget, padding in another place, or chunks for a policy that
            has its context repeated.
    """
    policy = _policy_of(cache, question)
    mask = _checked(ids, question, attention_mask)
    if cache.small is not None and not bool(mask.all()):
        raise LowkeyError(
            "attention_mask: a small model reads along only without padding; give rows of one length, or a "
            "cache for each"
        )
    # (a percentage always fits: sinks and recent tokens stay even if it is less)
    if policy is not None and budget_of(policy).unit == "tokens":
        check_question(policy, int(mask.sum(1).min()), question, cache.evicting[0].exact)
    text.check_ids(ids, model)
    starts = _chunk_starts(mask, question, chunk)
    if len(starts) > 1 and policy is not None and policy.second_pass is not None:
        raise LowkeyError(
            f"chunk {chunk}: policy {policy_name(policy)!r} reads the whole context twice; leave chunk out"
        )
    with cache.all_or_nothing():
        # the question is not stored now, but the budget must hold it when it is given again
        cache.expect(question)
        if policy is not None and (second_pass := policy.second_pass) is not None:
            context = ids.shape[1] - question
            _repeated(model, tokenizer, cache, ids[:, :context], mask[:, :context], second_pass)
        else:
            for start, end in pairwise([*starts, ids.shape[1]]):
                cache.score_only(question if end == ids.shape[1] else 0)
                read(model, cache, ids[:, start:end], mask[:, :end])
            cache.score_only(0)
        if question:
            cache.freeze()
        cache.expect(0)


def _policy_of(cache: LowkeyCache, question: int) -> Policy | None:
    """The policy of an empty cache. Raises: LowkeyError for any other, or a question without a policy."""
    if not isinstance(cache, LowkeyCache):
        raise LowkeyError(f"cache of type {type(cache).__name__}: prefill fills what lowkey.make_cache made")
    if cache.get_seq_length():
        raise LowkeyError(
            f"cache: has seen {cache.get_seq_length()} tokens already; make a fresh one, or call the model "
            "for a later turn"
        )
    policy = cache.origin.policy_in_use if cache.origin else None
    if question and policy is None:
        raise LowkeyError(
            f"question {question}: only a cache with a policy is told what to keep; leave the question out"
        )
    return policy


def _checked(ids: Tensor, question: int, mask: Tensor | None) -> Tensor:
    """The mask (b, t) as integers. Raises: LowkeyError for ids, question or mask that do not fit."""
    if not isinstance(ids, Tensor):
        raise LowkeyError(f"ids of type {type(ids).__name__}: give a tensor of token ids (rows, tokens)")
    if ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
        raise LowkeyError(
            f"ids of shape {tuple(ids.shape)} and dtype {ids.dtype}: give token ids (rows, tokens), at least "
            "one of each"
        )
    mask = torch.ones_like(ids) if mask is None else mask.to(ids.device)
    if mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise LowkeyError(
            f"attention_mask of shape {tuple(mask.shape)}: give 1 for tokens and 0 for padding, in the shape "
            f"of ids {tuple(ids.shape)}"
        )
    mask = mask.long()
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise LowkeyError("attention_mask: padding behind tokens; pad on the left")
    lengths = mask.sum(1)
    row, least = int(lengths.argmin()), int(lengths.min())
    if not least:
        raise LowkeyError(f"attention_mask: row {row} has no token; leave the row out")
    if not isinstance(question, int) or not 0 <= question < least:
        raise LowkeyError(
            f"question {question}: row {row} has {least} tokens, of which one must be context; give 0 to "
            f"{least - 1}"
        )
    return mask


def _chunk_starts(mask: Tensor, question: int, chunk: int | None) -> list[int]:
    """Where chunks of a prompt begin. The first chunk holds all padding beside its tokens, so that every row
    has tokens in each. Raises: LowkeyError for a chunk of no tokens.
    """
    if chunk is None:
        return [0]
    if type(chunk) is not int or chunk < 1:
        raise LowkeyError(f"chunk {chunk!r}: tokens that are read at a time; give 1 or more")
    padding = int((mask.shape[1] - mask.sum(1)).max())
    # the question and the last token before it are read together
    return [0, *range(padding + chunk, mask.shape[1] - question, chunk)]


@torch.no_grad()
def read(
    model: PreTrainedModel, cache: LowkeyCache, ids: Tensor, mask: Tensor, logits_to_keep: int = 1
) -> Tensor:
    """Read tokens over what a cache has read before.

    Args:
        model: the model, attached.
        cache: the cache.
        ids: (b, t), the new tokens.
        mask: (b, t'), 1 for tokens and 0 for padding, of all tokens that the cache has seen and the new ones.
        logits_to_keep: of so many of the last tokens, logits are computed.

    Returns:
        Logits (b, n, V).
    """
    # positions count the real tokens, as `generate` does it for padded batches
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    # without padding the model makes both itself, and can use the faster causal path
    known: dict[str, Any] = {} if bool(mask.all()) else {"attention_mask": mask, "position_ids": positions}
    with cache.reading(ids):
        return model(ids, **known, past_key_values=cache, logits_to_keep=logits_to_keep).logits


def _repeated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: LowkeyCache,
    ids: Tensor,
    mask: Tensor,
    second_pass: SecondPass,
) -> None:
    """Read the context, let the model read each piece again behind a request to repeat it, then evict.

    The policy scores tokens by how much the repetition looked at them. Pieces are counted from the first
    token of each sequence. Shorter pieces are padded behind, which is allowed since all of it is forgotten.
    """
    request = (
        tokenizer(second_pass.prompt, add_special_tokens=False, return_tensors="pt")
        .input_ids[0]
        .to(ids.device)
    )
    chunk, bridge = second_pass.chunk, second_pass.bridge
    texts = [row[real] for row, real in zip(ids, mask.bool(), strict=True)]
    cache.freeze()  # nothing is evicted before all pieces have scored the context
    read(model, cache, ids, mask)
    longest = max(map(len, texts))  # sequences differ in length if they are padded
    for start in range(0, longest, chunk):
        pieces = [
            torch.cat([request, x[max(0, start - bridge) : start + chunk]]) if start < len(x) else x[:0]
            for x in texts
        ]
        # the mask is padded with 0, so that queries of the padding count for nothing
        again, again_mask = (
            pad_sequence(rows, batch_first=True) for rows in (pieces, [torch.ones_like(x) for x in pieces])
        )
        span = (0, longest) if second_pass.whole_context else (start, start + chunk)
        cache.score_only(again.shape[1], span)
        read(model, cache, again, torch.cat([mask, again_mask], 1))
    cache.score_only(0)
    cache.freeze(False)
    for layer in cache.evicting:
        layer.evict()  # by the scores that the pieces left
    cache.freeze()
