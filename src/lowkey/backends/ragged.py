"""Attention over rows of different length: the fastest backend at hand. The definition is `naive.ragged`."""

from __future__ import annotations

import torch
from torch import Tensor

from lowkey.backends import fused, grouped, numba_cpu, triton_gpu
from lowkey.backends.segment import Part

FEW = 64  # queries per row; more are better off in matrix products


def ragged(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, scaling: float, softcap: float | None = None
) -> Part:
    """As `naive.ragged`; where gradients are wanted, by the one backend that has them."""
    traced = torch.is_grad_enabled() and any(x.requires_grad for x in (query, keys, values))
    if query.shape[1] <= FEW and not traced:
        for device, backend in (("cpu", numba_cpu), ("cuda", triton_gpu)):
            if keys.device.type == device and backend.available() and backend.supports(keys.dtype):
                return backend.ragged(query, keys, values, starts, scaling, softcap)
    elif fused.gives_lse(query, keys, softcap):
        return fused.ragged(query, keys, values, starts, scaling)
    return grouped.ragged(query, keys, values, starts, scaling, softcap)
