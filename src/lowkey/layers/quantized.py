"""Every key and value in 8 or 4 bits, packed; the honest rival of low rank at equal bytes (arXiv:2604.11501)."""

from __future__ import annotations

import torch
from torch import Tensor

from lowkey.backends import grouped
from lowkey.backends.segment import Segment
from lowkey.layers.base import StoringLayer
from lowkey.ops.quantize import Packed, dequantize, quantize
from lowkey.seam import Call

FIELDS = ("codes", "scale", "low")


class QuantizedLayer(StoringLayer):
    """Groups of `group` channels of one token and head share a scale and an offset in the model's dtype.

    Held for keys and values: codes uint8 (b, h, s, d bits/8), scale and low (b, h, s, d/group).
    """

    def __init__(self, bits: int, group: int = 32) -> None:
        super().__init__()
        self.bits, self.group = bits, group

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.group = min(self.group, key_states.shape[-1])
        for name, states in (("keys", key_states), ("values", value_states)):
            self._store(name, quantize(states[:, :, :0], self.bits, self.group))
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        names = [f"{kind}_{field}" for kind in ("keys", "values") for field in FIELDS]
        return {name: getattr(self, name) for name in names} if self.is_initialized else {}

    def predicted_nbytes(self) -> int:
        if not self.is_initialized:
            return 0
        b, h, _, groups = self.keys_scale.shape
        d = groups * self.group
        return 2 * b * h * self.seen * (d * self.bits // 8 + 2 * groups * self.keys_scale.element_size())

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        for name, states in (("keys", keys), ("values", values)):
            old, new = self._load(name), quantize(states, self.bits, self.group)
            codes, scale, low = (torch.cat(pair, 2) for pair in zip(old.tensors, new.tensors, strict=True))
            self._store(name, Packed(codes, scale, low, self.bits))
        segments = [Segment(call.query, dequantize(self._load("keys")), dequantize(self._load("values")), call.full_mask(self.seen))]
        if self.exact_prefill and keys.shape[2] > 1:
            segments = _with_exact(segments[0], keys, values)
        return grouped.attend(segments, call.scaling, call.softcap)

    def _store(self, name: str, packed: Packed) -> None:
        for field, tensor in zip(FIELDS, packed.tensors, strict=True):
            setattr(self, f"{name}_{field}", tensor)

    def _load(self, name: str) -> Packed:
        codes, scale, low = (getattr(self, f"{name}_{field}") for field in FIELDS)
        return Packed(codes, scale, low, self.bits)


def _with_exact(stored: Segment, keys: Tensor, values: Tensor) -> list[Segment]:
    """The same tokens, the last of them as they came."""
    old = stored.keys.shape[2] - keys.shape[2]
    mask = stored.mask if stored.mask is not None else stored.keys.new_ones(1, stored.query.shape[3], old + keys.shape[2], dtype=torch.bool)
    past = Segment(stored.query, stored.keys[:, :, :old], stored.values[:, :, :old], mask[..., :old])
    return [past, Segment(stored.query, keys, values, mask[..., old:])]
