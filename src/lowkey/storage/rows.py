"""Tokens in ragged rows, written down by a packing: how they are selected, joined, read and attended to.

A *row* is one sequence and one *row head*: a KV head, or the KV heads that share a latent. Where keys and
values are merged over different numbers of heads, a row has the smallest set of heads that both share, and
holds several latents of each token. The tokens of all rows lie one behind another without padding.

A packing whose scales belong to one token each keeps a token's numbers when others leave. A packing in blocks
of tokens (KIVI's keys) is written anew: the rows are decoded, joined and packed again, and the last block of
each row is filled up with copies of its last token, which are held but never read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowkey.backends.ragged import ragged
from lowkey.backends.segment import Part
from lowkey.backends.stored import StepSegment, StoredRows
from lowkey.ops.ragged import join_rows, row_of, select_rows, starts_of
from lowkey.storage.codec import Codec
from lowkey.storage.packing import Packing

POSITIONS = 2**32  # more than there are positions


@dataclass(frozen=True)
class Rows:
    """The tokens of all rows of a layer, n in all.

    Args:
        keys: what the packing of keys holds, with latents (n, a, r_K) as its input, or blocks of tokens.
        values: the same for values.
        positions: (n), ascending in each row.
        starts: (rows + 1), where each row begins.
        scores: (n), from earlier evictions; empty unless the policy is stateful.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    positions: Tensor
    starts: Tensor
    scores: Tensor


