"""Rows of different length, stored one behind another without padding.

`flat` (n, ...) holds all tokens of all R rows. `starts` (R + 1) says where each row begins; the last entry is
n. Row i is `flat[starts[i] : starts[i + 1]]`.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def starts_of(lengths: Int[Tensor, " R"]) -> Int[Tensor, " R1"]:
    """Where rows of these lengths begin, and where the last one ends."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def row_of(starts: Int[Tensor, " R1"]) -> Int[Tensor, " n"]:
    """For every token, the number of the row that it belongs to."""
    lengths = starts.diff()
    return torch.arange(len(lengths), device=starts.device).repeat_interleave(lengths)


def pad_rows(
    flat: Tensor, starts: Int[Tensor, " R1"], longest: int | None = None
) -> tuple[Tensor, Bool[Tensor, "R s"]]:
    """Write the rows as a dense tensor.

    Args:
        flat: the rows, one behind another.
        starts: where each row begins.
        longest: the tokens of the longest row, if that is known.

    Returns:
        (the rows (R, longest, ...) with zeros behind shorter ones, which entries are real (R, longest)).
    """
    lengths = starts.diff()
    if longest is None:
        longest = int(lengths.max()) if len(lengths) else 0
    real = torch.arange(longest, device=starts.device) < lengths.unsqueeze(1)
    dense = flat.new_zeros(*real.shape, *flat.shape[1:])
    dense[real] = flat
    return dense, real


def append_to_rows(
    flat: Shaped[Tensor, "n ..."], starts: Int[Tensor, " R1"], more: Shaped[Tensor, "R t ..."]
) -> Shaped[Tensor, "m ..."]:
    """Put the same number of tokens behind every row.

    Args:
        flat: the rows, one behind another.
        starts: where each row begins.
        more: `t` new tokens for each row.

    Returns:
        The longer rows, one behind another; m = n + R t.
    """
    rows, t = more.shape[:2]
    more_starts = torch.arange(rows + 1, device=starts.device) * t
    return join_rows(flat, starts, more.flatten(0, 1), more_starts)


def join_rows(
    flat: Shaped[Tensor, "n ..."],
    starts: Int[Tensor, " R1"],
    more: Shaped[Tensor, "k ..."],
    more_starts: Int[Tensor, " R1"],
) -> Shaped[Tensor, "m ..."]:
    """Put a second set of rows behind the first, row by row; both may have rows of different length.

    Args:
        flat: the first rows, one behind another.
        starts: where each of them begins.
        more: the second rows, as many as the first, one behind another.
        more_starts: where each of them begins.

    Returns:
        The joined rows, one behind another; m = n + k.
    """
    out = flat.new_empty(len(flat) + len(more), *flat.shape[1:])
    # a token moves back by all that is put in before its row, or before it in its row
    out[torch.arange(len(flat), device=flat.device) + more_starts[row_of(starts)]] = flat
    out[torch.arange(len(more), device=flat.device) + starts[1:][row_of(more_starts)]] = more
    return out


def select_rows(
    flat: Shaped[Tensor, "n ..."], starts: Int[Tensor, " R1"], rows: Int[Tensor, " k"]
) -> tuple[Tensor, Int[Tensor, " K1"]]:
    """Take the rows with these numbers, in this order.

    Returns:
        (the chosen rows, one behind another, where each of them begins (k + 1)).
    """
    lengths = starts.diff()[rows]
    begins = starts_of(lengths)
    # how far each token of a chosen row lies behind its new place
    shift = (starts[:-1][rows] - begins[:-1]).repeat_interleave(lengths)
    return flat[torch.arange(int(begins[-1]), device=starts.device) + shift], begins


def top_mask(scores: Float[Tensor, "*r s"], counts: Int[Tensor, "*r"]) -> Bool[Tensor, "*r s"]:
    """Which tokens of each row are among its `counts` highest scores; of equal scores the earlier wins."""
    # the place of each token in the order of scores: the inverse of that order
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return rank < counts.unsqueeze(-1)
