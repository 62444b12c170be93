"""Attention of a few queries, as in a step of decoding, over what is stored, without a decoded copy of it.

Where the query can be brought to the stored keys, kernels read codes and latents as they lie
(`lowkey.backends.ragged.stored_rows`). Where keys have to be rebuilt (pre-RoPE keys, and a mean under a soft
cap), that is done for one block of tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lowkey.backends import fused
from lowkey.backends.ragged import stored_rows
from lowkey.backends.segment import Part
from lowkey.backends.stored import StoredRows, attend_blocks
from lowkey.storage.codec import Codec

FEW_QUERIES = fused.QUERIES  # fewer than so many read what is stored; more are faster in matrix products


def reads_in_place(query: Tensor, held: Iterable[Tensor]) -> bool:
    """Whether queries (..., t, d) are few, and neither they nor what is held take part in gradients.

    Kernels have no gradients; many queries are answered by matrix products over decoded tokens.
    """
    traced = torch.is_grad_enabled() and (query.requires_grad or any(x.requires_grad for x in held))
    return query.shape[-2] < FEW_QUERIES and not traced


def positions_in_rows(
    positions: Tensor, starts: Tensor, sequences: int, row_heads: int
) -> Callable[[int, int], Tensor]:
    """The positions (n) of ragged rows as `attend_to_stored` asks for them, for all `row_heads` of a row."""

    def of_block(start: int, stop: int) -> Tensor:
        place = starts[:-1].unsqueeze(1) + torch.arange(start, stop, device=starts.device)
        block = positions[place.clamp_max(len(positions) - 1)].unflatten(0, (sequences, -1))
        return block.repeat_interleave(row_heads, 1)

    return of_block


def attend_to_stored(
    codec: Codec,
    query: Tensor,
    at: Tensor,
    keys: StoredRows,
    values: StoredRows,
    lengths: Tensor,
    positions: Callable[[int, int], Tensor],
    scaling: float,
    softcap: float | None,
    mask: Tensor | None = None,
    longest: int | None = None,
    alike: bool = False,
) -> Part:
    """Attention over stored rows. There are b R rows, and each holds a latents of keys and a' of values.

    Args:
        codec: the form of keys and values.
        query: (b, h, g, t, d), heads in the codec's order.
        at: (b, t), positions of the queries.
        keys: of the b R a rows of latents, those of a row in succession.
        values: of the b R a' rows of latents, the same.
        lengths: (b R), the tokens of each row.
        positions: gives the positions of the tokens from `start` to `stop` of each row, as (b, s) or
            (b, h, s); anything for tokens that a row does not have.
        scaling: what scores are multiplied with.
        softcap: the soft cap of scaled scores, or None.
        mask: (b|1, t, s), True where a query may attend; None if it may everywhere.
        longest: the most tokens of a row, if that is known.
        alike: whether every row is known to have as many.

    Returns:
        The output (b, h, g, t, d) and its log-sum-exp (b, h, g, t).
    """
    b, h, g, t, _ = query.shape
    rows = len(lengths)
    of_a_row = h // (rows // b)  # KV heads that share a row
    key_latents, value_latents = len(keys.lane) // rows, len(values.lane) // rows
    shift = None
    if codec.meets_stored_keys(softcap):
        query, shift = codec.project_query(query, at)
        # heads that meet the same stored key and the same stored value are answered together
        together = math.lcm(key_latents, value_latents)
        out, lse = stored_rows(
            query.reshape(rows * together, -1, query.shape[4]),
            keys.repeated(together // key_latents),
            values.repeated(together // value_latents),
            lengths if together == 1 else lengths.repeat_interleave(together),
            scaling,
            softcap,
            mask,
            longest,
            alike,
        )
    else:
        wide = torch.promote_types(query.dtype, torch.float32)

        def rebuilt_keys(start: int, stop: int) -> Tensor:
            latents = keys.decoded(start, stop, wide).to(query.dtype).unflatten(0, (b, -1))
            rebuilt = codec.rebuilt_keys(latents, positions(start, stop))
            return rebuilt.to(wide).reshape(rows, of_a_row, stop - start, -1)

        def latent_values(start: int, stop: int) -> Tensor:
            return values.decoded(start, stop, wide).unflatten(0, (rows, value_latents))

        by_row = query.to(wide).reshape(rows, of_a_row, g * t, -1)
        out, lse = attend_blocks(
            by_row, rebuilt_keys, latent_values, lengths, scaling, softcap, mask, longest
        )
    out, lse = out.view(b, h, g, t, -1), lse.view(b, h, g, t)
    return codec.expand_output(out), lse if shift is None else lse + shift * scaling
