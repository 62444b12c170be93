"""Rules that a layer must keep that was read from a file: shapes, and rows that begin where they can."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowkey.ops.ragged import row_of
from lowkey.storage.file_names import file_name
from lowkey.storage.packing import Packing
from lowkey.storage.rows import block_starts


def unlike(name: str, t: Tensor, *shape: int) -> str | None:
    """The rule that a tensor breaks if it has another shape, or None.

    Args:
        name: the attribute of the layer; messages call it as files do.
        t: the tensor.
        *shape: that it must have.
    """
    if tuple(t.shape) == shape:
        return None
    return f"{file_name(name)} is of shape {tuple(t.shape)} and not {shape}"


def first_flaw(*rules: str | None) -> str | None:
    """The first rule that is broken, or None."""
    return next((rule for rule in rules if rule), None)


def packed_rows_flaw(
    layer: Any, names: list[str], packing: Packing, starts: Tensor, heads_and_width: tuple[int, int]
) -> str | None:
    """The rule that the tensors of packed rows break by their shapes, or None.

    Args:
        layer: the layer.
        names: its attributes that hold what the packing stores.
        packing: of keys or of values.
        starts: where rows begin, counted in tokens.
        heads_and_width: of stored keys or values, over all rows of a sequence.
    """
    latents, blocks = heads_and_width[0] // layer.row_heads, int(block_starts(packing, starts)[-1])
    sizes = (blocks, latents, *((packing.block,) if packing.block > 1 else ()), heads_and_width[1])
    # packing tensors without memory tells the shapes that files of such a layer must have
    like = packing.pack(torch.empty(*sizes, dtype=layer.recent_k.dtype, device="meta"))
    pairs = zip(names, like, strict=True)
    return first_flaw(*(unlike(name, getattr(layer, name), *other.shape) for name, other in pairs))


def rows_flaw(layer: Any, heads: int, starts: Tensor, positions: Tensor, kept: int) -> str | None:
    """The rule that ragged rows break, or None.

    Rows lie one behind another. They hold tokens from before the dense ones, each once and in order.

    Args:
        layer: the layer.
        heads: KV heads.
        starts: (b h + 1), where rows begin.
        positions: (n), of the tokens in all rows.
        kept: the count n that the layer has.
    """
    positions = positions.long()
    if int(starts[0]) != 0 or int(starts[-1]) != kept or bool((starts.diff() < 0).any()):
        return "rows do not begin one behind the other"
    if not kept:
        return None
    row = row_of(starts)
    index = positions + layer.offset[:, 0][row // heads]
    if bool(((index < 0) | (index >= layer.front_start)).any()):
        return "positions are not among those of the tokens seen"
    same_row = row[1:] == row[:-1]
    return "positions of a row do not rise" if bool((same_row & (positions.diff() <= 0)).any()) else None
