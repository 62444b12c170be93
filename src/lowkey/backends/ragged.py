"""Attention over rows of different length, by the fastest backend that is available.

The definition is `naive.ragged`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowkey.backends import fused, grouped, numba_cpu, triton_gpu
from lowkey.backends.segment import Part

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
