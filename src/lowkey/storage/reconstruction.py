"""A layer for one training pass: keys and values come back as a compressed cache would give them, and nothing
is stored.
"""

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
    def update(self, keys: Tensor, values: Tensor, /) -> tuple[Tensor, Tensor] | tuple[Incoming, Incoming]:
        """Keys and values (b, h, t, d) after they went through the compressed form, or what attends to them;
        differentiable.
        """
        ...


class ReconstructionLayer(StockLayer):
    """Rebuilds in fp32, whatever the model's dtype, as training the maps needs; positions start at 0 and
    there is no padding.

    exact: what each query sees as it is, as in a `CodedLayer`: the first `sinks` tokens and the `recent` up
    to itself.
    """

    def __init__(self, storage: KVTransform, exact: Exact = NO_EXACT_TOKENS) -> None:
        super().__init__()
        self.storage, self.exact = storage, exact

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Any, Any]:
        if not self.exact.sinks and not self.exact.recent:
            return self._rebuilt(key_states, value_states)
        incoming = Incoming(self, key_states, value_states)
        return incoming, incoming

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        tokens = torch.arange(keys.shape[2], device=keys.device)
        near = self.exact.exact_mask(keys.shape[2], keys.device)
        mask = call.mask if call.mask is not None else (tokens <= tokens.unsqueeze(1)).unsqueeze(0)
        far = Segment(call.query, *self._rebuilt(keys, values), mask & ~near)
        return grouped.attend(
            [far, Segment(call.query, keys, values, mask & near)], call.scaling, call.softcap
        )

    def attend_succeeded(self) -> None:
        return None

    def attend_failed(self) -> None:
        return None

    def _rebuilt(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found: Any = self.storage.update(keys.float(), values.float())
        return found[0].to(keys.dtype), found[1].to(values.dtype)
