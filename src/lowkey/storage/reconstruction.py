"""A cache layer for training: keys and values come back as a compressed cache would return them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from lowkey.backends import grouped
from lowkey.backends.segment import Segment
from lowkey.models.attention_interface import Call, Incoming
from lowkey.storage.base import StockLayer
from lowkey.storage.exact import NO_EXACT_TOKENS, Exact


class KVTransform(Protocol):
    """Something that keys and values pass through before attention reads them."""

    def update(self, keys: Tensor, values: Tensor, /) -> tuple[Tensor, Tensor] | tuple[Incoming, Incoming]:
        """Transform keys and values; differentiable.

        Args:
            keys: rotated keys (b, h, t, d).
            values: (b, h, t, d).

        Returns:
            Keys and values (b, h, t, d) after the transform, or an `Incoming` for each, if a layer of ours
            attends to them itself.
        """
        ...


class ReconstructionLayer(StockLayer):
    """Passes keys and values through a transform and stores nothing, for one pass of training.

    The transform runs in fp32 whatever the model's dtype, as the training of its maps needs. Positions start
    at 0 and there is no padding.

    Args:
        transform: what keys and values pass through.
        exact: tokens that each query sees as they are, as in a `CodedLayer`: the first `sinks` tokens, and
            the `recent` ones up to itself.
    """

    def __init__(self, transform: KVTransform, exact: Exact = NO_EXACT_TOKENS) -> None:
        super().__init__()
        self.transform, self.exact = transform, exact

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Any, Any]:
        """The transformed keys and values; with exact tokens, an `Incoming` that leads to `attend`."""
        if not self.exact.sinks and not self.exact.recent:
            return self._transformed(key_states, value_states)
        incoming = Incoming(self, key_states, value_states)
        return incoming, incoming

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Attention over transformed tokens and exact ones under one softmax; see `StoringLayer.attend`."""
        tokens = torch.arange(keys.shape[2], device=keys.device)
        seen_exactly = self.exact.exact_mask(keys.shape[2], keys.device)
        mask = call.mask if call.mask is not None else (tokens <= tokens.unsqueeze(1)).unsqueeze(0)
        # each token is in one of the two segments, so that it counts once in the softmax
        transformed = Segment(call.query, *self._transformed(keys, values), mask & ~seen_exactly)
        exact = Segment(call.query, keys, values, mask & seen_exactly)
        return grouped.attend([transformed, exact], call.scaling, call.softcap)

    def call_answered(self, keys: Tensor, values: Tensor, call: Call) -> None:
        """Nothing is stored, so nothing can be taken back."""
        return None

    def attend_succeeded(self) -> None:
        """Nothing is stored, so there is nothing to note."""
        return None

    def attend_failed(self) -> None:
        """Nothing is stored, so there is nothing to undo."""
        return None

    def _transformed(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        pair: Any = self.transform.update(keys.float(), values.float())
        return pair[0].to(keys.dtype), pair[1].to(values.dtype)
