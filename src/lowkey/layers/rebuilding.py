"""A layer for one training pass: keys and values come back as a compressed cache would give them, and nothing is stored."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lowkey.layers.base import StockLayer


class Rebuilding(Protocol):
    def update(self, keys: Tensor, values: Tensor, /) -> tuple[Tensor, Tensor]:
        """Keys and values (b, h, t, d) after they went through the compressed form; differentiable."""
        ...


class RebuildingLayer(StockLayer):
    """Rebuilds in fp32, whatever the model's dtype, as training the maps needs; positions start at 0 and there is no padding."""

    def __init__(self, storage: Rebuilding) -> None:
        super().__init__()
        self.storage = storage

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        keys, values = self.storage.update(key_states.float(), value_states.float())
        return keys.to(key_states.dtype), values.to(value_states.dtype)
