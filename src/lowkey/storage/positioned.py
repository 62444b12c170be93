"""A storing layer that knows at which position each row's tokens are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowkey.core.types import LowkeyError
from lowkey.models.attention_interface import Call, Incoming, as_cast
from lowkey.storage.base import StoringLayer, batch_positions
from lowkey.storage.codec import token_positions

MASKS_AT_ONCE = 512  # queries whose masks are compared at a time


class PositionedLayer(StoringLayer):
    """offset (b, 1): each row's token index less its position; first (b, 1): the index of each row's first
    real token, and the number of tokens seen while there is none.

    A token is padding when no query of its own chunk sees it; that the newest query does not see it says
    nothing.
    """

    offset: Tensor
    first: Tensor

    def begin(self, batch: int) -> None:
        """No row has a token yet."""
        self.offset = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self.first = torch.zeros_like(self.offset)

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Incoming, Incoming]:
        if self.is_initialized:
            self.check_fits(as_cast(key_states), len(self.offset), self.dtype)
        return super().update(key_states, value_states, *args, **kwargs)

    def place(self, call: Call, t: int) -> Tensor:
        """Learn where each row begins, and hold the model to positions that count up by one from there.

        Returns (b, t): which of the new tokens are real; the others are padding.
        """
        start, batch = self.seen - t, self.offset.shape[0]
        if call.mask is not None and call.mask.shape[-1] != self.seen:
            raise LowkeyError(
                f"attention_mask over {call.mask.shape[-1]} tokens: with the new ones {self.seen} were seen; "
                "give as many"
            )
        real = _real(call, start, self.seen).expand(batch, t)
        positions, begun = batch_positions(start, call, batch), self.first < start
        begins = torch.where(real.any(1, keepdim=True), start + real.int().argmax(1, keepdim=True), self.seen)
        first = torch.where(begun, self.first, begins)
        self.check_mask(call, start, real, first)
        position = positions.gather(1, (first - start).clamp(0, t - 1))  # of the first real token
        offset = torch.where(begun, self.offset, torch.where(first < self.seen, first - position, self.seen))
        if not bool(((positions == token_positions(start, self.seen, offset)) | ~real).all()):
            raise LowkeyError(
                "position_ids: this cache needs positions that count up by one from a row's first token, "
                "without padding between turns; "
                "drop position_ids, or give rows of uneven turns a cache each"
            )
        self.offset, self.first = offset, first
        return real

    def exact_rows(self, real: Tensor) -> Tensor:
        """(b): which rows see this chunk exactly; a row of which a single token came, beside padding or
        alone, sees what will be stored.
        """
        return (real.sum(1) > 1) & bool(self.exact_prefill)  # a number in saved layers

    def check_mask(self, call: Call, start: int, real: Tensor, first: Tensor) -> None:
        """Refuse what this layer cannot honour, before anything is learnt. real (b, t): of the new tokens,
        from index `start` on.
        """

    def positions(self, start: int, stop: int) -> Tensor:
        """Positions (b, stop - start) of the tokens with these indices; padding has none that matter."""
        return token_positions(start, stop, self.offset)


class RaggedLayer(PositionedLayer):
    """Rows of different length, which do not hold their padding.

    looking: tokens at the end of a chunk that will be forgotten; these alone may end in padding.
    """

    looking = 0

    def check_mask(self, call: Call, start: int, real: Tensor, first: Tensor) -> None:
        """Every new token must see all that is stored of its row and nothing else from before its chunk, and
        no padding may come behind a row's first real token: padding is not held, so neither could be
        honoured."""
        tokens = torch.arange(self.seen, device=first.device)
        if start and not _sees(call, real, tokens[:start] >= first):
            raise LowkeyError(
                "attention_mask: differs from that of earlier turns, and padding is not held here; repeat "
                "the earlier mask"
            )
        stay = real.shape[1] - self.looking
        if stay > 0 and bool((real[:, :stay] != (tokens[start : start + stay] >= first)).any()):
            raise LowkeyError(
                "attention_mask: a row ends in padding, which this kind of cache cannot follow; pad on the "
                "left"
            )

    def steps_of(self, t: int) -> Tensor:
        """(b): the rows for which these t tokens are a step of decoding: one, and not their first. Others may
        still be in their padding.
        """
        return (self.first[:, 0] < self.seen - 1) & (t == 1) & (self.looking == 0)

    def check_steps(self, t: int, every: int) -> None:
        """Refuse a step of some rows alone where something is done after `every` steps of all."""
        if every and bool(self.steps_of(t).any()):
            raise LowkeyError(
                f"attention_mask: one token while another row has not begun, and every={every} counts the "
                "steps of all rows together; "
                "give the prompt in one call, or in pieces of several tokens"
            )

    def reset(self) -> None:
        super().reset()
        self.looking = 0

    def chosen_rows(self, choose: Callable[[Tensor], Tensor], heads: int) -> tuple[Tensor, Tensor]:
        """The numbers of the sequences that `choose` takes, and of their heads, of b h in all."""
        rows = choose(torch.arange(len(self.offset), device=self.device))
        return rows, (rows.unsqueeze(1) * heads + torch.arange(heads, device=self.device)).flatten()


def _real(call: Call, start: int, seen: int) -> Tensor:
    """(b|1, seen - start): which of the newest tokens any query sees."""
    if call.mask is None:
        return torch.ones(1, seen - start, dtype=torch.bool, device=call.query.device)
    return call.mask[:, :, start:].any(1)


def _sees(call: Call, real: Tensor, held: Tensor) -> bool:
    """Whether every real query (b, t) sees just the tokens `held` (b, s) of those that came before its chunk."""
    if call.mask is None:
        return bool(held.all())
    blocks = zip(
        call.mask[:, :, : held.shape[1]].split(MASKS_AT_ONCE, 1), real.split(MASKS_AT_ONCE, 1), strict=True
    )
    return not any(bool(((mask != held.unsqueeze(1)).any(2) & rows).any()) for mask, rows in blocks)
