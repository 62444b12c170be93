"""What our cache layers share, and transformers' own layers with byte counts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from lowkey.seam import Call, Incoming
from lowkey.types import LowkeyError


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors: a small view of a large buffer counts as the buffer."""
    held = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors}
    return sum(size for _, size in held)


class StoringLayer(CacheLayerMixin):
    """A layer that stores in its own form and attends itself; `seen` counts tokens seen, not kept.

    exact_prefill: a chunk of several tokens sees its own keys exactly and is compressed afterwards (decode-only
    compression); otherwise it sees what will be stored (compression everywhere).
    """

    is_sliding = False
    numbers: ClassVar[tuple[str, ...]] = ("seen", "exact_prefill")  # what a saved layer needs beside its tensors

    def __init__(self, exact_prefill: bool = False) -> None:
        super().__init__()
        self.seen, self.exact_prefill = 0, exact_prefill

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything held, by attribute name."""

    @abstractmethod
    def predicted_nbytes(self) -> int:
        """Bytes that the formula gives for what has been seen."""

    @abstractmethod
    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Store keys and values (b, h, t, d) and answer the call: (b, h, g, t, d)."""

    def nbytes(self) -> int:
        return storage_bytes(self.tensors().values())

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Incoming, Incoming]:  # type: ignore[override]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        incoming = Incoming(self, key_states, value_states)
        return incoming, incoming

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def map_tensors(self, f: Callable[[Tensor], Tensor]) -> None:
        for name, tensor in self.tensors().items():
            setattr(self, name, f(tensor))

    def reset(self) -> None:
        for name in self.tensors():
            setattr(self, name, None)
        self.seen, self.is_initialized = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map_tensors(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map_tensors(lambda t: t[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map_tensors(lambda t: t.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        raise LowkeyError("crop on a compressed cache is not supported; turn off assisted generation or use a stock cache")

    def offload(self) -> None:
        self.map_tensors(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self.map_tensors(lambda t: t.to(self.device, non_blocking=True))


class StockLayer(DynamicLayer):
    """transformers' own full cache layer, with byte counts."""

    def nbytes(self) -> int:
        return storage_bytes(t for t in (self.keys, self.values) if t is not None)

    def predicted_nbytes(self) -> int:
        return _dense_bytes(self.keys, self.values, self.get_seq_length())


class StockSlidingLayer(DynamicSlidingWindowLayer):
    """transformers' own sliding layer, with byte counts; a prompt longer than the window is really let go.

    looking: so many tokens at the end of each chunk are seen by that chunk and then forgotten, as in evicting layers beside it.
    """

    looking = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        full = super().update(key_states, value_states, *args, **kwargs)
        stop = full[0].shape[2] - self.looking
        window = slice(max(0, stop - (self.sliding_window - 1)), stop)
        self.keys, self.values = (x[:, :, window].clone() for x in full)  # upstream keeps views of the whole prompt
        self.cumulative_length -= self.looking
        return full

    def reset(self) -> None:
        super().reset()
        self.looking = 0

    def nbytes(self) -> int:
        return storage_bytes(t for t in (self.keys, self.values) if t is not None)

    def predicted_nbytes(self) -> int:
        kept = min(self.get_seq_length(), self.sliding_window - 1)
        return _dense_bytes(self.keys, self.values, kept)


def _dense_bytes(keys: Tensor | None, values: Tensor | None, tokens: int) -> int:
    if keys is None or values is None:
        return 0
    b, h = keys.shape[:2]
    return b * h * tokens * (keys.shape[-1] + values.shape[-1]) * keys.element_size()


def batch_positions(seen_before: int, call: Call, batch: int) -> Tensor:
    """Positions (b, t) of the new tokens: the model's own, or counted when it gives none."""
    t = call.query.shape[3]
    if call.positions is None:
        return torch.arange(seen_before, seen_before + t, device=call.query.device).expand(batch, t)
    return call.positions.expand(batch, t)
