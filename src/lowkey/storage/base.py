"""What our cache layers share, and transformers' own layers with byte counts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lowkey.core.types import LowkeyError
from lowkey.models.attention_interface import Call, Incoming, as_cast
from lowkey.storage.rollback import RestorableLayer, storage_bytes


class StoringLayer(RestorableLayer):
    """A layer that stores in its own form and attends itself; `seen` counts tokens seen, not kept.

    exact_prefill: a chunk of several tokens sees its own keys exactly and is compressed afterwards
    (decode-only compression); otherwise it sees what will be stored (compression everywhere).
    """

    is_sliding = False
    dtype: torch.dtype  # of the keys that came first
    # what a saved layer needs beside its tensors
    numbers: ClassVar[tuple[str, ...]] = ("seen", "exact_prefill")

    def __init__(self, exact_prefill: bool = False) -> None:
        super().__init__()
        self.seen, self.exact_prefill = 0, exact_prefill

    @abstractmethod
    def predicted_nbytes(self) -> int:
        """Bytes that the formula gives for what has been seen."""

    @abstractmethod
    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Store keys and values (b, h, t, d) and answer the call: (b, h, g, t, d)."""

    def nbytes(self) -> int:
        return storage_bytes(self.tensors().values())

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Incoming, Incoming]:
        key_states, value_states = as_cast(key_states), as_cast(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.dtype = key_states.dtype
        self.seen += key_states.shape[2]
        incoming = Incoming(self, key_states, value_states)
        return incoming, incoming

    def answered(self) -> None:
        """`attend` has ended well."""
        if self.forward_pass is not None:
            self.forward_pass.answered()

    def failed(self) -> None:
        """It has not: the whole pass is undone."""
        if self.forward_pass is not None:
            self.forward_pass.undo()

    def get_seq_length(self) -> int:
        self.undo_unfinished()
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self.undo_unfinished()
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def map_tensors(self, f: Callable[[Tensor], Tensor]) -> None:
        for name, tensor in self.tensors().items():
            setattr(self, name, f(tensor))

    def reset(self) -> None:
        self.undo_unfinished()
        for name in self.tensors():
            setattr(self, name, None)
        self.seen, self.is_initialized = 0, False

    def pick(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Hold the rows of the batch that `choose` takes of any tensor (b, ...), in its order."""
        self.map_tensors(choose)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.undo_unfinished()
        self.pick(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.undo_unfinished()
        self.pick(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.undo_unfinished()
        self.pick(lambda t: t.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        raise LowkeyError(
            "crop on a compressed cache is not supported; turn off assisted generation or use a stock cache"
        )

    def offload(self) -> None:
        self.map_tensors(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self.map_tensors(lambda t: t.to(self.device, non_blocking=True))


class StockLayer(RestorableLayer, DynamicLayer):
    """transformers' own full cache layer, with byte counts."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.tensors():
            self.check_fits(key_states, len(self.keys), self.keys.dtype)  # type: ignore[arg-type, union-attr]
        return super().update(key_states, value_states, *args, **kwargs)

    def tensors(self) -> dict[str, Tensor]:
        held = {"keys": self.keys, "values": self.values}
        # upstream's empty ones have one dimension
        return {name: t for name, t in held.items() if t is not None and t.ndim == 4}

    def growing(self) -> dict[str, int]:
        return dict.fromkeys(self.tensors(), 2)

    def get_seq_length(self) -> int:
        self.undo_unfinished()
        return super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self.undo_unfinished()
        return super().get_mask_sizes(query_length)

    def reset(self) -> None:
        self.undo_unfinished()
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor.clone())  # upstream keeps a view of all of it

    def nbytes(self) -> int:
        return storage_bytes(self.tensors().values())

    def predicted_nbytes(self) -> int:
        return self._dense_bytes(super().get_seq_length())

    def _dense_bytes(self, tokens: int) -> int:
        return sum(
            len(t) * t.shape[1] * tokens * t.shape[3] * t.element_size() for t in self.tensors().values()
        )


class StockSlidingLayer(StockLayer, DynamicSlidingWindowLayer):
    """transformers' own sliding layer, with byte counts; a prompt longer than the window is really let go.

    looking: so many tokens at the end of each chunk are seen by that chunk and then forgotten, as in evicting
    layers beside it.
    """

    looking = 0

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        del self._sliding_window_tensor  # only upstream's export reads it

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        DynamicLayer.lazy_initialization(self, key_states, value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        full = super().update(key_states, value_states, *args, **kwargs)
        if self.record_past:
            return full  # `crop` will cut it
        stop = full[0].shape[2] - self.looking
        window = slice(max(0, stop - (self.sliding_window - 1)), stop)
        # upstream keeps views of the whole prompt
        self.keys, self.values = (x[:, :, window].clone() for x in full)
        self.cumulative_length -= self.looking
        return full

    def growing(self) -> dict[str, int]:
        return {}

    def reset(self) -> None:
        super().reset()
        self.looking = 0

    def predicted_nbytes(self) -> int:
        kept = (
            DynamicLayer.get_seq_length(self)
            if self.record_past
            else min(self.cumulative_length, self.sliding_window - 1)
        )
        return self._dense_bytes(kept)


def batch_positions(seen_before: int, call: Call, batch: int) -> Tensor:
    """Positions (b, t) of the new tokens: the model's own, or counted when it gives none."""
    t = call.query.shape[3]
    if call.positions is None:
        return torch.arange(seen_before, seen_before + t, device=call.query.device).expand(batch, t)
    return call.positions.expand(batch, t)
