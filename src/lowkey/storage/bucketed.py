"""A layer in which every token has a rank of its own, chosen by a small gate (after arXiv:2603.04411).

Tokens of one rank lie together in a bucket. Of the paper only the abstract is known: a learnt gate gives each
token a compression rate. The levels of rank, the gate and the storage are our own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu

from lowkey.backends import grouped
from lowkey.backends.segment import Part, Segment, merge_parts
from lowkey.backends.stored import Rebuilding, StepSegment
from lowkey.core.types import Factors, Layout
from lowkey.models.attention_interface import Call
from lowkey.models.families import Rope
from lowkey.ops.ragged import join_rows, row_of, select_rows, starts_of
from lowkey.storage.codec import LowRank
from lowkey.storage.packing import Unpacked
from lowkey.storage.positioned import RaggedLayer
from lowkey.storage.reading import attend_to_stored, positions_in_rows, reads_in_place
from lowkey.storage.rebuilding import Rotation
from lowkey.storage.rows import attend_to_rows, stored_densely, stored_in_rows
from lowkey.storage.step_counts import Sequences, View, copied
from lowkey.storage.stepping import Room, SteppingLayer

WAITING = ("waiting_k", "waiting_v", "waiting_levels")
LARGEST_INPUT = 8.0  # the gate's inputs are cut here: a coordinate of 8 RMS says no more than "large"


@dataclass(frozen=True)
class Gate:
    """Chooses the level of rank of a token from the coordinates of its keys and values, all heads together.

    One hidden layer. Each coordinate is divided by its root mean square first.

    Args:
        scale: (2 h, d), one over the root mean square of each coordinate, keys first.
        hidden: (2 h d, m), weights of the hidden layer.
        hidden_bias: (m).
        out: (m, n), weights of the output layer, for n levels of rank.
        out_bias: (n).
    """

    scale: Tensor
    hidden: Tensor
    hidden_bias: Tensor
    out: Tensor
    out_bias: Tensor

    def __call__(self, keys: Tensor, values: Tensor) -> Tensor:
        """Score the levels for each token, which takes the level with the largest score.

        Args:
            keys: (b, h, t, d), coordinates in the widest basis.
            values: (b, h, t, d), the same.

        Returns:
            Scores (b, t, n) in fp32.
        """
        both = torch.cat([keys, values], 1).float() * self.scale.unsqueeze(1)
        flat = both.clamp(-LARGEST_INPUT, LARGEST_INPUT).transpose(1, 2).flatten(2).flatten(0, 1)
        inside = gelu(torch.addmm(self.hidden_bias, flat, self.hidden))
        return torch.addmm(self.out_bias, inside, self.out).unflatten(0, (len(keys), -1))

    def to(self, device: torch.device) -> Gate:
        """The same gate on another device."""
        return Gate(**{name: t.to(device) for name, t in vars(self).items()})


@dataclass(frozen=True)
class Bucket:
    """The tokens of one level: sequence after sequence, and in each sequence head after head.

    All heads of a layer give a token the same level, so a bucket holds n tokens over all sequences and h n
    keys.

    Args:
        keys: (h n, r).
        values: (h n, r).
        starts: (b + 1), where each sequence's tokens begin among the n.
        positions: (n), the tokens' positions, if the layout needs them to rotate keys again; else (0).
    """

    keys: Tensor
    values: Tensor
    starts: Tensor
    positions: Tensor

    def joined(self, more: Bucket, heads: int) -> Bucket:
        """This bucket with the tokens of `more` behind those of each sequence."""
        rows, new = self.rows(heads), more.rows(heads)
        keys = join_rows(self.keys, rows, more.keys, new)
        values = join_rows(self.values, rows, more.values, new)
        positions = self.positions
        if len(self.positions) + len(more.positions):
            positions = join_rows(self.positions, self.starts, more.positions, more.starts)
        return Bucket(keys, values, self.starts + more.starts, positions)

    def selected(self, sequences: Tensor, rows: Tensor, heads: int) -> Bucket:
        """Some of the sequences.

        Args:
            sequences: their numbers.
            rows: the numbers of their rows among the b h rows.
            heads: KV heads of the layer.
        """
        keys, values = (select_rows(x, self.rows(heads), rows)[0] for x in (self.keys, self.values))
        positions = self.positions
        if len(positions):
            positions = select_rows(positions, self.starts, sequences)[0]
        return Bucket(keys, values, starts_of(self.starts.diff()[sequences]), positions)

    def rows(self, heads: int) -> Tensor:
        """(b h + 1): where the row of each head of each sequence begins in `keys`."""
        return starts_of(self.starts.diff().repeat_interleave(heads))

    def key_positions(self, heads: int) -> Tensor:
        """(h n): the position of every key; (0) where positions are not held."""
        if not len(self.positions):
            return self.positions
        rows = self.rows(heads)
        row = row_of(rows)
        place_in_row = torch.arange(len(row), device=row.device) - rows[row]
        return self.positions[self.starts[row // heads] + place_in_row]


def truncate_factors(factors: Factors, rank: int) -> Factors:
    """Keep the first `rank` coordinates of keys and of values."""
    f = factors
    return Factors(f.k_down[..., :rank], f.k_up[..., :rank, :], f.v_down[..., :rank], f.v_up[..., :rank, :])


class BucketedLayer(RaggedLayer, SteppingLayer):
    """Stores each token at the rank that the gate gives it.

    A query meets the tokens of its own chunk densely, as they will be stored or, under exact prefill, as they
    are. It meets older tokens bucket by bucket. The parts are merged by log-sum-exp. Padding is not stored.

    Only a look at values tells to which bucket a token goes. In plain steps tokens therefore *wait*: they are
    held at full width, with zeros for the coordinates that they will lose, until the room is given up.

    Args:
        codecs: the same maps cut at each level of rank, the widest first.
        gate: which level a token takes.
        exact_prefill: what a chunk sees of itself, as in `StoringLayer`.

    Attributes:
        buckets: one for each level.
        counts: tokens held at each level, over the batch.
        waiting_k, waiting_v: (b, h, n, d), coordinates of tokens that wait, free slots included; None without
            a room.
        waiting_levels: (b, n), their levels.
        plan_maps: (levels, d) of keys and of values, 1 for coordinates that a token of a level keeps, else 0.
    """

    is_lossless, encodes_at_once = False, True
    waiting_k: Tensor | None = None
    waiting_v: Tensor | None = None
    waiting_levels: Tensor | None = None

    def __init__(self, codecs: Sequence[LowRank], gate: Gate, exact_prefill: bool = False) -> None:
        super().__init__(exact_prefill)
        self.codecs, self.gate = list(codecs), gate
        self.buckets: list[Bucket] = []
        self.counts = [0] * len(self.codecs)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty buckets for this batch size, device and dtype."""
        b, self.heads = key_states.shape[:2]
        self.device, self.itemsize = key_states.device, key_states.element_size()
        self.codecs, self.gate = [c.to_match(key_states) for c in self.codecs], self.gate.to(self.device)
        self.codec = self.codecs[0]
        self.recent_k, self.recent_v = (
            x.new_empty(b, self.heads, 0, x.shape[3]) for x in (key_states, value_states)
        )
        self.plan_maps = tuple(
            torch.stack([torch.arange(max(ranks), device=self.device) < r for r in ranks]).to(
                key_states.dtype
            )
            for ranks in zip(*(c.factors.ranks for c in self.codecs), strict=True)
        )
        self.reset_rows(b)
        for codec in self.codecs:
            keys, values = codec.encode(key_states[:, :, :0], value_states[:, :, :0], self.positions_of(0, 0))
            empty = Bucket(
                keys.new_empty(0, keys.shape[-1]),
                values.new_empty(0, values.shape[-1]),
                starts=torch.zeros(b + 1, dtype=torch.long, device=self.device),
                positions=torch.zeros(0, dtype=torch.int32, device=self.device),
            )
            self.buckets = [*self.buckets, empty]
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        """The buckets' tensors, named by level, and where the sequences begin."""
        # flat names, since files and snapshots know no nested tensors
        held = {f"{name}_{i}": t for i, bucket in enumerate(self.buckets) for name, t in vars(bucket).items()}
        if not self.is_initialized:
            return {}
        return held | self._waiting() | {"offset": self.offset, "first_index": self.first_index}

    def _waiting(self) -> dict[str, Tensor]:
        """What is held of tokens that wait, by attribute name."""
        named = {name: getattr(self, name) for name in WAITING}
        return {name: t for name, t in named.items() if t is not None}

    def predicted_nbytes(self) -> int:
        """The bytes of all tokens at their levels, positions and row starts."""
        if not self.is_initialized:
            return 0
        batch, position_bytes = len(self.offset), 4 * self._needs_positions
        widths = [sum(codec.factors.ranks) for codec in self.codecs]
        kept = sum(
            n * (self.heads * width * self.itemsize + position_bytes)
            for n, width in zip(self.counts, widths, strict=True)
        )
        # 64-bit integers
        starts, offset_and_first = 8 * len(self.codecs) * (batch + 1), 8 * 2 * batch
        slots = batch * (0 if self.room is None else self.room.ahead)
        waiting = slots * (self.heads * widths[0] * self.itemsize + 1)
        return kept + starts + offset_and_first + waiting + self.prepared_bytes()

    @property
    def _needs_positions(self) -> bool:
        return self.codecs[0].layout == "pre_rope"

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Answer the call over older tokens and this chunk, then store the chunk."""
        if (step := self.plain_step(keys, values, call)) is not None:
            return step
        self.make_compact()
        t = keys.shape[2]
        real = self.locate_tokens(call, t)
        positions = self.positions_of(self.seen - t, self.seen)
        stored = self.codecs[0].encode(keys, values, positions)
        levels = self.gate(*stored).argmax(-1).masked_fill(~real, -1)  # no level for padding
        # what queries of this chunk see of it: as it came, or as it will be read later
        chunk, exact = (keys, values), self.exact_rows(real)[:, None, None, None]
        if not bool(exact.all()):
            k, v = self._as_read_later(*stored, levels, positions)
            chunk = torch.where(exact, keys, k), torch.where(exact, values, v)
        # older tokens are attended to before the chunk is stored among them
        out = merge_parts([*self._stored_parts(call), self._chunk_part(*chunk, call)])[0]
        self._put(*stored, levels, positions)
        return out.to(values.dtype)

    # -- reading

    def _stored_parts(self, call: Call) -> Iterator[Part]:
        """Attention over what was stored before this call: for each bucket (b, h, g, t, d) and its lse."""
        t = call.query.shape[3]
        at = self.positions_of(self.seen - t, self.seen)
        for codec, bucket, count in zip(self.codecs, self.buckets, self.counts, strict=True):
            if count:
                keys, values = bucket.keys.unsqueeze(1), bucket.values.unsqueeze(1)
                positions, starts = bucket.key_positions(self.heads), bucket.rows(self.heads)
                scale, cap = call.scaling, call.softcap
                if reads_in_place(call.query, (keys, values)):
                    k, v = (stored_in_rows(Unpacked(), (x,), x.shape[2], starts) for x in (keys, values))
                    of_rows = positions_in_rows(positions, starts, len(self.offset), 1)
                    yield attend_to_stored(codec, call.query, at, k, v, starts.diff(), of_rows, scale, cap)
                else:
                    yield attend_to_rows(codec, call.query, at, keys, values, positions, starts, scale, cap)

    def _chunk_part(self, keys: Tensor, values: Tensor, call: Call) -> Part:
        """Attention of a chunk's queries over the chunk itself."""
        mask = call.full_mask(self.seen)
        mask = None if mask is None else mask[..., self.seen - keys.shape[2] :]
        return grouped.partial([Segment(call.query, keys, values, mask)], call.scaling, call.softcap)

    def _as_read_later(
        self, keys: Tensor, values: Tensor, levels: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (b, h, t, d) of a chunk, rebuilt from the coordinates that each token will keep."""
        keys, values = self._truncated(keys, values, levels)
        return self.codec.rebuilt_keys(keys, positions), self.codec.expand_values(values)

    def _truncated(self, keys: Tensor, values: Tensor, levels: Tensor) -> list[Tensor]:
        """Coordinates (b, h, t, d) with zeros for those that tokens of these levels (b, t) do not keep."""
        return [x * kept[levels].unsqueeze(1) for x, kept in zip((keys, values), self.plan_maps, strict=True)]

    # -- storing

    def _put(self, keys: Tensor, values: Tensor, levels: Tensor, positions: Tensor) -> None:
        """Put each token into the bucket of its level.

        Args:
            keys: (b, h, t, d), coordinates in the widest basis, of which a level keeps the first.
            values: (b, h, t, d), the same.
            levels: (b, t), -1 for padding.
            positions: (b, t).
        """
        # new lists, since a snapshot of the layer holds the old ones
        buckets, counts = list(self.buckets), list(self.counts)
        for i, codec in enumerate(self.codecs):
            chosen = levels == i
            count = int(chosen.sum())
            if count:
                rows = chosen.unsqueeze(1).expand(-1, self.heads, -1)
                k, v = (x[..., :r][rows] for x, r in zip((keys, values), codec.factors.ranks, strict=True))
                own = positions[chosen].int() if self._needs_positions else buckets[i].positions
                buckets[i] = buckets[i].joined(Bucket(k, v, starts_of(chosen.sum(1)), own), self.heads)
                counts[i] += count
        self.buckets, self.counts = buckets, counts

    # -- plain steps

    def _takes_plain_steps(self) -> bool:
        return not self.score_only_tokens

    def _looked_at(self) -> Sequences | None:
        first, offset = copied(self.first_index)[:, 0], copied(self.offset)[:, 0]
        if (first >= self.seen - 1).any():
            return None  # a sequence has not begun
        return Sequences(first, offset, first, np.empty((len(first), 0), np.int64))

    def _ready(self, sequences: Sequences, seen: int) -> np.ndarray:
        start = self.seen - 1 if self.room is None else self.room.start
        return np.full_like(sequences.first, seen - start)

    def _store_ahead(self, count: int, ahead: int) -> None:
        """Nothing: there is no window."""

    def _store(self, buffer_k: Tensor, buffer_v: Tensor) -> None:
        """Nothing: there is no window."""

    def _reserve(self, count: int) -> None:
        b, (r_k, r_v) = len(self.offset), self.codecs[0].factors.ranks
        self.waiting_k, self.waiting_v = (
            self.recent_k.new_zeros(b, self.heads, count, r) for r in (r_k, r_v)
        )
        self.waiting_levels = torch.zeros(b, count, dtype=torch.uint8, device=self.device)

    def _store_at(self, slot: int, keys: Tensor, values: Tensor, at: Tensor) -> None:
        keys, values = self.codec.encode(keys, values, at, self._turn_of_step(keys))
        levels = self.gate(keys, values).argmax(-1)
        keys, values = self._truncated(keys, values, levels)
        for held, x in zip(self._waiting().values(), (keys, values, levels), strict=True):
            held.narrow(-2 if x.ndim == 4 else 1, slot, 1).copy_(x)

    def _keep_stored(self, count: int, held: int) -> None:
        for name, x in self._waiting().items():
            axis = 2 if x.ndim == 4 else 1
            setattr(self, name, x.narrow(axis, 0, count).clone() if count else None)

    def _note_steps(self, keys: Tensor, values: Tensor, may_be_sinks: bool) -> None:
        k, v, levels = self._waiting().values()
        self._put(k, v, levels.long(), self.positions_of(self.seen - k.shape[2], self.seen))
        for name in WAITING:
            setattr(self, name, None)

    def _parts_of_step(self, call: Call, room: Room, view: View) -> list[Part]:
        n, (k, v, _) = int(view.dense.max()), self._waiting().values()
        keys = self.codec.rebuilt_keys(k[:, :, :n], self.positions_of(room.start, room.start + n))
        waiting = Segment(call.query, keys, self.codec.expand_values(v[:, :, :n]))
        return [*self._stored_parts(call), grouped.partial([waiting], call.scaling, call.softcap)]

    def _segments_of_step(
        self, room: Room, softcap: float | None, rotation: Rotation | None
    ) -> list[StepSegment] | None:
        if rotation is None and not self.codec.meets_stored_keys(softcap):
            return None
        if self.dtype == torch.float64:
            return None  # kernels compute in fp32
        segments = []
        for codec, bucket, count in zip(self.codecs, self.buckets, self.counts, strict=True):
            if not count:
                continue
            starts, of_tokens = bucket.rows(self.heads), bucket.starts[:-1].repeat_interleave(self.heads)
            keys, values = (
                stored_in_rows(Unpacked(), (x.unsqueeze(1),), x.shape[1], starts)
                for x in (bucket.keys, bucket.values)
            )
            rebuilding = None
            if rotation is not None:
                rebuilding = Rebuilding(*codec.key_maps(self.heads), bucket.positions, of_tokens, rotation)
            segments.append(StepSegment(keys, values, starts.diff(), True, 0, rebuilding))
        k, v, _ = self._waiting().values()
        keys, values = (stored_densely(Unpacked(), (x,), x.shape[3]) for x in (k, v))
        rebuilding = None
        if rotation is not None:
            at = room.start - room.sequences.offset
            lowest, stop = int(at.min()), int(at.max()) + room.ahead
            positions = torch.arange(lowest, stop, dtype=torch.int32, device=self.device)
            firsts = torch.from_numpy(np.repeat(at - lowest, self.heads)).to(self.device)
            rebuilding = Rebuilding(*self.codec.key_maps(self.heads), positions, firsts, rotation)
        return [*segments, StepSegment(keys, values, None, True, 0, rebuilding)]

    # -- moving

    def map_tensors(self, f: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor that is held by `f` of it."""
        self._forget_prepared()
        for name, tensor in self._waiting().items():
            setattr(self, name, f(tensor))
        self.buckets = [
            replace(bucket, **{name: f(t) for name, t in vars(bucket).items()}) for bucket in self.buckets
        ]
        self.offset, self.first_index = f(self.offset), f(self.first_index)

    def select_sequences(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Keep some sequences of the batch; see `StoringLayer.select_sequences`."""
        if not self.is_initialized:
            return
        self.make_compact()
        sequences, rows = self.chosen_rows(choose, self.heads)
        self.buckets = [bucket.selected(sequences, rows, self.heads) for bucket in self.buckets]
        self.counts = [int(bucket.starts[-1]) for bucket in self.buckets]
        self.offset, self.first_index = choose(self.offset), choose(self.first_index)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.buckets, self.counts = [], [0] * len(self.codecs)


def bucketed_layer(
    factors: Factors, levels: Sequence[int], gate: Gate, layout: Layout, rope: Rope, exact_prefill: bool
) -> BucketedLayer:
    """A layer in which every token keeps as many coordinates of `factors` as its level says.

    Args:
        factors: maps of full rank.
        levels: ranks that a token may keep, the widest first.
        gate: which level a token takes.
        layout: whether keys are stored rotated.
        rope: the model's rotation in this layer.
        exact_prefill: what a chunk sees of itself, as in `StoringLayer`.
    """
    codecs = [LowRank(truncate_factors(factors, rank), layout, rope) for rank in levels]
    return BucketedLayer(codecs, gate, exact_prefill)
