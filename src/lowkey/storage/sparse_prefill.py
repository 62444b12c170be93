"""Attention of a prompt over its important tokens alone (ZipVL, arXiv:2410.08584)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lowkey.models.attention_interface import Call
from lowkey.storage.chunk import attend_to_chunk


def attend_to_important(call: Call, keys: Tensor, values: Tensor, important: Tensor) -> Tensor:
    """Attention of the important tokens of a first chunk over the important ones.

    The others get no update: their output is 0.

    Args:
        call: the attention call.
        keys: (b, h, t, d), of the chunk.
        values: (b, h, t, d).
        important: (b, t).

    Returns:
        The output (b, h, g, t, d).
    """
    out = call.query.new_zeros(*call.query.shape[:4], values.shape[3])
    for row, chosen in enumerate(important):
        at = chosen.nonzero().squeeze(1)
        if not len(at):
            continue
        one = slice(row, row + 1)
        mask = call.mask if call.mask is None or len(call.mask) == 1 else call.mask[one]
        mask = None if mask is None else mask[:, at][:, :, at]
        own = replace(call, query=call.query[one, :, :, at], mask=mask, positions=None)
        answer, _ = attend_to_chunk(own, keys[one, :, at], values[one, :, at], len(at))
        out[row, :, :, at] = answer[0].to(out.dtype)
    return out
