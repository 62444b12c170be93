"""Undoes a forward pass that was refused or interrupted, so that a failed call leaves the cache unchanged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from lowkey.core.types import LowkeyError
from lowkey.models.attention_interface import Call
from lowkey.storage.recording import GivenTokens, Recording
from lowkey.storage.step_counts import PlainStep


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of the distinct storages behind some tensors.

    A small view of a large buffer keeps the whole buffer alive, and therefore counts as the whole buffer.
    Tensors that share a storage count once.
    """
    held = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors}
    return sum(size for _, size in held)


@dataclass(frozen=True)
class Snapshot:
    """The state of one layer before a forward pass.

    Stored tensors are never overwritten, so a shallow copy of the layer remembers them. Tensors that only
    grow are left out of the copy and remembered by their length: no step then needs room for a second cache.

    Args:
        layer: a shallow copy of the layer, with None in the place of the tensors that only grow.
        lengths: for each tensor that only grows, by attribute name, (dimension, length along it).
    """

    layer: RestorableLayer
    lengths: dict[str, tuple[int, int]]

    def tensors(self) -> list[Tensor]:
        """The tensors that the copy keeps alive."""
        return [t for t in self.layer.tensors().values() if isinstance(t, Tensor)]


class ForwardPass:
    """One forward pass over the layers of a cache, with what is needed to undo it.

    The pass is complete when the attention of the last layer has succeeded. A pass that ends earlier is
    undone: at once when the error arises in our own code, else when one of its layers is next asked for its
    length or given tokens. An error behind the last layer's attention cannot be noticed here; the new tokens
    then stay in the cache.

    Attributes:
        snapshots: the layers that were entered in this pass, each with its state before.
        index: the index of the layer that was entered last, -1 before the first.
        is_last: whether that layer is the last of the cache.
        interrupted_at: the index of the layer that was entered last when a request for the length undid the
            pass, or None. If the pass is in fact still running, its next layer finds this and refuses.
        recording: the passes that `crop` can take back, None while none are recorded.
        recorded_before: the recording before this pass.
        rotations: rotary embeddings that the layers share; see `SteppingLayer`.
        plain_step: this pass, if a layer has found that it is a plain step.
    """

    def __init__(self) -> None:
        self.snapshots: dict[RestorableLayer, Snapshot] = {}
        self.index, self.is_last = -1, False
        self.interrupted_at: int | None = None
        self.recording: Recording | None = None
        self.recorded_before: Recording | None = None
        self.plain_step: PlainStep | None = None
        self.rotations: dict[Any, Any] = {}

    def begin_layer(self, index: int, layer: RestorableLayer, is_last: bool) -> None:
        """Remember a layer that is about to be given new tokens.

        Raises:
            LowkeyError: if the cache was asked for its length in the middle of this pass.
        """
        # a layer comes twice only when a new pass starts and the one before it never ended
        if layer in self.snapshots:
            self.undo()
        if self.interrupted_at is not None and index == self.interrupted_at + 1:
            raise LowkeyError(
                "cache: was asked for its length within a forward pass, which ends that pass; ask before it "
                "or after it"
            )
        if not self.snapshots:
            self.recorded_before = self.recording
            self.recording = self.recording and self.recording.next_pass()
        self.snapshots[layer] = layer.snapshot()
        if self.recording is not None:
            self.recording.before.setdefault(layer, self.snapshots[layer])
        self.index, self.is_last, self.interrupted_at = index, is_last, None

    def end_layer(self) -> None:
        """Note that the layer that was entered last is done; behind the cache's last layer, forget all."""
        if self.is_last:
            self.snapshots.clear()
            self.recorded_before = self.plain_step = None

    def record(self, layer: RestorableLayer, keys: Tensor, values: Tensor, call: Call | None) -> None:
        """Remember what a layer was given, if passes are recorded.

        Args:
            layer: the layer.
            keys: (b, h, t, d), rotated.
            values: (b, h, t, d).
            call: the attention call; None for layers that only store.
        """
        if self.recording is not None and layer in self.snapshots:
            self.recording.passes[-1][layer] = GivenTokens(keys, values, call)

    def settle(self) -> None:
        """Undo a pass that has not ended, and forget the passes that were recorded."""
        self.undo()
        self.recording = self.recording and self.recording.emptied()

    def undo(self) -> None:
        """Give every layer that was entered its state from before the pass."""
        if not self.snapshots:
            return
        for layer, snapshot in self.snapshots.items():
            layer.restore(snapshot)
        self.snapshots.clear()
        self.recording, self.recorded_before, self.plain_step = self.recorded_before, None, None

    def snapshots_of(self, layer: RestorableLayer) -> list[Snapshot]:
        """All snapshots of a layer that may still be wanted."""
        kept = [self.snapshots]
        kept += [r.before for r in (self.recording, self.recorded_before) if r is not None]
        found = [snapshots[layer] for snapshots in kept if layer in snapshots]
        return list({id(snapshot): snapshot for snapshot in found}.values())

    def nbytes(self, layers: Iterable[RestorableLayer]) -> int:
        """Bytes that are held only so that passes can be undone or taken back.

        Args:
            layers: of the cache.
        """
        own = [t for layer in layers for t in layer.held_tensors()]
        extra = [t for snapshot in self.snapshots.values() for t in snapshot.tensors()]
        # a plain step is there in a pass under way, or one that was interrupted
        for holder in (self.recording, self.recorded_before, self.plain_step):
            extra += holder.tensors() if holder is not None else ()
        return storage_bytes([*own, *extra]) - storage_bytes(own)


