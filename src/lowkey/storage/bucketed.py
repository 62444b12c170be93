"""Every token keeps a rank of its own, which a small gate gives it: one bucket of rows for each level of rank
(arXiv:2603.04411).

Of the paper only the abstract is known: a learnt gate gives each token a compression rate. Levels, gate and
storage are our own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import gelu

from lowkey.backends import grouped
from lowkey.backends.ragged import ragged
from lowkey.backends.segment import Part, Segment, merge_parts
from lowkey.core.types import Factors
from lowkey.models.attention_interface import Call
from lowkey.ops.ragged import picked, row_of, starts_of
from lowkey.storage.codec import LowRank
from lowkey.storage.positioned import RaggedLayer

LARGE = 8.0  # a coordinate so many times its root mean square says no more than that it is large


@dataclass(frozen=True)
class Gate:
    """One hidden layer over the coordinates of a token's keys and values, all heads, each over its root mean
    square.

    scale (2 h, d): one over that; hidden (2 h d, m), hidden_bias (m), out (m, n), out_bias (n), for n levels
    of rank.
    """

    scale: Tensor
    hidden: Tensor
    hidden_bias: Tensor
    out: Tensor
    out_bias: Tensor

    def __call__(self, keys: Tensor, values: Tensor) -> Tensor:
        """Coordinates (b, h, t, d) -> (b, t, n) in fp32; a token takes the level of its largest number."""
        both = torch.cat([keys, values], 1).float() * self.scale.unsqueeze(1)
        flat = both.clamp(-LARGE, LARGE).transpose(1, 2).flatten(2)
        return gelu(flat @ self.hidden + self.hidden_bias) @ self.out + self.out_bias

    def to(self, device: torch.device) -> Gate:
        return Gate(**{name: t.to(device) for name, t in vars(self).items()})


@dataclass(frozen=True)
class Bucket:
    """The tokens of one level: keys and values (h n, r), sequence after sequence, in each of them head after
    head.

    starts (b + 1): where each sequence's tokens begin among n; where (n), their positions, if the layout
    needs them, else (0).
    """

    keys: Tensor
    values: Tensor
    starts: Tensor
    where: Tensor

    def joined(self, more: Bucket, heads: int) -> Bucket:
        """Every sequence with more tokens behind it."""
        rows, new = self.rows(heads), more.rows(heads)
        keys, values = (
            joined_rows(a, rows, b, new) for a, b in ((self.keys, more.keys), (self.values, more.values))
        )
        where = (
            joined_rows(self.where, self.starts, more.where, more.starts)
            if len(self.where) + len(more.where)
            else self.where
        )
        return Bucket(keys, values, self.starts + more.starts, where)

    def picked(self, sequences: Tensor, rows: Tensor, heads: int) -> Bucket:
        """The sequences with these numbers, whose heads have the numbers `rows`."""
        keys, values = (picked(x, self.rows(heads), rows)[0] for x in (self.keys, self.values))
        where = picked(self.where, self.starts, sequences)[0] if len(self.where) else self.where
        return Bucket(keys, values, starts_of(self.starts.diff()[sequences]), where)

    def rows(self, heads: int) -> Tensor:
        """(b h + 1): where the row of each head begins in `keys`."""
        return starts_of(self.starts.diff().repeat_interleave(heads))

    def positions(self, heads: int) -> Tensor:
        """(h n), or (0): of every key."""
        if not len(self.where):
            return self.where
        rows = self.rows(heads)
        row = row_of(rows)
        return self.where[self.starts[row // heads] + torch.arange(len(row), device=row.device) - rows[row]]


def cut(factors: Factors, rank: int) -> Factors:
    """The first `rank` coordinates of keys and of values."""
    f = factors
    return Factors(f.k_down[..., :rank], f.k_up[..., :rank, :], f.v_down[..., :rank], f.v_up[..., :rank, :])


def joined_rows(flat: Tensor, starts: Tensor, more: Tensor, more_starts: Tensor) -> Tensor:
    """Rows of different length (n, ...) with other such rows (m, ...) behind them: (n + m, ...)."""
    out = flat.new_empty(len(flat) + len(more), *flat.shape[1:])
    out[torch.arange(len(flat), device=flat.device) + more_starts[row_of(starts)]] = flat
    out[torch.arange(len(more), device=flat.device) + starts[1:][row_of(more_starts)]] = more
    return out


class BucketedLayer(RaggedLayer):
    """codecs: the same maps cut at each level of rank, the widest first; gate: which of them a token takes,
    in all heads of the layer.

    A query meets the tokens of its own chunk densely, as they will be stored or, under exact prefill, as they
    are; older ones bucket by bucket. The parts are merged by log-sum-exp. Padding takes no slot. counts:
    tokens held at each level, over the batch.
    """

    def __init__(self, codecs: Sequence[LowRank], gate: Gate, exact_prefill: bool = False) -> None:
        super().__init__(exact_prefill)
        self.codecs, self.gate = list(codecs), gate
        self.buckets: list[Bucket] = []
        self.counts = [0] * len(self.codecs)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        b, self.heads = key_states.shape[:2]
        self.device, self.size = key_states.device, key_states.element_size()
        self.codecs, self.gate = [c.like(key_states) for c in self.codecs], self.gate.to(self.device)
        self.begin(b)
        nowhere, none = (
            torch.zeros(n, dtype=t, device=self.device) for n, t in ((0, torch.int32), (b + 1, torch.long))
        )
        for codec in self.codecs:
            keys, values = codec.encode(key_states[:, :, :0], value_states[:, :, :0], self.positions(0, 0))
            empty = Bucket(
                keys.new_empty(0, keys.shape[-1]),
                values.new_empty(0, values.shape[-1]),
                none.clone(),
                nowhere,
            )
            self.buckets = [*self.buckets, empty]
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        held = {f"{name}_{i}": t for i, bucket in enumerate(self.buckets) for name, t in vars(bucket).items()}
        return held | {"offset": self.offset, "first": self.first} if self.is_initialized else {}

    def predicted_nbytes(self) -> int:
        if not self.is_initialized:
            return 0
        batch, placed = len(self.offset), 4 * self._needs_positions
        widths = [sum(codec.factors.ranks) for codec in self.codecs]
        kept = sum(
            n * (self.heads * width * self.size + placed)
            for n, width in zip(self.counts, widths, strict=True)
        )
        return kept + 8 * (len(self.codecs) * (batch + 1) + 2 * batch)

    @property
    def _needs_positions(self) -> bool:
        return self.codecs[0].layout == "pre_rope"

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        t = keys.shape[2]
        real = self.place(call, t)
        positions = self.positions(self.seen - t, self.seen)
        stored = self.codecs[0].encode(keys, values, positions)
        levels = self.gate(*stored).argmax(-1).masked_fill(~real, -1)
        own, exact = (keys, values), self.exact_rows(real)[:, None, None, None]
        if not bool(exact.all()):
            k, v = self._as_read(*stored, levels, positions)
            own = torch.where(exact, keys, k), torch.where(exact, values, v)
        out = merge_parts([*self._older(call), self._own(*own, call)])[0]
        self._store(*stored, levels, positions)
        return out.to(values.dtype)

    # -- reading

    def _older(self, call: Call) -> Iterator[Part]:
        """Attention over what was stored before this call, each part (b, h, g, t, d) with its log-sum-exp."""
        for codec, bucket, count in zip(self.codecs, self.buckets, self.counts, strict=True):
            if count:
                query, starts = codec.query(call.query), bucket.rows(self.heads)
                keys = codec.readable_rows(bucket.keys, bucket.positions(self.heads), starts, self.heads)
                out, lse = ragged(
                    query.flatten(2, 3).flatten(0, 1), keys, bucket.values, starts, call.scaling, call.softcap
                )
                shape = query.shape[:4]
                yield codec.out(out.view(*shape, -1)), lse.view(shape)

    def _own(self, keys: Tensor, values: Tensor, call: Call) -> Part:
        """Attention of a chunk's queries over the chunk itself."""
        mask = call.full_mask(self.seen)
        mask = None if mask is None else mask[..., self.seen - keys.shape[2] :]
        return grouped.partial([Segment(call.query, keys, values, mask)], call.scaling, call.softcap)

    def _as_read(
        self, keys: Tensor, values: Tensor, levels: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (b, h, t, d) of a chunk, each token rebuilt from as many coordinates as it will
        keep.
        """
        widest, ranks = (
            self.codecs[0],
            torch.tensor([c.factors.ranks for c in self.codecs], device=levels.device),
        )
        kept = [
            torch.arange(x.shape[-1], device=levels.device) < r[levels, None]
            for x, r in zip((keys, values), ranks.T, strict=True)
        ]
        keys, values = (x * k.unsqueeze(1) for x, k in zip((keys, values), kept, strict=True))
        return widest.keys(widest.readable(keys, positions.unsqueeze(1))), widest.values(values)

    # -- storing

    def _store(self, keys: Tensor, values: Tensor, levels: Tensor, positions: Tensor) -> None:
        """keys, values (b, h, t, d): coordinates of which each level keeps the first; levels (b, t), -1 for
        padding.
        """
        grown, counts = list(self.buckets), list(self.counts)
        for i, codec in enumerate(self.codecs):
            chosen = levels == i
            count = int(chosen.sum())
            if count:
                rows = chosen.unsqueeze(1).expand(-1, self.heads, -1)
                k, v = (x[..., :r][rows] for x, r in zip((keys, values), codec.factors.ranks, strict=True))
                where = positions[chosen].int() if self._needs_positions else self.buckets[i].where
                grown[i] = grown[i].joined(Bucket(k, v, starts_of(chosen.sum(1)), where), self.heads)
                counts[i] += count
        self.buckets, self.counts = grown, counts

    # -- moving

    def map_tensors(self, f: Callable[[Tensor], Tensor]) -> None:
        self.buckets = [
            replace(bucket, **{name: f(t) for name, t in vars(bucket).items()}) for bucket in self.buckets
        ]
        self.offset, self.first = f(self.offset), f(self.first)

    def pick(self, choose: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        sequences, rows = self.chosen_rows(choose, self.heads)
        self.buckets = [bucket.picked(sequences, rows, self.heads) for bucket in self.buckets]
        self.counts = [int(bucket.starts[-1]) for bucket in self.buckets]
        self.offset, self.first = choose(self.offset), choose(self.first)

    def reset(self) -> None:
        super().reset()
        self.buckets, self.counts = [], [0] * len(self.codecs)
