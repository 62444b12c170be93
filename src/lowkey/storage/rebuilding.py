"""Dot products of a step's queries with keys that are rebuilt and rotated as they are read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowkey.backends import numba_cpu
from lowkey.backends.stored import StoredRows
from lowkey.models.families import Rope
from lowkey.storage.codec import Codec

# Tokens of each row that are rebuilt at a time, a multiple of any block of a packing. With fewer, threads of
# torch and of numba take turns too often.
REBUILT_AT_ONCE = 2048


Rotation = tuple[np.ndarray, np.ndarray, int]
"""The model's rotary embedding at any position, in small tables; see `numba_rope_kernel`."""


def rotation_below(rope: Rope, like: Tensor, stop: int) -> Rotation:
    """The rotary embedding of positions below `stop`, for a model that rotates in the dtype of `like`."""
    wide = like.new_empty(0, dtype=torch.float32)

    def table(positions: Tensor) -> np.ndarray:
        cos, sin = (x[0, 0] for x in rope(positions.unsqueeze(0), wide))
        half = cos.shape[1] // 2  # both halves are the same
        return torch.stack([cos[:, :half], sin[:, :half]], 1).numpy().copy()

    stride = numba_cpu.STRIDE
    coarse, fine = table(torch.arange(0, stop, stride)), table(torch.arange(stride))
    factor = np.sqrt(np.square(fine[:1]).sum(1, keepdims=True))  # YaRN multiplies cos and sin by one
    return coarse, fine / factor, numba_cpu.MANTISSA[like.dtype]


@dataclass(frozen=True)
class RebuiltKeys:
    """Stored keys that queries meet only once they are rebuilt.

    Args:
        codec: their form.
        sequences: b.
        keys: as they are stored, a row for each latent of a sequence.
        positions: of tokens, int32.
        firsts: (b h), where in `positions` the tokens of each KV head begin.
    """

    codec: Codec
    sequences: int
    keys: StoredRows
    positions: np.ndarray
    firsts: np.ndarray

    def tensors(self) -> list[Tensor]:
        """The tensors that are held besides what the layer holds anyway."""
        return [self.keys.lane, self.keys.first]

    def write_dots(
        self,
        query: Tensor,
        lengths: np.ndarray,
        rotation: Rotation,
        scale: np.float32,
        begin: int,
        out: np.ndarray,
    ) -> None:
        """Write the scaled dot products of rotated queries with the keys.

        Args:
            query: (b h, g, d).
            lengths: (b h), the tokens of each KV head.
            rotation: of the model.
            scale: what they are multiplied with.
            begin: where in the last dimension of `out` they begin.
            out: (b h, g, n), in fp32.
        """
        longest = int(lengths.max(initial=0))
        up, mean = self.codec.key_maps(len(self.keys.lane) // self.sequences)
        if self.sequences > 1:
            up = up.repeat(self.sequences, 1, 1)
            mean = None if mean is None else mean.repeat(self.sequences, 1, 1)
        for start in range(0, longest, REBUILT_AT_ONCE):
            stop = min(start + REBUILT_AT_ONCE, longest)
            latents = self.keys.decoded(start, stop, torch.float32 if self.keys.bits else query.dtype)
            heads = latents.to(query.dtype) @ up
            heads = heads if mean is None else heads + mean
            place = self.positions, self.firsts + start, lengths - start
            numba_cpu.rotated_dots(heads, query, *place, rotation, scale, begin + start, out)
