"""Attention over rows of different length, by the fastest backend that is available.

The definitions are `naive.ragged` for numbers and `stored.stored_rows` for what packings hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lowkey.backends import fused, grouped, numba_cpu, stored, triton_gpu
from lowkey.backends.segment import Part
from lowkey.backends.stored import StepSegment, StoredRows

KERNELS = (("cpu", numba_cpu), ("cuda", triton_gpu))  # by type of device
MOST_QUERIES = 64  # per row for the kernels; more are faster in matrix products


def ragged(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, scaling: float, softcap: float | None = None
) -> Part:
    """Attention of each row's queries over the row's tokens; see `naive.ragged` for arguments.

    Where gradients are wanted, `grouped` answers: it is the one backend that has them.
    """
    traced = torch.is_grad_enabled() and any(x.requires_grad for x in (query, keys, values))
    if query.shape[1] <= MOST_QUERIES and not traced:
        kernels = _kernels(keys.device)
        if kernels is not None and kernels.supports(keys.dtype):
            return kernels.ragged(query, keys, values, starts, scaling, softcap)
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
    kernels = _kernels(query.device)
    if kernels is not None and all(map(kernels.reads, (keys, values))):
        return kernels.stored_rows(query, keys, values, lengths, scaling, softcap, mask)
    return stored.stored_rows(query, keys, values, lengths, scaling, softcap, mask, longest, alike)


class PreparedSegments(Protocol):
    """Tokens of several kinds that the queries of decode steps attend to, prepared for many calls.

    Attributes:
        widths: channels of outputs in the basis of latents and in that of the model, 0 where there are none.
    """

    widths: list[int]

    def tensors(self) -> list[Tensor]:
        """The tensors that are held besides what is stored."""
        ...

    def move(self, step: int) -> None:
        """Let the next call be that of this step, counted from 0."""
        ...

    def attend(
        self,
        queries: tuple[Tensor | None, Tensor | None],
        scaling: float,
        softcap: float | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        sums_only: bool = False,
        share_beside: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Attention over all segments, under one softmax; see `numba_cpu.Segments.attend`."""
        ...


def prepares(device: torch.device) -> bool:
    """Whether this device has a kernel for `prepared_segments`."""
    return _kernels(device) is not None


def prepared_segments(
    queries: int, segments: Sequence[StepSegment], counts: np.ndarray | None = None
) -> PreparedSegments | None:
    """Make ready for many decode steps over tokens of several kinds.

    On a CPU, a step is one kernel call; on a GPU, one for each segment and one more.

    Args:
        queries: of each row.
        segments: the tokens.
        counts: (n, S, 2, R), int64, of n steps and segments whose `lengths` is None: units that are added to
            where each row begins, and its tokens.

    Returns:
        What answers calls; None if no kernel can read all of the tokens where they lie.
    """
    kernels = _kernels(segments[0].values.numbers.device)
    if kernels is None or not all(map(kernels.reads_segment, segments)):
        return None
    return kernels.Segments(queries, segments, counts)


def _kernels(device: torch.device) -> Any:
    """The module with the kernels for a device; None if there is none."""
    for kind, backend in KERNELS:
        if device.type == kind and backend.available():
            return backend
    return None
