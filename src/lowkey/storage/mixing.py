"""Mixes full and local attention by a gate for each KV head, to learn which heads need all tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from lowkey.backends.segment import softcapped
from lowkey.models.attention_interface import Call
from lowkey.storage.base import StoringLayer


class MixedAttentionLayer(StoringLayer):
    """A cache layer that stores all tokens as they are, and answers with `gate * full + (1 - gate) * local`.

    Local attention of the query at position q sees the first tokens, and the tokens from q - `recent` to q.
    Queries of the prompt may attend fully instead. Rows may not be padded on the left. Results carry
    gradients to the gates.

    Args:
        gates: (h), from 0 for local to 1 for full attention.
        sinks: number of first tokens that local attention sees.
        recent: number of tokens before its own that it sees.
        full_before: queries before this position attend fully whatever the gates.

    Attributes:
        keys: (b, h, s, d).
        values: (b, h, s, d).

    Source: arXiv:2410.10819 and arXiv:2510.08525.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, gates: Tensor, sinks: int, recent: int, full_before: int = 0) -> None:
        super().__init__()
        self.gates, self.sinks, self.recent, self.full_before = gates, sinks, recent, full_before

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty tensors for this batch size, device and dtype."""
        self.device = key_states.device
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are held, by attribute name; the gates belong to who trains them."""
        return {"keys": self.keys, "values": self.values} if self.is_initialized else {}

    def growing_dims(self) -> dict[str, int]:
        """Keys and values grow along the tokens."""
        return {"keys": 2, "values": 2} if self.is_initialized else {}

    def predicted_nbytes(self) -> int:
        """The bytes of all keys and values."""
        if not self.is_initialized:
            return 0
        b, h, _, d = self.keys.shape
        return 2 * b * h * self.seen * d * self.keys.element_size()

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Store the new tokens and answer the call by both kinds of attention."""
        # new tensors: writing in place would change what a snapshot of the layer, or a gradient, holds
        self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        logits = torch.einsum("bhgtd,bhsd->bhgts", call.query, self.keys).float() * call.scaling
        logits = softcapped(logits, call.softcap)
        if (mask := call.full_mask(self.seen)) is not None:
            logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
        gates = self.gates.to(logits.dtype).view(-1, 1, 1, 1)
        local = logits.masked_fill(~self._local(call.query.shape[3]), -torch.inf)
        weights = gates * logits.softmax(-1) + (1 - gates) * local.softmax(-1)
        return torch.einsum("bhgts,bhsd->bhgtd", weights.to(self.values.dtype), self.values)

    def _local(self, queries: int) -> Tensor:
        """Which tokens each of the newest queries sees locally (t, s), causal or not."""
        at = torch.arange(self.seen, device=self.keys.device)
        own = at[-queries:, None]
        return (at < self.sinks) | (own - at <= self.recent) | (own < self.full_before)
