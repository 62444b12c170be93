"""Storing layers that know the position of every token, also when the rows of a batch are padded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowkey.core.types import LowkeyError
from lowkey.models.attention_interface import Call, cast_for_autocast
from lowkey.storage.base import StoringLayer, batch_positions
from lowkey.storage.codec import token_positions

QUERIES_PER_MASK_BLOCK = 512  # queries whose masks are compared at a time, to bound memory


class PositionedLayer(StoringLayer):
    """A layer that learns where each sequence of the batch begins and at which positions its tokens are.

    A token is padding when no query of its own chunk sees it. (That the newest query does not see it says
    nothing: attention masks of other kinds hide real tokens, too.) Tokens have an *index*, their number in
    the order in which the model saw them, padding included, and a *position*, which the model rotates by.

    Attributes:
        offset: (b, 1), index less position; the same for all tokens of a sequence.
        first_index: (b, 1), the index of each sequence's first real token; the number of tokens seen while
            there is none.
    """

    offset: Tensor
    first_index: Tensor

    def reset_rows(self, batch: int) -> None:
        """Begin with `batch` sequences, none of which has a token yet."""
        self.offset = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self.first_index = torch.zeros_like(self.offset)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Any, Any]:
        """As `StoringLayer.update`, after a check of batch size and dtype. Raises: LowkeyError."""
        if self.is_initialized:
            self.check_fits(cast_for_autocast(key_states), len(self.offset), self.dtype)
        return super().update(key_states, value_states, *args, **kwargs)

    def locate_tokens(self, call: Call, t: int) -> Tensor:
        """Learn where each sequence begins, and check that positions count up by one from there.

        Args:
            call: the attention call that brought the new tokens.
            t: number of new tokens.

        Returns:
            (b, t): which of the new tokens are real; the others are padding.

        Raises:
            LowkeyError: for a mask of another length, positions that do not count up by one, and whatever
                `check_mask` refuses.
        """
        start, batch = self.seen - t, self.offset.shape[0]
        if call.mask is not None and call.mask.shape[-1] != self.seen:
            raise LowkeyError(
                f"attention_mask over {call.mask.shape[-1]} tokens: with the new ones {self.seen} were seen; "
                "give as many"
            )
        real = _seen_by_own_chunk(call, start, self.seen).expand(batch, t)
        # sequences that have begun keep their offset; others may begin in this chunk
        positions, begun = batch_positions(start, call, batch), self.first_index < start
        first_new = torch.where(
            real.any(1, keepdim=True), start + real.int().argmax(1, keepdim=True), self.seen
        )
        first = torch.where(begun, self.first_index, first_new)
        self.check_mask(call, start, real, first)
        first_position = positions.gather(1, (first - start).clamp(0, t - 1))
        # a sequence that still has no real token gets an offset that means nothing and is replaced later
        new_offset = torch.where(first < self.seen, first - first_position, self.seen)
        offset = torch.where(begun, self.offset, new_offset)
        if not bool(((positions == token_positions(start, self.seen, offset)) | ~real).all()):
            raise LowkeyError(
                "position_ids: this cache needs positions that count up by one from a row's first token, "
                "without padding between turns; drop position_ids and use_cache=False, or give rows of "
                "uneven turns a cache each: cache.branch(row)"
            )
        self.offset, self.first_index = offset, first  # only now, since nothing was refused
        return real

    def exact_rows(self, real: Tensor) -> Tensor:
        """The sequences (b) whose new chunk is seen exactly, given which new tokens are real (b, t).

        A sequence of which a single token came, beside padding or alone, sees what will be stored: that is a
        step of decoding, and would be one in a batch of one.
        """
        return (real.sum(1) > 1) & bool(self.exact_prefill)  # bool: saved layers hold the flag as a number

    def check_mask(self, call: Call, start: int, real: Tensor, first: Tensor) -> None:
        """Refuse a mask that this layer cannot honour, before any state changes. Here: nothing is refused.

        Args:
            call: the attention call.
            start: the index of the first new token.
            real: (b, t), which of the new tokens are real.
            first: (b, 1), the index of each sequence's first real token, with the new tokens counted.

        Raises:
            LowkeyError: in layers that cannot honour every mask.
        """

    def positions_of(self, start: int, stop: int) -> Tensor:
        """The positions (b, stop - start) of the tokens with these indices; those of padding mean nothing."""
        return token_positions(start, stop, self.offset)


class RaggedLayer(PositionedLayer):
    """A layer whose rows have different lengths, and which does not hold padding.

    Attributes:
        score_only_tokens: so many tokens at the end of each chunk will be forgotten; only these may end in
            padding.
    """

    score_only_tokens = 0

    def check_mask(self, call: Call, start: int, real: Tensor, first: Tensor) -> None:
        """Refuse masks that hide held tokens, show padding, or have padding behind a row's first real token.

        Every new token must see all that is stored of its sequence and nothing else from before its chunk:
        padding is not held, so another mask could not be honoured.

        Raises:
            LowkeyError: for such masks.
        """
        if real.shape[1] < self.score_only_tokens:
            raise LowkeyError(
                f"score_only {self.score_only_tokens}: that many tokens at the end of each chunk score the "
                f"others, and this chunk has {real.shape[1]}; give longer chunks, or call "
                "cache.score_only(0) first"
            )
        tokens = torch.arange(self.seen, device=first.device)
        if start and not _sees_all_held(call, real, tokens[:start] >= first):
            raise LowkeyError(
                "attention_mask: differs from that of earlier turns, and padding is not held here; repeat "
                "the earlier mask"
            )
        # tokens that only score are forgotten, so padding among them does no harm
        stored = real.shape[1] - self.score_only_tokens
        if stored > 0 and bool((real[:, :stored] != (tokens[start : start + stored] >= first)).any()):
            remedy = (
                "give rows of uneven turns a cache each: cache.branch(row)" if start else "pad on the left"
            )
            raise LowkeyError(
                "attention_mask: has padding behind a row's first token, which this kind of cache cannot "
                f"follow; {remedy}"
            )

    def decoding_rows(self, t: int) -> Tensor:
        """The sequences (b) for which these `t` new tokens are a step of decoding.

        A step is a single token that is not the sequence's first. In the same call, other sequences may
        still be in their padding.
        """
        return (self.first_index[:, 0] < self.seen - 1) & (t == 1) & (self.score_only_tokens == 0)

    def check_decoding(self, t: int, every: int, block: int = 1) -> None:
        """Refuse a decoding step of some sequences alone, where all sequences must take steps together.

        Args:
            t: number of new tokens.
            every: steps of all sequences after which eviction runs; 0 for never.
            block: tokens that are packed together.

        Raises:
            LowkeyError: for such a step.
        """
        if (every or block > 1) and bool(self.decoding_rows(t).any()):
            reason = (
                f"every={every} counts the steps of all rows together"
                if every
                else "blocks of tokens (kivi) are filled by all rows together"
            )
            raise LowkeyError(
                f"attention_mask: one token while another row has not begun, and {reason}; "
                "give the prompt in one call, or in pieces of several tokens"
            )

    def own_flaw(self, heads: int, key_width: int, value_width: int) -> str | None:
        """The first rule that a layer that was read from a file breaks, of those that this class adds.

        Args:
            heads: KV heads.
            key_width: width of stored keys.
            value_width: width of stored values.

        Returns:
            The rule in words, or None.
        """
        return None

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.score_only_tokens = 0

    def chosen_rows(self, choose: Callable[[Tensor], Tensor], heads: int) -> tuple[Tensor, Tensor]:
        """What `choose` picks, as numbers.

        Args:
            choose: takes a tensor (b, ...) and returns the sequences to keep, in order.
            heads: KV heads of each sequence.

        Returns:
            (the numbers of the chosen sequences, the numbers of their rows among the b h rows).
        """
        sequences = choose(torch.arange(len(self.offset), device=self.device))
        rows = sequences.unsqueeze(1) * heads + torch.arange(heads, device=self.device)
        return sequences, rows.flatten()


def _seen_by_own_chunk(call: Call, start: int, seen: int) -> Tensor:
    """(b|1, seen - start): which of the new tokens any query of the call sees."""
    if call.mask is None:
        return torch.ones(1, seen - start, dtype=torch.bool, device=call.query.device)
    return call.mask[:, :, start:].any(1)


def _sees_all_held(call: Call, real: Tensor, held: Tensor) -> bool:
    """Whether every real query (b, t) sees exactly the tokens `held` (b, s) from before its chunk."""
    if call.mask is None:
        return bool(held.all())
    masks = call.mask[:, :, : held.shape[1]].split(QUERIES_PER_MASK_BLOCK, 1)
    blocks = zip(masks, real.split(QUERIES_PER_MASK_BLOCK, 1), strict=True)
    return not any(bool(((mask != held.unsqueeze(1)).any(2) & rows).any()) for mask, rows in blocks)


def index_behind_last(real: Tensor, seen: int, before: Tensor) -> Tensor:
    """(b, 1): the index behind each sequence's last real token.

    Args:
        real: (b, t), which of the newest tokens are real.
        seen: tokens seen, the newest included.
        before: (b, 1), the index before these tokens came.
    """
    # argmax finds the first True, so of the flipped row the last
    last = seen - real.flip(1).int().argmax(1, keepdim=True)
    return torch.where(real.any(1, keepdim=True), last, before)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens (b, h, n, d) of x (b, h, s, d) at indices (b|1, n); any token where an index is out of range."""
    b, h, s, d = x.shape
    return x.gather(2, index.clamp(0, s - 1)[:, None, :, None].expand(b, h, -1, d))
