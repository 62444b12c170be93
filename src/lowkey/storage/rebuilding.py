"""The rotary embedding as kernels take it that rebuild keys and rotate them as they are read."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lowkey.backends import numba_cpu, numba_pages
from lowkey.backends.stored import STRIDE
from lowkey.models.families import Rope

Rotation = tuple[np.ndarray, np.ndarray, int]
"""The model's rotary embedding at any position, in small tables; see `stored.Rebuilding`."""


def rotation_below(rope: Rope, like: Tensor, stop: int) -> Rotation:
    """The rotary embedding of positions below `stop`, for a model that rotates in the dtype of `like`."""
    wide = like.new_empty(0, dtype=torch.float32)

    def table(positions: Tensor) -> np.ndarray:
        cos, sin = (x[0, 0] for x in rope(positions.unsqueeze(0), wide))
        half = cos.shape[1] // 2  # both halves are the same
        return torch.stack([cos[:, :half], sin[:, :half]], 1).cpu().numpy().copy()

    stride, device = STRIDE, like.device
    coarse = table(torch.arange(0, stop, stride, device=device))
    fine = table(torch.arange(stride, device=device))
    factor = np.sqrt(np.square(fine[:1]).sum(1, keepdims=True))  # YaRN multiplies cos and sin by one
    return coarse, fine / factor, numba_cpu.MANTISSA[like.dtype]


def turns_below(rope: Rope, like: Tensor, stop: int, d: int) -> numba_pages.Turns:
    """The rotary embedding of keys of d channels at every position below `stop`, and a few behind.

    A table of all positions takes less work than two small ones. It is for kernels that read pages.

    Args:
        rope: of the model.
        like: in the dtype in which the model rotates.
        stop: the longest sequence.
        d: channels of a key.
    """
    positions = torch.arange(stop + numba_pages.POSITIONS_BEHIND, device=like.device)
    cos, sin = (x[0, 0] for x in rope(positions.unsqueeze(0), like))
    half = cos.shape[1] // 2  # both halves are the same
    return numba_pages.Turns(torch.stack([cos[:, :half], sin[:, :half]], 1).cpu().numpy(), d)
