"""Attention over rows of different length, by the fastest backend that is available.

The definitions are `naive.ragged` for numbers and `stored.stored_rows` for what packings hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowkey.backends import fused, grouped, numba_cpu, stored, triton_gpu
from lowkey.backends.segment import Part
from lowkey.backends.stored import StepSegment, StoredRows

MOST_QUERIES = 64  # per row for the kernels; more are faster in matrix products


def ragged(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, scaling: float, softcap: float | None = None
) -> Part:
    """Attention of each row's queries over the row's tokens; see `naive.ragged` for arguments.

    Where gradients are wanted, `grouped` answers: it is the one backend that has them.
    """
    traced = torch.is_grad_enabled() and any(x.requires_grad for x in (query, keys, values))
    if query.shape[1] <= MOST_QUERIES and not traced:
        for device, backend in (("cpu", numba_cpu), ("cuda", triton_gpu)):
            if keys.device.type == device and backend.available() and backend.supports(keys.dtype):
                return backend.ragged(query, keys, values, starts, scaling, softcap)
    elif fused.gives_lse(query, keys, softcap):
        return fused.ragged(query, keys, values, starts, scaling)
    return grouped.ragged(query, keys, values, starts, scaling, softcap)


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
    """Attention of a few queries over rows as they are stored; see `stored.stored_rows`.

    No decoded copy of the rows is made: kernels widen codes in registers, and torch decodes block by block.
    """
    for device, backend in (("cpu", numba_cpu), ("cuda", triton_gpu)):
        if query.device.type == device and backend.available() and all(map(backend.reads, (keys, values))):
            return backend.stored_rows(query, keys, values, lengths, scaling, softcap, mask)
    return stored.stored_rows(query, keys, values, lengths, scaling, softcap, mask, longest, alike)


def prepares(device: torch.device) -> bool:
    """Whether this device has a kernel for `prepared_segments`."""
    return device.type == "cpu" and numba_cpu.available()


def prepared_segments(queries: int, segments: Sequence[StepSegment]) -> numba_cpu.Segments | None:
    """Make ready for many decode steps over tokens of several kinds, one kernel call each, where `prepares`.

    Args:
        queries: of each row.
        segments: the tokens.

    Returns:
        What answers calls; None if no kernel can read all of the tokens where they lie.
    """
    readable = all(numba_cpu.reads_segment(s) for s in segments)
    return numba_cpu.Segments(queries, segments) if readable else None
