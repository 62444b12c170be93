"""Rows of different length, one after another: (n, w) with starts (R + 1)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def starts_of(lengths: Int[Tensor, " R"]) -> Int[Tensor, " R1"]:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def row_of(starts: Int[Tensor, " R1"]) -> Int[Tensor, " n"]:
    """Which row each token belongs to."""
    lengths = starts.diff()
    return torch.arange(len(lengths), device=starts.device).repeat_interleave(lengths)


def padded(flat: Tensor, starts: Int[Tensor, " R1"]) -> tuple[Tensor, Bool[Tensor, "R s"]]:
    """(R, longest, ...) with zeros behind shorter rows, and which places are real."""
    lengths = starts.diff()
    real = torch.arange(int(lengths.max()) if len(lengths) else 0, device=starts.device) < lengths.unsqueeze(
        1
    )
    dense = flat.new_zeros(*real.shape, *flat.shape[1:])
    dense[real] = flat
    return dense, real


def appended(
    flat: Shaped[Tensor, "n ..."], starts: Int[Tensor, " R1"], more: Shaped[Tensor, "R t ..."]
) -> Shaped[Tensor, "m ..."]:
    """Every row with `t` more tokens behind it."""
    rows, t = more.shape[:2]
    out = flat.new_empty(len(flat) + rows * t, *flat.shape[1:])
    shift = torch.arange(rows, device=starts.device) * t
    out[torch.arange(len(flat), device=starts.device) + shift.repeat_interleave(starts.diff())] = flat
    out[((starts[1:] + shift).unsqueeze(1) + torch.arange(t, device=starts.device)).flatten()] = more.flatten(
        0, 1
    )
    return out


def picked(
    flat: Shaped[Tensor, "n ..."], starts: Int[Tensor, " R1"], rows: Int[Tensor, " k"]
) -> tuple[Tensor, Int[Tensor, " K1"]]:
    """The rows with these numbers, one after another, and where each begins."""
    lengths = starts.diff()[rows]
    begins = starts_of(lengths)
    index = torch.arange(int(begins[-1]), device=starts.device) + (
        starts[:-1][rows] - begins[:-1]
    ).repeat_interleave(lengths)
    return flat[index], begins


def best(scores: Float[Tensor, "*r s"], counts: Int[Tensor, "*r"]) -> Bool[Tensor, "*r s"]:
    """Which `counts` tokens of each row have the highest scores; of equal ones the earlier."""
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return rank < counts.unsqueeze(-1)