class RestorableLayer(CacheLayerMixin):
    """A cache layer whose part in an unfinished forward pass can be undone."""

    forward_pass: ForwardPass | None = None  # of the cache that the layer belongs to

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All tensors that the layer holds, by attribute name."""

    def held_tensors(self) -> list[Tensor]:
        """All tensors that the layer keeps alive, also those that are held for it elsewhere."""
        return list(self.tensors().values())

    def growing_dims(self) -> dict[str, int]:
        """The tensors that new tokens only make longer: attribute name -> the dimension that grows."""
        return {}

    def snapshot(self) -> Snapshot:
        """The state of the layer, to be given to `restore`."""
        before, lengths = object.__new__(type(self)), {}  # much faster than copy.copy
        vars(before).update(vars(self))
        for name, dim in self.growing_dims().items():
            lengths[name] = (dim, getattr(self, name).shape[dim])
            setattr(before, name, None)
        return Snapshot(before, lengths)

    def restore(self, before: Snapshot) -> None:
        """Go back to the state that `snapshot` returned."""
        now, then = vars(self), dict(vars(before.layer))
        for name, (dim, length) in before.lengths.items():
            tensor = now[name]
            # a clone, since a view would keep the longer tensor alive
            then[name] = tensor if tensor.shape[dim] == length else tensor.narrow(dim, 0, length).clone()
        now.clear()
        now.update(then)

    def make_compact(self) -> None:
        """Give up memory that is held only so that steps are faster. Here: there is none."""

    def undo_unfinished(self) -> None:
        """Undo a forward pass that this layer has entered and that has not ended.

        Called when the layer is asked for its length or changed from outside. Whether the pass was
        interrupted or is still running cannot be told here; `ForwardPass.interrupted_at` handles the latter.
        """
        running = self.forward_pass
        if running is not None and self in running.snapshots:
            running.undo()
            running.interrupted_at = running.index

    def check_fits(self, keys: Tensor, rows: int, dtype: torch.dtype) -> None:
        """Check that new tokens can join the tokens that are held.

        Args:
            keys: the new keys (b, h, t, d).
            rows: the batch size of the cache.
            dtype: the dtype of the keys that came first.

        Raises:
            LowkeyError: for another batch size or dtype.
        """
        if len(keys) != rows:
            one = f"cache.expand({len(keys)})" if rows == 1 else "cache.batch_select_indices"
            raise LowkeyError(
                f"cache: holds {rows} row{'s' * (rows != 1)} and is given {len(keys)}; call {one} first, or "
                "use a fresh cache"
            )
        if keys.dtype != dtype:
            raise LowkeyError(
                f"cache: was filled in {dtype} and is given {keys.dtype}; use the model in that dtype, or a "
                "fresh cache"
            )
