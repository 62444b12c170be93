"""Chunks of tokens that become one row each: how many have to, and what a gate says of them.

After KV-Efficient VLA (arXiv:2509.21354). A chunk is known by the means of its keys, before their rotation,
and of its values, side by side: u (2 d). A small recurrent network reads the chunks of a head in turn.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

STATE_WIDTH = 32  # numbers of the recurrent state
MAP_WIDTH = 64  # inner width of the maps that correct the means


def gate_sizes(heads: int, width: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer's gate, which its heads share.

    Args:
        heads: KV heads.
        width: channels of a head, d.
    """
    seen = 2 * width
    maps = {
        f"{name}.{part}": size
        for name in ("keys", "values")
        for part, size in (
            ("in", (MAP_WIDTH, seen)),
            ("in_bias", (MAP_WIDTH,)),
            ("out", (width, MAP_WIDTH)),
            ("out_bias", (width,)),
        )
    }
    return {
        "centre": (heads, seen),
        "lstm.in": (4 * STATE_WIDTH, seen),
        "lstm.state": (4 * STATE_WIDTH, STATE_WIDTH),
        "lstm.bias": (4 * STATE_WIDTH,),
        "gate.weight": (STATE_WIDTH,),
        "gate.bias": (1,),
        **maps,
    }


def gated_chunks(
    keys: Tensor, values: Tensor, state: Tensor, gate: Mapping[str, Tensor], active: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows that stand for chunks, and what the gate says of each.

    With u the means of a chunk less the head's centre: the key is `mean + MLP_k(u)`, the value `mean +
    MLP_v(u)`, with MLP(u) = out relu(in u + b) + c. The gate's logit is w . h + b for the state h of an LSTM
    that reads u.

    Args:
        keys: mean keys (b, h, m, d) of m chunks in turn, before their rotation, in fp32.
        values: mean values (b, h, m, d).
        state: (b, h, 2 STATE_WIDTH), behind the chunk before: the LSTM's state and its cell.
        gate: the tensors of `gate_sizes`.
        active: (b, h, m), which chunks there are; None for all. Others leave the state as it is.

    Returns:
        (keys, values, logits (b, h, m), the state behind the last chunk).
    """
    centred = torch.cat([keys, values], -1) - gate["centre"].unsqueeze(1)
    hidden, cell = state.split(STATE_WIDTH, -1)
    into = centred @ gate["lstm.in"].mT + gate["lstm.bias"]
    logits = []
    for i in range(keys.shape[2]):
        wanted, forget, new, shown = (into[:, :, i] + hidden @ gate["lstm.state"].mT).chunk(4, -1)
        next_cell = forget.sigmoid() * cell + wanted.sigmoid() * new.tanh()
        next_hidden = shown.sigmoid() * next_cell.tanh()
        logits.append(next_hidden @ gate["gate.weight"] + gate["gate.bias"])
        if active is not None:
            there = active[:, :, i].unsqueeze(-1)
            next_hidden, next_cell = (
                torch.where(there, a, b) for a, b in ((next_hidden, hidden), (next_cell, cell))
            )
        hidden, cell = next_hidden, next_cell
    corrected = (
        x
        + (centred @ gate[f"{name}.in"].mT + gate[f"{name}.in_bias"]).relu() @ gate[f"{name}.out"].mT
        + gate[f"{name}.out_bias"]
        for name, x in (("keys", keys), ("values", values))
    )
    rows_k, rows_v = corrected
    return rows_k, rows_v, torch.stack(logits, 2), torch.cat([hidden, cell], -1)


def chunks_to_pool(
    sizes: Tensor, whole: Tensor, others: Tensor, held: Tensor, budget: Tensor, keep: float
) -> tuple[Tensor, Tensor]:
    """How many chunks have to become rows, so that a budget holds.

    The oldest chunks go first, and no more of them than must. Of all chunks that ever went, a share `keep`
    has a row, and more where the budget has room.

    Args:
        sizes: (..., m), the tokens that each chunk still has as they came and that may go; 0 for earlier
            chunks.
        whole: (..., m), whether the chunk has left the window altogether. The others go only if all of these
            do not suffice.
        others: (...), tokens that stay as they came.
        held: (...), rows of earlier chunks.
        budget: (...), how many tokens and rows there may be; at least `others`.
        keep: share of chunks that have a row.

    Returns:
        ((...), the first chunks of which all that is left goes; (...), how many rows there may be).
    """
    gone = torch.nn.functional.pad(sizes, (1, 0)).cumsum(-1)  # tokens, if the first 0, 1, ... m chunks go
    new = torch.nn.functional.pad((sizes > 0).long(), (1, 0)).cumsum(-1)
    number = torch.arange(gone.shape[-1], device=sizes.device)
    tokens = (others + sizes.sum(-1)).unsqueeze(-1) - gone
    wanted = torch.minimum((keep * number - 1e-9).ceil().long(), held.unsqueeze(-1) + new)
    fits = tokens + wanted <= budget.unsqueeze(-1)
    fits &= torch.nn.functional.pad(whole, (1, 0), value=True)
    # chunks that went before are no choice: the first that is left tells where to begin
    begins = torch.where((sizes > 0).any(-1), (sizes > 0).long().argmax(-1), sizes.shape[-1])
    fits &= number >= begins.unsqueeze(-1)
    first = torch.where(fits.any(-1), fits.long().argmax(-1), sizes.shape[-1])
    left = tokens.gather(-1, first.unsqueeze(-1)).squeeze(-1)
    return first, (budget - left).clamp_min(0)
