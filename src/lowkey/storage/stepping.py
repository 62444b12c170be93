"""Steps of decoding that never look at the value of a tensor.

A *plain step* brings one token to every sequence of a batch, and each query sees all of its sequence but the
padding before its first token. What it sees is then known from counts (`step_counts`). A layer makes *room*
for a few such steps at once: it looks where sequences begin, encodes and packs the tokens that will leave its
window within the steps, and gives the window free slots behind its newest token. Each step writes its token
into the next slot and attends. Nothing that is in use is overwritten, so a failed step can be undone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowkey.backends.ragged import PreparedSegments, prepared_segments, prepares
from lowkey.backends.segment import Part, merge_parts
from lowkey.backends.stored import STRIDE, StepSegment
from lowkey.models.attention_interface import Call
from lowkey.models.families import Rope
from lowkey.storage.codec import Codec
from lowkey.storage.positioned import PositionedLayer
from lowkey.storage.rebuilding import Rotation, rotation_below
from lowkey.storage.rollback import Snapshot, storage_bytes
from lowkey.storage.step_counts import NEVER, PlainStep, Sequences, View, aligned, are_at, shows_all_from

ROOM = 16  # steps at most; free slots take memory, and every new room moves what is held
ROTATED_AT_ONCE = 1024  # positions for which the tables of a rotary embedding are made larger


@dataclass(frozen=True)
class Room:
    """What a layer held when it made room for plain steps.

    Args:
        start: tokens that had been seen.
        steps: for which there is room.
        window: tokens that were held exactly.
        stored: dense tokens that were stored.
        ahead: slots behind those, of tokens that were stored ahead of their time, or free.
        sequences: where the tokens of each sequence lie.
    """

    start: int
    steps: int
    window: int
    stored: int
    ahead: int
    sequences: Sequences


@dataclass(frozen=True)
class PreparedStep:
    """What the steps of a room have in common.

    Args:
        kernel: ready for them; None if none reads what is held.
        bases: whether keys are met in the basis of latents, and whether in that of the model.
        plan_maps: those of queries into latents and of latents into outputs; None where nothing is a latent.
        columns: (b, h, g, n), which columns of a query in the model's basis the kernel is given; None for all
            of them, once.
    """

    kernel: PreparedSegments | None
    bases: tuple[bool, bool] = (False, True)
    plan_maps: tuple[Tensor, Tensor] | None = None
    columns: Tensor | None = None


class SteppingLayer(PositionedLayer):
    """A layer that can take plain steps; see the module's docstring.

    Attributes:
        recent_k, recent_v: (b, h, n, d), the window. With a room, free slots follow.
        encodes_at_once: whether there is no window: queries see their own token as it is stored.
        room: None while all tensors are as long as what they hold.
        steps: plain steps since the room was made.
        room_size: steps of the last room. It doubles up to ROOM, so that free slots are never more than the
            steps that were taken. 1 behind a step that made no room, 0 behind any other call.
        prepared: what the steps of the room have in common; None until it is needed.
        turns: what turns the keys of the steps back, with a step for each token; None until it is needed, and
            empty where nothing does.
    """

    codec: Codec
    is_lossless: bool
    encodes_at_once: bool
    recent_k: Tensor
    recent_v: Tensor
    room: Room | None = None
    steps = room_size = 0
    prepared: PreparedStep | None = None
    turns: tuple[Tensor, ...] | None = None

    # -- what a subclass says of itself

    @abstractmethod
    def _takes_plain_steps(self) -> bool:
        """Whether the layer's form and state allow plain steps at all."""

    def _most_steps(self) -> int:
        """For how many steps a room may be made now."""
        return ROOM

    @abstractmethod
    def _looked_at(self) -> Sequences | None:
        """Where the tokens of each sequence lie; None if a step of theirs cannot be plain."""

    @abstractmethod
    def _ready(self, sequences: Sequences, seen: int) -> np.ndarray:
        """(b): how many slots of each sequence are ready to be stored when `seen` tokens were seen."""

    @abstractmethod
    def _store_ahead(self, count: int, ahead: int) -> None:
        """Store the tokens of `ahead` more slots behind the first `count`, from the window."""

    @abstractmethod
    def _reserve(self, count: int) -> None:
        """Make room for so many more dense tokens behind those that are stored."""

    @abstractmethod
    def _store_at(self, slot: int, keys: Tensor, values: Tensor, at: Tensor) -> None:
        """Store a token (b, h, 1, d) of each sequence, at these positions (b|1, 1), in a reserved slot."""

    @abstractmethod
    def _keep_stored(self, count: int, held: int) -> None:
        """Of `held` dense stored tokens, keep the first `count`."""

    @abstractmethod
    def _parts_of_step(self, call: Call, room: Room, view: View) -> list[Part]:
        """Attention of one query of each sequence over all that it sees."""

    @abstractmethod
    def _segments_of_step(
        self, room: Room, softcap: float | None, rotation: Rotation | None
    ) -> list[StepSegment] | None:
        """The tokens that the steps of this room attend to.

        The window comes last, with rows for all KV heads, unless `encodes_at_once`; before it the runs of
        dense stored tokens, if there are any, and before these the sinks, if there are any. None if queries
        cannot meet all tokens where they lie.

        Args:
            room: of the steps.
            softcap: of the step's scores, or None.
            rotation: what rotates stored keys as they are read; None if they are met as they are stored.
        """

    # -- bytes

    def nbytes(self) -> int:
        """The bytes of the storages that are really held."""
        return storage_bytes([*self.tensors().values(), *self._prepared_tensors()])

    def prepared_bytes(self) -> int:
        """The bytes that are held for steps besides those of tokens."""
        if not (prepared := self._prepared_tensors()):
            return 0
        own = self.tensors().values()
        return storage_bytes([*own, *prepared]) - storage_bytes(own)

    def _prepared_tensors(self) -> list[Tensor]:
        """The tensors that are held for steps besides those that hold tokens."""
        held = list(self.turns or ())
        if self.prepared is not None and self.prepared.kernel is not None:
            held += self.prepared.kernel.tensors()
            held += [] if self.prepared.columns is None else [self.prepared.columns]
        return held

    def _forget_prepared(self) -> None:
        """Let go of what has the addresses of tensors that go, or belongs to other steps."""
        self.prepared = self.turns = None

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
        out = self._step_by_kernel(call, room)
        if out is None:
            parts = self._parts_of_step(call, room, self._view(room, self.steps))
            out = parts[0][0] if len(parts) == 1 else merge_parts(parts)[0]
        return out.to(values.dtype)

    def _take_plain_step(self, keys: Tensor, values: Tensor, call: Call) -> Room | None:
        """Take in what `plain_step` is given. Returns: the room; None if this is no plain step."""
        sequences = self._sequences_of_step(keys, call)
        if sequences is None:
            return None
        if not self.room_size:
            self.room_size = 1  # this step may be the only one: a question of one token
            return None
        if self.room is None or self.steps == self.room.steps:
            self._make_room(sequences)
        if (room := self.room) is None:
            return None
        if self.encodes_at_once:
            self._store_at(room.stored + self.steps, keys, values, self._positions_of_step(call))
        else:
            slot = room.window + self.steps
            self.recent_k[:, :, slot : slot + 1] = keys
            self.recent_v[:, :, slot : slot + 1] = values
        self.steps += 1
        return room

    def _step_by_kernel(self, call: Call, room: Room) -> Tensor | None:
        """As `_parts_of_step` and merged, by one call of a kernel; None if none reads what is held."""
        prepared = self.prepared = self.prepared or self._prepared_step(call, room)
        kernel = prepared.kernel
        if kernel is None:
            return None
        kernel.move(self.steps - 1)
        query, latent, shift = call.query.squeeze(3), None, None
        into, out_of = prepared.plan_maps or (None, None)
        if prepared.bases[0]:
            latent, shift = self.codec.project_query(query, self._positions_of_step(call), into)
        if prepared.columns is not None:
            query = query.gather(3, prepared.columns)
        sums, out, _, _ = kernel.attend(
            (latent, query if prepared.bases[1] else None),
            call.scaling,
            call.softcap,
            bias=shift,
            sums_only=True,
            share_beside=out_of is not None and out_of.shape[1] > kernel.widths[0],
        )
        if sums is not None and kernel.widths[0]:
            expanded = self.codec.expand_output(sums, out_of)
            # in this order, the sum lies in memory as outputs do, and need not be copied
            out = expanded if out is None or not kernel.widths[1] else out + expanded
        assert out is not None  # there is a segment in one basis
        return out.unsqueeze(3)

    def _positions_of_step(self, call: Call) -> Tensor:
        """The positions (b|1, 1) of a step's tokens."""
        return self.positions_of(self.seen - 1, self.seen) if call.positions is None else call.positions

    def _turn_of_step(self, keys: Tensor) -> tuple[Tensor, ...] | None:
        """What turns the keys (b, h, 1, d) of this step back, if it is known for all steps of the room."""
        if self.turns is None and self.room is not None:
            start = self.room.start
            self.turns = self.codec.turn(self.positions_of(start, start + self.room.steps), keys) or ()
        return tuple(x.narrow(2, self.steps, 1) for x in self.turns or ()) or None

    def _prepared_step(self, call: Call, room: Room) -> PreparedStep:
        """Prepare for the steps of a room."""
        # asked first: what follows looks into the memory of tensors
        if not prepares(self.device):
            return PreparedStep(None)
        rotation = None
        if (rope := self.codec.rotates_when_read) is not None:
            stop = room.start + room.steps - int(room.sequences.offset.min())
            rotation = self._rotation(rope, call.query, stop)
        segments = self._segments_of_step(room, call.softcap, rotation)
        if segments is None:
            return PreparedStep(None)
        counts = self._counts_of_steps(room, len(segments), call.query.shape[1])
        b, h, g, _, _ = call.query.shape
        kernel, columns = prepared_segments(g, segments, counts), self._query_columns()
        if columns is not None:
            columns = columns.view(b, h, 1, -1).expand(-1, -1, g, -1)
        maps = self.codec.step_maps() if any(s.as_latents for s in segments) else None
        in_latents = [s.as_latents and s.rebuilding is None for s in segments]
        return PreparedStep(kernel, (any(in_latents), not all(in_latents)), maps, columns)

    def _query_columns(self) -> Tensor | None:
        """(b h, n), the columns of queries that `_segments_of_step` counts on; None for the query itself."""
        return None

    def _counts_of_steps(self, room: Room, segments: int, heads: int) -> np.ndarray:
        """What the queries of each step see, of so many segments; see `ragged.prepared_segments`.

        They are those of `_segments_of_step`, with a row for each of the KV heads of a sequence.
        """
        sequences = room.sequences
        counts = np.zeros((room.steps, segments, 2, len(sequences.first)), np.int64)
        starts, stops = sequences.runs() if room.stored + room.ahead else (np.empty((0, 1)),) * 2
        runs, last = len(starts), segments - (not self.encodes_at_once)
        for step, count in enumerate(counts, 1):
            view = self._view(room, step)
            if not self.encodes_at_once:
                count[-1] = view.window, view.stop - view.window
            lengths = np.where(view.dense > starts, np.minimum(view.dense, stops) - aligned(starts), 0)
            count[last - runs : last, 1] = lengths
            if sequences.sinks.shape[1]:
                count[last - runs - 1, 1] = view.sinks
        return counts.repeat(heads, axis=3)

    def _rotation(self, rope: Rope, like: Tensor, stop: int) -> Rotation:
        """The rotary embedding of positions below `stop`, which layers of a cache share."""
        if self.forward_pass is None:
            return rotation_below(rope, like, stop)
        known, key = self.forward_pass.rotations, (rope.layer_type, like.dtype)
        if key not in known or len(known[key][0]) * STRIDE < stop:
            known[key] = rotation_below(rope, like, stop + -stop % ROTATED_AT_ONCE)
        return known[key]

    def _sequences_of_step(self, keys: Tensor, call: Call) -> Sequences | None:
        """Where the tokens of each sequence lie; None if this is no plain step."""
        if keys.shape[2] != 1:
            self.room_size = 0
            return None
        if self.seen < 2 or not self._takes_plain_steps():
            return None
        if torch.is_grad_enabled() and any(x.requires_grad for x in (keys, call.query, self.recent_k)):
            return None
        sequences = self._looked_at() if self.room is None else self.room.sequences
        return sequences if sequences is not None and self._is_plain(sequences, call) else None

    def _is_plain(self, sequences: Sequences, call: Call) -> bool:
        """Whether mask and positions are those of a plain step."""
        mask, positions, running = call.mask, call.positions, self.forward_pass
        known = running.plain_step if running is not None else None
        # all layers of a forward pass are given the same tensors, so one of them looks
        if known is not None and known.covers(mask, positions, sequences):
            return True
        is_plain = shows_all_from(mask, sequences.first, self.seen) and are_at(
            positions, self.seen - 1 - sequences.offset, self.seen
        )
        if is_plain and running is not None and self in running.snapshots:
            running.plain_step = PlainStep(mask, positions, sequences.first, sequences.offset)
        return is_plain

    def _view(self, room: Room, step: int) -> View:
        """What the query of each sequence sees in a step of the room, counted from 1."""
        now, begin, own = room.start + step, room.start - room.window, room.sequences
        # without loss, a token of the window is as good there as stored
        dense = np.full_like(own.first, room.stored) if self.is_lossless else self._ready(own, now)
        left = own.slot + dense
        window = np.maximum(own.first, left) - begin
        return View(dense, window, now - begin, (own.sinks < left[:, None]).sum(1))

    def _make_room(self, sequences: Sequences) -> None:
        """Make room for plain steps, of which the first is under way, if there can be any."""
        before, grown = self.seen - 1, min(ROOM, 2 * self.room_size)
        size = min(grown, self._most_steps())
        if self.room is not None:
            self.make_compact()
            if (sequences.sinks == NEVER).any():  # some may have come
                sequences = self._looked_at() or sequences
        ready = [self._ready(sequences, before + n) for n in range(size + 1)]
        stored, steps, more = int(ready[0].min()), size, 0
        if self.encodes_at_once:
            more = size
            self._reserve(size)
        elif not self.is_lossless:
            # only tokens that are in the window already can be stored ahead of their time
            steps = sum(bool((sequences.slot + slots <= before).all()) for slots in ready[1:])
            more = int(ready[steps].max()) - stored
        if not steps:
            return
        if more and not self.encodes_at_once:
            self._store_ahead(stored, more)
        window = self.recent_k.shape[2]
        for name in () if self.encodes_at_once else ("recent_k", "recent_v"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], window + steps, old.shape[3])
            new[:, :, :window] = old
            setattr(self, name, new)
        self.room_size = grown
        self.room, self.steps = Room(before, steps, window, stored, more, sequences), 0
        self._forget_prepared()

    def make_compact(self) -> None:
        """Give up the room: no tensor is longer than what it holds."""
        room = self.room
        if room is None:
            return
        stored, seen = int(self._view(room, self.steps).dense.min()), self.seen
        stop = room.window + self.steps
        if stored < room.stored + room.ahead:
            self._remember_whole()
            self._keep_stored(stored, room.stored + room.ahead)
        # not a view, which would keep the free slots alive
        window = [x[:, :, stored - room.stored : stop].clone() for x in (self.recent_k, self.recent_v)]
        new_k, new_v = (x[:, :, room.window : stop] for x in (self.recent_k, self.recent_v))
        self.room, taken = None, self.steps
        self._forget_prepared()
        self.steps = self.room_size = 0
        self.seen = room.start + taken
        try:
            if taken:
                self._note_steps(new_k, new_v, bool((room.sequences.sinks == NEVER).any()))
            if self.is_lossless:
                self._store(*window)
            else:
                self.recent_k, self.recent_v = window
        finally:
            self.seen = seen

    @abstractmethod
    def _note_steps(self, keys: Tensor, values: Tensor, may_be_sinks: bool) -> None:
        """Note that plain steps brought these tokens (b, h, n, d); `seen` counts them already."""

    @abstractmethod
    def _store(self, buffer_k: Tensor, buffer_v: Tensor) -> None:
        """Store what leaves the window, and hold the rest."""

    def map_tensors(self, f: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor that is held by `f` of it."""
        self._forget_prepared()
        super().map_tensors(f)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.room = None
        self._forget_prepared()
        self.steps = self.room_size = 0

    # -- undoing

    def snapshot(self) -> Snapshot:
        """The state of the layer; see `RestorableLayer.snapshot`."""
        before = super().snapshot()
        # they would keep tensors alive that the snapshot leaves out
        vars(before.layer).update(prepared=None, turns=None)
        return before

    def _remember_whole(self) -> None:
        """Let snapshots keep the stored tensors that they left out, which are about to become shorter."""
        for snapshot in self.forward_pass.snapshots_of(self) if self.forward_pass is not None else ():
            for name, (dim, length) in snapshot.lengths.items():
                tensor = getattr(self, name)
                whole = tensor if tensor.shape[dim] == length else tensor.narrow(dim, 0, length).clone()
                setattr(snapshot.layer, name, whole)
            snapshot.lengths.clear()
