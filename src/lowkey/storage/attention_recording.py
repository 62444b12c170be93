"""Records attention weights while the model decodes, to find out which heads look where."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowkey.backends import grouped
from lowkey.backends.segment import Segment, softcapped
from lowkey.models.attention_interface import Call
from lowkey.storage.base import StoringLayer


class AttentionRecordingLayer(StoringLayer):
    """Stores all tokens as they are, and remembers the attention weights of the latest one-token step.

    The weights of a prompt, (t, s) for each head, are never formed: a prompt goes through torch's fused
    attention.

    Attributes:
        keys: (b, h, s, d).
        values: (b, h, s, d).
        weights: (b, h, g, s) in fp32, of the latest one-token step; (b, h, g, 0) after a longer call.
    """

    keys: Tensor
    values: Tensor
    weights: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty tensors for this batch size, device and dtype."""
        self.device = key_states.device
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.weights = key_states.new_empty(*key_states.shape[:2], 1, 0, dtype=torch.float32)
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are held, by attribute name."""
        if not self.is_initialized:
            return {}
        return {name: getattr(self, name) for name in ("keys", "values", "weights")}

    def growing_dims(self) -> dict[str, int]:
        """Keys and values grow along the tokens; the weights are replaced."""
        return {"keys": 2, "values": 2} if self.is_initialized else {}

    def predicted_nbytes(self) -> int:
        """The bytes of all keys and values, and of the weights of one step."""
        if not self.is_initialized:
            return 0
        b, h, _, d = self.keys.shape
        weights = self.weights.shape[2] * self.seen * 4 if self.weights.shape[3] else 0
        return b * h * (2 * self.seen * d * self.keys.element_size() + weights)

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Store the new tokens, answer the call, and record its weights if it is a one-token step."""
        # new tensors: writing in place would change what a snapshot of the layer holds
        self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        segment = Segment(call.query, self.keys, self.values, call.full_mask(self.seen))
        if call.query.shape[3] == 1:
            self.weights = segment_weights(segment, call.scaling, call.softcap)[:, :, :, 0]
        else:
            self.weights = call.query.new_empty(*call.query.shape[:3], 0, dtype=torch.float32)
        # without padding and soft cap, which torch's fused kernel does not know
        if call.mask is None and call.softcap is None and 1 < keys.shape[2] == self.seen:
            return attend_to_prompt(keys, values, call)
        return grouped.attend([segment], call.scaling, call.softcap)


def attend_to_prompt(keys: Tensor, values: Tensor, call: Call) -> Tensor:
    """Causal attention of a whole prompt without padding, by torch's fused kernel."""
    g = call.query.shape[2]
    out = F.scaled_dot_product_attention(
        call.query.flatten(1, 2), keys, values, is_causal=True, scale=call.scaling, enable_gqa=g > 1
    )
    return out.unflatten(1, (-1, g))


def segment_weights(segment: Segment, scaling: float, softcap: float | None) -> Tensor:
    """The attention weights (b, h, g, t, s) of queries over one segment, in fp32.

    Args:
        segment: queries (b, h, g, t, d) and keys (b, h, s, d), with or without a mask.
        scaling: what scores are multiplied with.
        softcap: the soft cap of scores, or None.
    """
    scores = torch.einsum("bhgtd,bhsd->bhgts", segment.query, segment.keys).float() * scaling
    scores = softcapped(scores, softcap)
    if segment.mask is not None:
        scores = scores.masked_fill(~segment.mask[:, None, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1)
