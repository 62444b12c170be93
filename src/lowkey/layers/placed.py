"""A storing layer that knows at which position each row's tokens are."""

from __future__ import annotations

import torch
from torch import Tensor

from lowkey.layers.base import StoringLayer, batch_positions
from lowkey.layers.codec import token_positions
from lowkey.seam import Call
from lowkey.types import LowkeyError


class PlacedLayer(StoringLayer):
    """offset (b, 1): each row's token index less its position."""

    offset: Tensor

    def place(self, call: Call, t: int) -> Tensor:
        """Learn where each row begins, and hold the model to positions that count up by one from there.

        Returns (b, seen): which tokens the newest query may see; the others are padding.
        """
        start, batch = self.seen - t, self.offset.shape[0]
        positions = batch_positions(start, call, batch)
        visible = _visible(call, self.seen, batch)
        begun = visible[:, :start].any(1, keepdim=True)  # until a row's first real token, its positions mean nothing
        self.offset = torch.where(begun, self.offset, self.seen - 1 - positions[:, -1:])
        if not bool(((positions == self.positions(start, self.seen)) | ~visible[:, start:]).all()):
            raise LowkeyError(
                "position_ids: this cache needs positions that count up by one from a row's first token, without padding between turns; "
                "drop position_ids, or give rows of uneven turns a cache each"
            )
        return visible

    def positions(self, start: int, stop: int) -> Tensor:
        """Positions (b, stop - start) of the tokens with these indices; padding has none that matter."""
        return token_positions(start, stop, self.offset)


class UnmovedLayer(PlacedLayer):
    """Rows of different length, of which none can be moved, picked or repeated, and which do not hold their padding.

    looking: tokens at the end of a chunk that will be forgotten. met (b, 1): real tokens seen, None when that is not known.
    """

    looking = 0
    met: Tensor | None = None

    def place(self, call: Call, t: int) -> Tensor:
        """Also holds the mask to what it was: it may neither hide what is stored nor end a row before the chunk ends."""
        start = self.seen - t
        if call.mask is not None and self.met is not None and not bool((call.mask[:, [0, -1], :start].sum(-1) == self.met).all()):
            raise LowkeyError("attention_mask: differs from that of earlier turns, and padding is not held here; repeat the earlier mask")
        visible = super().place(call, t)
        new = visible[:, start:]
        if bool((new[:, :-1] & ~new[:, 1:]).any()):
            raise LowkeyError("attention_mask: a row ends in padding, which this kind of cache cannot follow; pad on the left")
        self.met = visible.sum(1, keepdim=True) - self.looking
        return visible

    def reset(self) -> None:
        super().reset()
        self.looking, self.met = 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise LowkeyError("num_beams: beam search moves rows of the cache, which this kind of cache does not; set num_beams=1")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise LowkeyError("batch_select_indices: rows of this kind of cache cannot be picked; make one cache per batch")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise LowkeyError("batch_repeat_interleave: rows of this kind of cache cannot be repeated; repeat the prompt before prefill")


def _visible(call: Call, seen: int, batch: int) -> Tensor:
    if call.mask is None:
        return torch.ones(batch, seen, dtype=torch.bool, device=call.query.device)
    return call.mask[:, -1].expand(batch, seen)
