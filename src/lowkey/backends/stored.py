"""Keys and values as a packing holds them, and attention over them block by block.

`attend_blocks` is the definition that the kernels for packed rows are tested against, and the fallback where
no kernel can answer. It decodes one block of tokens at a time and keeps one running softmax, so no decoded
copy of the whole history is made. `naive.ragged` is the definition over numbers that are already decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lowkey.backends.segment import Part, softcapped

STRIDE = 64  # positions between the angles of a coarse table of a rotary embedding
BLOCK_TOKENS = 256  # tokens of each row that are decoded at a time; a multiple of any packing's block


@dataclass(frozen=True)
class StoredRows:
    """The keys or the values of R rows, as a packing holds them.

    A packing holds plain numbers; or integers of 8, 4 or 2 bits with a scale and an offset for each group of
    a token's channels (*per token*); or such integers with a scale and an offset for each channel of a block
    of tokens (*per channel*). A *unit* is what is packed together: a token, or a block of tokens. The first
    dimension of the tensors is called a *lane*. Tensors may have any strides but in their last dimension.

    Args:
        numbers: plain numbers (lanes, n, r); or codes in bytes, (lanes, n, bytes) per token and
            (lanes, blocks, r, bytes) per channel.
        scale: (lanes, n, groups) per token, (lanes, blocks, r) per channel; None for plain numbers.
        low: the offsets, with the shape and strides of `scale`.
        bits: of a code; 0 for plain numbers.
        width: r.
        lane: (R), int64, the lane of each row.
        first: (R), int64, where each row begins in its lane, in units.
        repeats: how many rows there are at most for the same tokens.
        dense: whether each lane is one row, in order.
    """

    numbers: Tensor
    scale: Tensor | None
    low: Tensor | None
    bits: int
    width: int
    lane: Tensor
    first: Tensor
    repeats: int = 1
    dense: bool = False

    @property
    def unit(self) -> int:
        """Tokens that are packed together."""
        return self.numbers.shape[3] * 8 // self.bits if self.numbers.ndim == 4 else 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of plain numbers, or of the scales."""
        return self.numbers.dtype if self.scale is None else self.scale.dtype

    @property
    def most_tokens(self) -> int:
        """The tokens of all rows at most, from shapes alone."""
        return self.repeats * self.numbers.shape[0] * self.numbers.shape[1] * self.unit

    @property
    def groups(self) -> tuple[int, int]:
        """(groups of channels of a token that share a scale, channels of each); one group where none do."""
        if self.scale is None or self.numbers.ndim == 4:
            return 1, self.width
        count = self.scale.shape[2]
        return count, self.numbers.shape[2] * 8 // self.bits // count

    def repeated(self, times: int) -> StoredRows:
        """The same rows, each so many times in succession."""
        if times == 1:
            return self
        lane, first = (x.repeat_interleave(times) for x in (self.lane, self.first))
        return replace(self, lane=lane, first=first, repeats=times * self.repeats, dense=False)

    def from_tokens(self, starts: Tensor) -> StoredRows:
        """The same rows, each from a token (R) on, a multiple of `unit`."""
        return replace(self, first=self.first + starts // self.unit, dense=False)

    def sliced(self, start: int, step: int) -> StoredRows:
        """Every `step`-th row from `start` on."""
        return replace(self, lane=self.lane[start::step], first=self.first[start::step], dense=False)

    def decoded(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """(R, stop - start, r): some tokens of each row; any numbers for tokens that a row does not have.

        Args:
            start: the first token of a row, a multiple of `unit`.
            stop: the token behind the last, likewise a multiple, or the end of the longest row.
            dtype: of the result.
        """
        units = slice(start // self.unit, -(-stop // self.unit))
        if self.dense:
            held = [x[:, units] for x in (self.numbers, self.scale, self.low) if x is not None]
        else:
            place = torch.arange(units.start, units.stop, device=self.first.device)
            at = (self.first.unsqueeze(1) + place).clamp_max(self.numbers.shape[1] - 1)
            lane = self.lane.unsqueeze(1)
            held = [x[lane, at] for x in (self.numbers, self.scale, self.low) if x is not None]
        if not self.bits:
            return held[0].to(dtype)
        numbers, scale, low = held[0], held[1].to(dtype), held[2].to(dtype)
        codes = unpack_codes(numbers, self.bits, dtype)
        grouped = codes.unflatten(-1, (-1, self.groups[1])) if self.numbers.ndim == 3 else codes
        grouped = grouped.mul_(scale.unsqueeze(-1)).add_(low.unsqueeze(-1))
        if self.numbers.ndim == 3:
            return grouped.flatten(2)[..., : self.width]
        return grouped.transpose(2, 3).flatten(1, 2)[:, : stop - start]


@dataclass(frozen=True)
class Rebuilding:
    """How keys are rebuilt from latents: by a linear map, a mean, and a rotation at each token's position.

    Args:
        maps: (h, r, d), for each KV head; row i has that of head i % h.
        mean: (h, d), added before the rotation; None for none.
        positions: of all tokens, int32.
        firsts: (R), int64, where in `positions` those of each row begin.
        rotation: the cosines and sines (n, 2, p / 2) of the multiples of STRIDE; those of the
            numbers below it, without the factor of a scaled embedding; and the bits of the mantissa that the
            model's dtype leaves out, in which the model rotates.
    """

    maps: Tensor
    mean: Tensor | None
    positions: Tensor
    firsts: Tensor
    rotation: tuple[np.ndarray, np.ndarray, int]


@dataclass(frozen=True)
class StepSegment:
    """Tokens of one kind that the queries of decode steps attend to.

    Args:
        keys: of R rows.
        values: of the same rows.
        lengths: (R), int64, the tokens of each row; None if each call says how many there are.
        as_latents: whether sums of values, and queries unless keys are rebuilt, are in the basis of latents,
            and not in the model's.
        hidden: so many first tokens of each row are not seen; one number, or one for each row (R).
        rebuilding: how keys that are latents are rebuilt; None if queries meet them as they are.
        column: of queries, at which those begin that meet keys. Queries may have more columns than keys.
        bias: (R), fp32, added to all scores of a row; None for nothing.
    """

    keys: StoredRows
    values: StoredRows
    lengths: Tensor | None
    as_latents: bool = False
    hidden: int | Tensor = 0
    rebuilding: Rebuilding | None = None
    column: int = 0
    bias: Tensor | None = None


def unpack_codes(codes: Tensor, bits: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Bytes (*b, n bits / 8) -> codes (*b, n) of some bits each, the first code in the lowest bits."""
    if bits == 8:
        return codes.to(dtype)
    out = torch.empty(*codes.shape, 8 // bits, dtype=dtype, device=codes.device)
    for i in range(8 // bits):
        out[..., i] = (codes >> (bits * i)) & (2**bits - 1)
    return out.flatten(-2)


def stored_rows(
    query: Tensor,
    keys: StoredRows,
    values: StoredRows,
    lengths: Tensor,
    scaling: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
    longest: int | None = None,
    alike: bool = False,
) -> Part:
    """Attention of each row's queries over what is stored of the row.

    Args:
        query: (R, m, r), m queries for each of R rows.
        keys: of R rows.
        values: of the same rows, packed in the same or in another way.
        lengths: (R), int64, the tokens of each row.
        scaling: what scores are multiplied with.
        softcap: the soft cap of scaled scores, or None.
        mask: (R', t, s), True where a query may attend, over the first s tokens of rows, with s at least the
            longest; R' divides R, and each R / R' rows in a row share a mask; t divides m, and query i of a
            row has the mask i % t. None if every query sees its whole row.
        longest, alike: see `attend_blocks`.

    Returns:
        (output (R, m, v), log-sum-exp of the scores (R, m)), in fp32 (in fp64 for fp64 queries); a query that
        sees nothing gives 0 and -inf.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    return attend_blocks(
        query.to(dtype).unsqueeze(1),
        lambda start, stop: keys.decoded(start, stop, dtype).unsqueeze(1),
        lambda start, stop: values.decoded(start, stop, dtype).unsqueeze(1),
        lengths,
        scaling,
        softcap,
        mask,
        longest,
        alike,
    )


def attend_blocks(
    query: Tensor,
    keys: Callable[[int, int], Tensor],
    values: Callable[[int, int], Tensor],
    lengths: Tensor,
    scaling: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
    longest: int | None = None,
    alike: bool = False,
) -> Part:
    """Attention over blocks of tokens that are made when they are needed, under one running softmax.

    Args:
        query: (R, x, m, d), with x keys per row that have the same tokens.
        keys: the keys (R, x, stop - start, d) of the tokens from `start` to `stop` of each row.
        values: the values (R, y, stop - start, v); y divides x, and each x / y keys share values.
        lengths: (R), the tokens of each row.
        scaling: what scores are multiplied with.
        softcap: the soft cap of scaled scores, or None.
        mask: as for `stored_rows`.
        longest: the most tokens of a row, if that is known.
        alike: whether every row is known to have as many.

    Returns:
        (output (R x, m, v), log-sum-exp (R x, m)); rows come first, then keys.
    """
    rows, x, m, _ = query.shape
    width = values(0, 0).shape[3]
    if longest is None:
        longest = int(lengths.max()) if len(lengths) else 0
        alike = bool((lengths == longest).all())
    top = query.new_full((rows, x, m), -torch.inf)
    total, out = torch.zeros_like(top), query.new_zeros(rows, x, m, width)
    for start in range(0, longest, BLOCK_TOKENS):
        stop = min(start + BLOCK_TOKENS, longest)
        scores = softcapped(query @ keys(start, stop).mT * scaling, softcap)
        block_values = values(start, stop)
        if not alike:
            hidden = torch.arange(start, stop, device=lengths.device) >= lengths[:, None, None, None]
            scores = scores.masked_fill_(hidden, -torch.inf)
            # a weight of 0 would not hide what is no number
            block_values = block_values.masked_fill(hidden.mT, 0.0)
        if mask is not None:
            block = (
                mask[..., start:stop].repeat_interleave(rows // len(mask), 0).repeat(1, m // mask.shape[1], 1)
            )
            scores = scores.masked_fill_(~block.unsqueeze(1), -torch.inf)
        new = torch.maximum(top, scores.amax(-1))
        # where nothing has been seen, both are -inf, and no weight counts
        shrink, weights = _exp_of_difference(top, new), _exp_of_difference(scores, new.unsqueeze(-1))
        y = block_values.shape[1]
        mixed = weights.unflatten(1, (y, x // y)).flatten(2, 3) @ block_values
        out = out * shrink.unsqueeze(-1) + mixed.view(out.shape)
        top, total = new, total * shrink + weights.sum(-1)
    out = out / total.clamp_min(torch.finfo(total.dtype).tiny).unsqueeze(-1)
    return out.flatten(0, 1), (top + total.log()).flatten(0, 1)


def _exp_of_difference(x: Tensor, top: Tensor) -> Tensor:
    """exp(x - top), 0 where x is -inf."""
    return (x - top).exp().masked_fill(x == -torch.inf, 0.0)
