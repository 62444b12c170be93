"""Head estimation's eye: plain storage that also remembers where each head looked in the latest one-token
step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowkey.backends import grouped
from lowkey.backends.segment import Segment
from lowkey.models.attention_interface import Call
from lowkey.storage.base import StoringLayer


class AttentionRecordingLayer(StoringLayer):
    """keys, values (b, h, s, d); weights (b, h, g, s) in fp32 of the latest one-token step, (b, h, g, 0)
    after a longer one.

    Only one row of weights per head is ever formed, not the (t, s) of the prompt, which goes through torch's
    fused attention.
    """

    keys: Tensor  # type: ignore[assignment]
    values: Tensor  # type: ignore[assignment]
    weights: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.weights = key_states.new_empty(*key_states.shape[:2], 1, 0, dtype=torch.float32)
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        return (
            {name: getattr(self, name) for name in ("keys", "values", "weights")}
            if self.is_initialized
            else {}
        )

    def growing_dims(self) -> dict[str, int]:
        return {"keys": 2, "values": 2} if self.is_initialized else {}

    def predicted_nbytes(self) -> int:
        if not self.is_initialized:
            return 0
        b, h, _, d = self.keys.shape
        watched = self.weights.shape[2] * self.seen * 4 if self.weights.shape[3] else 0
        return b * h * (2 * self.seen * d * self.keys.element_size() + watched)

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        segment = Segment(call.query, self.keys, self.values, call.full_mask(self.seen))
        self.weights = _watched(segment, call)
        if call.mask is None and call.softcap is None and 1 < keys.shape[2] == self.seen:
            return _prompt(keys, values, call)
        return grouped.attend([segment], call.scaling, call.softcap)


def _prompt(keys: Tensor, values: Tensor, call: Call) -> Tensor:
    """Causal attention of a whole, unpadded prompt."""
    g = call.query.shape[2]
    out = F.scaled_dot_product_attention(
        call.query.flatten(1, 2), keys, values, is_causal=True, scale=call.scaling, enable_gqa=g > 1
    )
    return out.unflatten(1, (-1, g))


def _watched(segment: Segment, call: Call) -> Tensor:
    if call.query.shape[3] > 1:
        return call.query.new_empty(*call.query.shape[:3], 0, dtype=torch.float32)
    return segment_weights(segment, call.scaling, call.softcap)[:, :, :, 0]


def segment_weights(segment: Segment, scaling: float, softcap: float | None) -> Tensor:
    """(b, h, g, t, s) in fp32."""
    scores = torch.einsum("bhgtd,bhsd->bhgts", segment.query, segment.keys).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if segment.mask is not None:
        scores = scores.masked_fill(~segment.mask[:, None, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1)
