"""How the queries of a chunk of new tokens meet the chunk itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowkey.backends import fused, grouped, stock
from lowkey.backends.segment import Part, Segment
from lowkey.models.attention_interface import Call


def attend_to_chunk(call: Call, keys: Tensor, values: Tensor, seen: int) -> Part:
    """Attention of a chunk's queries over the chunk's own tokens.

    Args:
        call: the attention call.
        keys: (b, h, t, d), of the chunk.
        values: (b, h, t, d).
        seen: tokens seen, the chunk included.

    Returns:
        The output (b, h, g, t, d) and its log-sum-exp (b, h, g, t). For a first chunk, which has nothing to
        be merged with, the log-sum-exp may be left at 0.
    """
    t = keys.shape[2]
    if seen == t and call.softcap is None:
        # the first chunk is the only part, so its log-sum-exp is never read
        out = stock.attend(call.query, keys, values, call.mask, call.scaling)
        return out, out.new_zeros(out.shape[:-1])
    if call.mask is None and fused.gives_lse(call.query, keys, call.softcap):
        return fused.causal(call.query, keys, values, call.scaling)
    mask = call.full_mask(seen)
    mask = None if mask is None else mask[..., -t:]  # of the chunk itself; what is older is another part
    if mask is not None and fused.gives_lse(call.query, keys, call.softcap):
        is_causal = bool((mask == torch.ones_like(mask[:1]).tril()).all())
        if is_causal:
            return fused.causal(call.query, keys, values, call.scaling)
    return grouped.partial([Segment(call.query, keys, values, mask)], call.scaling, call.softcap)


def visible_in_chunk(call: Call, real: Tensor | None, seen: int, queries: int) -> Tensor | None:
    """What the newest queries see of a chunk, where that is not what causal attention shows.

    Args:
        call: the attention call that brought the chunk.
        real: (b, t), which tokens of the chunk are no padding; None if the call brought no queries.
        seen: tokens seen, the chunk included.
        queries: how many queries, of which the last t are the chunk's own.

    Returns:
        (b|1, queries, t), or None if every query sees the real tokens up to its own.
    """
    if call.mask is None or real is None:
        return None
    t = real.shape[1]
    in_chunk = call.mask[:, :, seen - t :]
    causal = torch.ones(t, t, dtype=torch.bool, device=real.device).tril() & real.unsqueeze(1)
    if bool(((in_chunk == causal) | ~real.unsqueeze(2)).all()):
        return None
    return pad(in_chunk, (0, 0, queries - t, 0))  # recorded queries came before the chunk and see none of it
