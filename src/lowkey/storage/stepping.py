"""Steps of decoding that never look at the value of a tensor.

A *plain step* brings one token to every sequence of a batch without padding. What each query sees is then
known from counts. A layer makes *room* for a few such steps at once: it encodes and packs the tokens that
will leave its window within them, and gives the window free slots behind its newest token. Each step writes
its token into the next slot and attends. Nothing that is in use is overwritten, so a failed step can be
undone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowkey.backends.numba_cpu import STRIDE, Segments
from lowkey.backends.ragged import prepared_segments, prepares
from lowkey.backends.segment import Part, merge_parts
from lowkey.backends.stored import StepSegment
from lowkey.models.attention_interface import Call
from lowkey.models.families import Rope
from lowkey.storage.codec import Codec
from lowkey.storage.positioned import PositionedLayer
from lowkey.storage.rebuilding import Rotation, rotation_below
from lowkey.storage.rollback import Snapshot

ROOM = 16  # steps at most; free slots take memory, and every new room moves what is held
NOT_LOOKED_AT = -(2**62)  # no offset
ROTATED_AT_ONCE = 1024  # positions for which the tables of a rotary embedding are made larger


@dataclass(frozen=True)
class Room:
    """What a layer held when it made room for plain steps.

    Args:
        start: tokens that had been seen.
        steps: for which there is room.
        window: tokens that were held exactly.
        stored: dense tokens that were stored.
        ahead: tokens that were stored ahead of their time, behind those.
    """

    start: int
    steps: int
    window: int
    stored: int
    ahead: int


@dataclass(frozen=True)
class PreparedStep:
    """What the steps of a room have in common.

    Args:
        kernel: ready for them; None if none reads what is held.
        has_stored: whether there are dense stored tokens.
        meets_latents: whether queries are brought into the basis of latents.
    """

    kernel: Segments | None
    has_stored: bool = False
    meets_latents: bool = False


class SteppingLayer(PositionedLayer):
    """A layer that can take plain steps; see the module's docstring.

    Attributes:
        recent_k, recent_v: (b, h, n, d), the window. With a room, free slots follow.
        room: None while all tensors are as long as what they hold.
        steps: plain steps since the room was made.
        room_size: steps of the last room. It doubles up to ROOM, so that free slots are never more than the
            steps that were taken. 1 behind a step that made no room, 0 behind any other call.
        prepared: what the steps of the room have in common; None until it is needed.
        common_offset: the offset of all sequences, if none has padding; None if one has, or if offsets
            differ; NOT_LOOKED_AT while nobody has looked.
    """

    codec: Codec
    is_lossless: bool
    recent_k: Tensor
    recent_v: Tensor
    room: Room | None = None
    steps = room_size = 0
    prepared: PreparedStep | None = None
    common_offset: int | None = NOT_LOOKED_AT

    # -- what a subclass says of itself

    @abstractmethod
    def _takes_plain_steps(self) -> bool:
        """Whether the layer's form and state allow plain steps at all."""

    @abstractmethod
    def _ready_when_seen(self, seen: int) -> int:
        """How many dense slots are ready to be stored when `seen` tokens were seen, without padding."""

    @abstractmethod
    def _hides_sinks(self, stored: int) -> bool:
        """Whether no sink is in the window, given how many slots are stored."""

    @abstractmethod
    def _store_ahead(self, count: int, ahead: int) -> None:
        """Store the tokens of `ahead` more slots behind the first `count`, from the window."""

    @abstractmethod
    def _keep_stored(self, count: int, held: int) -> None:
        """Of `held` dense stored tokens, keep the first `count`."""

    @abstractmethod
    def _parts_of_step(self, call: Call, stored: int, window: tuple[int, int]) -> list[Part]:
        """Attention of one query over all that is held.

        Args:
            call: the step.
            stored: how many dense stored tokens it sees.
            window: (first slot of the window, slot behind the last).
        """

    @abstractmethod
    def _segments_of_step(self, softcap: float | None, rotation: Rotation | None) -> list[StepSegment] | None:
        """The tokens that the steps of this room attend to.

        The window comes last, with rows for all KV heads, and the dense stored tokens before it, if there
        are any. None if queries cannot meet all tokens where they lie.

        Args:
            softcap: of the step's scores, or None.
            rotation: what rotates stored keys as they are read; None if they are met as they are stored.
        """

    # -- steps

    def plain_step(self, keys: Tensor, values: Tensor, call: Call) -> Tensor | None:
        """Take in one token of each sequence and answer the call, if it is a plain step.

        Args:
            keys: (b, h, 1, d), heads in the codec's order.
            values: the same.
            call: the attention call, heads in the codec's order.

        Returns:
            The output (b, h, g, 1, d); None, with nothing changed, if this is no plain step.
        """
        room = self._take_plain_step(keys, values, call)
        if room is None:
            return None
        slot = room.window + self.steps - 1
        stored = self._visible()
        window = stored - room.stored, slot + 1
        out = self._step_by_kernel(call, room, stored, window)
        if out is None:
            parts = self._parts_of_step(call, stored, window)
            out = parts[0][0] if len(parts) == 1 else merge_parts(parts)[0]
        return out.to(values.dtype)

    def _take_plain_step(self, keys: Tensor, values: Tensor, call: Call) -> Room | None:
        """Take in what `plain_step` is given. Returns: the room; None if this is no plain step."""
        if not self._is_plain(keys, call):
            return None
        if not self.room_size:
            self.room_size = 1  # this step may be the only one: a question of one token
            return None
        if self.room is None or self.steps == self.room.steps:
            self._make_room()
        if (room := self.room) is None:
            return None
        slot = room.window + self.steps
        self.recent_k[:, :, slot : slot + 1] = keys
        self.recent_v[:, :, slot : slot + 1] = values
        self.steps += 1
        return room

    def _step_by_kernel(self, call: Call, room: Room, stored: int, window: tuple[int, int]) -> Tensor | None:
        """As `_parts_of_step` and merged, by one call of a kernel; None if none reads what is held."""
        prepared = self.prepared = self.prepared or self._prepared_step(call, room)
        kernel = prepared.kernel
        if kernel is None:
            return None
        if prepared.has_stored:
            kernel.places[-2, 4] = stored
        kernel.places[-1, 1] = kernel.places[-1, 3] = window[0]
        kernel.places[-1, 4] = window[1] - window[0]
        b, h, g, _, d = call.query.shape
        query, latent, shift = call.query.reshape(b * h, g, d), None, None
        if prepared.meets_latents:
            at = call.positions
            at = self.positions_of(self.seen - 1, self.seen) if at is None else at.expand(b, 1)
            latent, shift = self.codec.project_query(call.query, at)
            shift = None if shift is None else shift.reshape(b * h, g)
            latent = latent.reshape(b * h, g, -1)
        sums, out, share, _ = kernel.attend((latent, query), call.scaling, call.softcap, bias=shift)
        # arrays and not tensors, which would have to be made for what is not needed, too
        result = torch.from_numpy(out.reshape(b, h, g, 1, d))
        if not kernel.widths[0]:
            return result
        return self.codec.expand_output(torch.from_numpy(sums.reshape(b, h, g, 1, -1)), share) + result

    def _prepared_step(self, call: Call, room: Room) -> PreparedStep:
        """Prepare for the steps of a room."""
        # asked first: what follows looks into the memory of tensors
        if not prepares(self.device):
            return PreparedStep(None)
        rotation = None
        if (rope := self.codec.rotates_when_read) is not None:
            stop = room.start + room.steps - (self.common_offset or 0)
            rotation = self._rotation(rope, call.query, stop)
        segments = self._segments_of_step(call.softcap, rotation)
        if segments is None:
            return PreparedStep(None)
        kernel = prepared_segments(call.query.shape[2], segments)
        meets_latents = any(s.as_latents and s.rebuilding is None for s in segments)
        return PreparedStep(kernel, bool(room.stored + room.ahead), meets_latents)

    def _rotation(self, rope: Rope, like: Tensor, stop: int) -> Rotation:
        """The rotary embedding of positions below `stop`, which layers of a cache share."""
        if self.forward_pass is None:
            return rotation_below(rope, like, stop)
        known, key = self.forward_pass.rotations, (rope.layer_type, like.dtype)
        if key not in known or len(known[key][0]) * STRIDE < stop:
            known[key] = rotation_below(rope, like, stop + -stop % ROTATED_AT_ONCE)
        return known[key]

    def _is_plain(self, keys: Tensor, call: Call) -> bool:
        if keys.shape[2] != 1:
            self.room_size = 0
            return False
        if call.mask is not None or self.seen < 2 or not self._takes_plain_steps():
            return False
        if torch.is_grad_enabled() and any(x.requires_grad for x in (keys, call.query, self.recent_k)):
            return False
        if self.common_offset == NOT_LOOKED_AT:
            offset = int(self.offset[0, 0])
            alike = not bool((self.first_index != 0).any()) and bool((self.offset == offset).all())
            self.common_offset = offset if alike else None
        if self.common_offset is None:
            return False
        return self._is_at(call.positions, self.seen - 1 - self.common_offset)

    def _is_at(self, positions: Tensor | None, expected: int) -> bool:
        """Whether the new tokens (b|1, 1) are at this position; None for positions that count all tokens."""
        if positions is None:
            return self.common_offset == 0
        if positions.device.type == "cpu":  # no tensor operation is needed to look into our own memory
            return bool((positions.detach().numpy() == expected).all())
        # all layers of a forward pass are given the same tensor, so the device is asked once
        running = self.forward_pass
        if running is None or running.positions is not positions:
            if not bool((positions == expected).all()):
                return False
            if running is not None:
                running.positions = positions
        return True

    def _visible(self) -> int:
        """How many dense tokens the newest query sees as they are stored, with a room."""
        room = self.room
        assert room is not None
        return self._ready_when_seen(room.start + self.steps) if room.ahead else room.stored

    def _make_room(self) -> None:
        """Make room for plain steps, of which the first is under way, if there can be any."""
        before, size = self.seen - 1, min(ROOM, 2 * self.room_size)
        self.make_compact()
        window, stored = self.recent_k.shape[2], self._ready_when_seen(before)
        ahead = [self._ready_when_seen(before + n) - stored for n in range(1, size + 1)]
        # only tokens that are in the window already can be stored ahead of their time
        steps = size if self.is_lossless else sum(n <= window for n in ahead)
        if not steps or not self._hides_sinks(stored):
            return
        more = 0 if self.is_lossless else ahead[steps - 1]
        if more:
            self._store_ahead(stored, more)
        for name in ("recent_k", "recent_v"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], window + steps, old.shape[3])
            new[:, :, :window] = old
            setattr(self, name, new)
        self.room_size = size
        self.room, self.steps = Room(before, steps, window, stored, more), 0
        self.prepared = None

    def make_compact(self) -> None:
        """Give up the room: no tensor is longer than what it holds."""
        room = self.room
        if room is None:
            return
        stored, seen = self._visible(), self.seen
        stop = room.window + self.steps
        if stored < room.stored + room.ahead:
            self._remember_whole()
            self._keep_stored(stored, room.stored + room.ahead)
        # not a view, which would keep the free slots alive
        window = [x[:, :, stored - room.stored : stop].clone() for x in (self.recent_k, self.recent_v)]
        self.room, self.prepared, taken = None, None, self.steps
        self.steps = self.room_size = 0
        self.seen = room.start + taken
        try:
            self._note_steps(taken)
            if self.is_lossless:
                self._store(*window)
            else:
                self.recent_k, self.recent_v = window
        finally:
            self.seen = seen

    @abstractmethod
    def _note_steps(self, taken: int) -> None:
        """Note that so many plain steps were taken; `seen` counts them already."""

    @abstractmethod
    def _store(self, buffer_k: Tensor, buffer_v: Tensor) -> None:
        """Store what leaves the window, and hold the rest."""

    def map_tensors(self, f: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor that is held by `f` of it."""
        self.prepared = None  # it has the addresses of those that go
        super().map_tensors(f)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.room, self.prepared, self.common_offset = None, None, NOT_LOOKED_AT
        self.steps = self.room_size = 0

    # -- undoing

    def snapshot(self) -> Snapshot:
        """The state of the layer; see `RestorableLayer.snapshot`."""
        before = super().snapshot()
        vars(before.layer)["prepared"] = None  # it would keep tensors alive that the snapshot leaves out
        return before

    def _remember_whole(self) -> None:
        """Let snapshots keep the stored tensors that they left out, which are about to become shorter."""
        for snapshot in self.forward_pass.snapshots_of(self) if self.forward_pass is not None else ():
            for name, (dim, length) in snapshot.lengths.items():
                tensor = getattr(self, name)
                whole = tensor if tensor.shape[dim] == length else tensor.narrow(dim, 0, length).clone()
                setattr(snapshot.layer, name, whole)
            snapshot.lengths.clear()