def pack_rows(packing: Packing, x: Tensor, starts: Tensor) -> tuple[Tensor, ...]:
    """Pack the latents (n, a, r) of all rows."""
    if packing.block == 1:
        return packing.pack(x)
    size, lengths = packing.block, starts.diff()
    padded = -(-lengths // size) * size
    row = torch.arange(len(lengths), device=x.device).repeat_interleave(padded)
    place = torch.arange(len(row), device=x.device) - starts_of(padded)[:-1][row]
    filled = x[starts[:-1][row] + place.minimum(lengths[row] - 1)]
    return packing.pack(filled.unflatten(0, (-1, size)).transpose(1, 2))


def unpack_rows(packing: Packing, parts: tuple[Tensor, ...], width: int, starts: Tensor) -> Tensor:
    """The inverse of `pack_rows`: latents (n, a, r), given the width r."""
    if packing.block == 1:
        return packing.unpack(parts, width)
    size, row = packing.block, row_of(starts)
    place = torch.arange(len(row), device=starts.device) - starts[:-1][row]
    whole = packing.unpack(parts, width).transpose(1, 2).flatten(0, 1)
    return whole[block_starts(packing, starts)[:-1][row] * size + place]


def block_starts(packing: Packing, starts: Tensor) -> Tensor:
    """Where each row begins in what a packing holds, counted in blocks of its tokens."""
    return starts if packing.block == 1 else starts_of(-(-starts.diff() // packing.block))


def rows_nbytes(packing: Packing, starts: Tensor, latents: int, width: int, itemsize: int) -> int:
    """Bytes of the rows of keys or of values.

    Args:
        packing: how they are packed.
        starts: where rows begin, counted in tokens.
        latents: how many latents a row holds of each token.
        width: of a latent.
        itemsize: bytes of a number in the model's dtype.
    """
    tokens = int(block_starts(packing, starts)[-1]) * packing.block
    return latents * packing.nbytes(tokens, width, itemsize)


def stored_in_rows(packing: Packing, parts: tuple[Tensor, ...], width: int, starts: Tensor) -> StoredRows:
    """What a packing holds of ragged rows, as kernels read it: the a latents of each row in succession."""
    lanes = [part.transpose(0, 1) for part in parts]
    if packing.block > 1:
        lanes[1:] = [x.squeeze(3) for x in lanes[1:]]
    latents = len(lanes[0])
    lane = torch.arange(latents, device=starts.device).repeat(len(starts) - 1)
    first = block_starts(packing, starts)[:-1].repeat_interleave(latents)
    scale, low = lanes[1:] if packing.bits else (None, None)
    return StoredRows(lanes[0], scale, low, packing.bits or 0, width, lane, first)


def stored_densely(packing: Packing, parts: tuple[Tensor, ...], width: int) -> StoredRows:
    """What a packing holds of dense tokens, as kernels read it: a row for each of the b G stored heads."""
    lanes = [part.flatten(0, 1) for part in parts]
    if packing.block > 1:
        blocks = lanes[1].shape[2]
        lanes = [lanes[0].unflatten(2, (blocks, -1)).transpose(1, 2), *(x.transpose(1, 2) for x in lanes[1:])]
    lane = torch.arange(len(lanes[0]), device=lanes[0].device)
    scale, low = lanes[1:] if packing.bits else (None, None)
    return StoredRows(
        lanes[0], scale, low, packing.bits or 0, width, lane, torch.zeros_like(lane), dense=True
    )


def exact_segment(keys: Tensor, values: Tensor, tokens: int | None = None) -> StepSegment:
    """Exact tokens (b, h, s, d) as kernels read them, a row for each KV head.

    Args:
        keys: the tokens.
        values: the same.
        tokens: how many each row has; None if each call says.
    """
    lane = torch.arange(len(keys) * keys.shape[1], device=keys.device)
    first = torch.zeros_like(lane)
    k, v = (StoredRows(x.flatten(0, 1), None, None, 0, x.shape[3], lane, first) for x in (keys, values))
    return StepSegment(k, v, None if tokens is None else torch.full_like(lane, tokens))


def tokens_of_dense(part: Tensor, row_heads: int, chosen: Tensor) -> Tensor:
    """Chosen tokens of a dense tensor, row after row.

    Args:
        part: (b, G, s, ...), of a packing that packs each token by itself.
        row_heads: rows of each sequence, R.
        chosen: (b, R, s).

    Returns:
        (n, G / R, ...).
    """
    return part.unflatten(1, (row_heads, -1)).transpose(2, 3)[chosen]


def select_tokens(
    packing: Packing, parts: tuple[Tensor, ...], width: int, starts: Tensor, chosen: Tensor
) -> tuple[Tensor, ...]:
    """Chosen tokens (n) of rows, still packed, if the packing packs each token by itself; else latents."""
    if packing.block == 1:
        return tuple(part[chosen] for part in parts)
    return (unpack_rows(packing, parts, width, starts)[chosen],)


def joined_rows(
    packing: Packing, old: tuple[Tensor, ...], old_starts: Tensor, new: tuple[Tensor, ...], new_starts: Tensor
) -> tuple[Tensor, ...]:
    """New tokens behind the old ones of each row, both as `select_tokens` returns them, packed."""
    both = tuple(join_rows(a, old_starts, b, new_starts) for a, b in zip(old, new, strict=True))
    return both if packing.block == 1 else pack_rows(packing, both[0], old_starts + new_starts)


def select_row_numbers(
    packing: Packing, parts: tuple[Tensor, ...], starts: Tensor, numbers: Tensor
) -> tuple[Tensor, ...]:
    """The rows with these numbers, in this order, still packed."""
    begins = block_starts(packing, starts)
    return tuple(select_rows(part, begins, numbers)[0] for part in parts)


def attend_to_rows(
    codec: Codec,
    query: Tensor,
    at: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    starts: Tensor,
    scaling: float,
    softcap: float | None,
) -> Part:
    """Attention of many queries over unpacked rows; `reading.attend_to_stored` is for a few.

    Args:
        codec: the form of keys and values.
        query: (b, h, g, t, d), heads in the codec's order.
        at: (b, t), positions of the queries.
        keys: (n, a, r_K).
        values: (n, a', r_V).
        positions: (n), of the stored tokens.
        starts: (b R + 1), where rows begin.
        scaling: what scores are multiplied with.
        softcap: the soft cap of scaled scores, or None.

    Returns:
        The output (b, h, g, t, d) and its log-sum-exp (b, h, g, t).
    """
    b, h, g, t = query.shape[:4]
    row_heads = (len(starts) - 1) // b
    of_a_row = h // row_heads  # KV heads that share a row
    shift = None
    if codec.meets_stored_keys(softcap):
        query, shift = codec.project_query(query, at)
        scoring = keys.movedim(1, 0)
    else:
        scoring = codec.rotated_keys_of_rows(keys, positions, starts, row_heads)
    stored = values.movedim(1, 0)
    # heads that meet the same stored key and the same stored value are answered together
    together = math.lcm(len(scoring), len(stored))
    query = query.unflatten(1, (row_heads, together, of_a_row // together)).flatten(3, 5)
    parts = [
        ragged(
            query[:, :, i].flatten(0, 1),
            scoring[i * len(scoring) // together],
            stored[i * len(stored) // together],
            starts,
            scaling,
            softcap,
        )
        for i in range(together)
    ]
    shape = (b, row_heads, of_a_row // together, g, t)
    out = torch.stack([out.view(*shape, -1) for out, _ in parts], 2).flatten(1, 3)
    lse = torch.stack([lse.view(shape) for _, lse in parts], 2).flatten(1, 3)
    return codec.expand_output(out), lse if shift is None else lse + shift * scaling
