"""What undoes a forward pass that was refused or interrupted, so that a call that fails leaves a cache as it
was.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from lowkey.core.types import LowkeyError


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors: a small view of a large buffer counts as the buffer."""
    held = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors}
    return sum(size for _, size in held)


@dataclass(frozen=True)
class Snapshot:
    """What a layer was. Stored tensors are never overwritten, so a shallow copy remembers them; those that
    only grow are left out and remembered by (dimension, length), so that no step needs room for a second
    cache."""

    layer: RestorableLayer
    lengths: dict[str, tuple[int, int]]

    def tensors(self) -> list[Tensor]:
        return [t for t in self.layer.tensors().values() if isinstance(t, Tensor)]


class ForwardPass:
    """The forward pass that runs over the layers of one cache: what they were before it, until the last of
    them has answered.

    A pass that ends earlier is undone: at once when the error arises in our own code, else when one of its
    layers is next asked for its length or given tokens. What fails behind the attention of the last layer
    cannot be seen; the new tokens are then in the cache.
    """

    def __init__(self) -> None:
        self.before: dict[RestorableLayer, Snapshot] = {}
        # of the layer that was entered last; whether it is the last of the cache
        self.index, self.last = -1, False
        # index of the last layer entered, where asking for the length has undone a pass
        self.cut: int | None = None

    def enter(self, index: int, layer: RestorableLayer, last: bool) -> None:
        """A layer is about to be given new tokens."""
        if layer in self.before:
            self.undo()
        if self.cut is not None and index == self.cut + 1:
            raise LowkeyError(
                "cache: was asked for its length within a forward pass, which ends that pass; ask before it "
                "or after it"
            )
        self.before[layer] = layer.snapshot()
        self.index, self.last, self.cut = index, last, None

    def answered(self) -> None:
        """The layer that was entered last has attended to its tokens."""
        if self.last:
            self.before.clear()

    def undo(self) -> None:
        for layer, before in self.before.items():
            layer.restore(before)
        self.before.clear()

    def nbytes(self) -> int:
        """Bytes that are held only to undo the pass."""
        pairs = [(list(layer.tensors().values()), before.tensors()) for layer, before in self.before.items()]
        return sum(storage_bytes([*now, *then]) - storage_bytes(now) for now, then in pairs)


class RestorableLayer(CacheLayerMixin):
    """A cache layer whose part in an unfinished forward pass can be undone."""

    forward_pass: ForwardPass | None = None  # of the cache that the layer belongs to

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything held, by attribute name."""

    def growing(self) -> dict[str, int]:
        """The tensors that new tokens only make longer, by name, and along which dimension."""
        return {}

    def snapshot(self) -> Snapshot:
        before, lengths = copy.copy(self), {}
        for name, dim in self.growing().items():
            lengths[name] = (dim, getattr(self, name).shape[dim])
            setattr(before, name, None)
        return Snapshot(before, lengths)

    def restore(self, before: Snapshot) -> None:
        now, then = vars(self), dict(vars(before.layer))
        for name, (dim, length) in before.lengths.items():
            tensor = now[name]
            then[name] = tensor if tensor.shape[dim] == length else tensor.narrow(dim, 0, length).clone()
        now.clear()
        now.update(then)

    def undo_unfinished(self) -> None:
        """Called when the layer is asked for its length or changed from outside: a pass that has begun and
        not ended is undone.

        Whether such a pass was interrupted or still runs cannot be told here. If it still runs, its next
        layer finds `cut` and refuses.
        """
        running = self.forward_pass
        if running is not None and self in running.before:
            running.undo()
            running.cut = running.index

    def check_fits(self, keys: Tensor, rows: int, dtype: torch.dtype) -> None:
        """Whether new keys (b, h, t, d) can join what is held.

        Errors: LowkeyError for another batch size or dtype.
        """
        if len(keys) != rows:
            one = f"cache.batch_repeat_interleave({len(keys)})" if rows == 1 else "cache.batch_select_indices"
            raise LowkeyError(
                f"cache: holds {rows} row{'s' * (rows != 1)} and is given {len(keys)}; call {one} first, or "
                "use a fresh cache"
            )
        if keys.dtype != dtype:
            raise LowkeyError(
                f"cache: was filled in {dtype} and is given {keys.dtype}; use the model in that dtype, or a "
                "fresh cache"
            )
