"""A guided layer that moves what it drops to host memory, from where it may come back (SmallKV,
arXiv:2508.02751).

The small model knows how much attention every token gets, also those whose keys are not at hand. At an
eviction the tokens in host memory therefore compete with those of the layer: the best are kept, those among
them that come from the host are copied back, and what loses its place is copied there. No other call reads
host memory. A token is moved in the form in which rows store it, so that coming back changes nothing in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lowkey.core.types import LowkeyError
from lowkey.ops.ragged import join_rows, pad_rows, row_of, select_rows, starts_of, top_mask
from lowkey.policies.base import CosAndSin, Policy
from lowkey.storage.cache_wide_eviction import CacheWideEviction, Candidates
from lowkey.storage.codec import Codec
from lowkey.storage.exact import Exact, SinkPoints
from lowkey.storage.guided import GuidedLayer
from lowkey.storage.packing import Packing
from lowkey.storage.rows import POSITIONS, Rows, tokens_of_dense


class OffloadingLayer(GuidedLayer):
    """A `GuidedLayer` that loses nothing; see the module's docstring.

    Attributes, all in host memory:
        host_keys..., host_values...: the tensors of the packings of the tokens there, row after row.
        host_positions: (m), their positions.
        host_starts: (b R + 1), where each row begins.
    """

    host_positions: Tensor
    host_starts: Tensor

    def __init__(
        self,
        policy: Policy,
        rope: CosAndSin,
        layer_slot: int = 0,
        cache_eviction: CacheWideEviction | None = None,
        codec: Codec | None = None,
        exact: Exact | None = None,
        packing: tuple[Packing, Packing] | None = None,
        sink_points: SinkPoints | None = None,
    ) -> None:
        super().__init__(policy, rope, layer_slot, cache_eviction, codec, exact, packing, sink_points)
        if self.block > 1:
            raise LowkeyError(
                "offload with integers in blocks of tokens: a token that comes back would be rounded again; "
                "use int4 or int8, or leave offload out"
            )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty tensors for this batch size, device and dtype."""
        super().lazy_initialization(key_states, value_states)
        empty = self.rows
        keys, values = (tuple(_on_host(x) for x in parts) for parts in (empty.keys, empty.values))
        positions, starts = _on_host(empty.positions), _on_host(empty.starts)
        self._set_host(replace(empty, keys=keys, values=values, positions=positions, starts=starts))

    @property
    def host(self) -> Rows:
        """The tokens in host memory."""
        keys, values = (
            tuple(getattr(self, attribute) for attribute in self._host_attributes(name))
            for name in self.packing
        )
        return Rows(keys, values, self.host_positions, self.host_starts, self.rows_scores[:0])

    def _host_attributes(self, name: str) -> list[str]:
        return [f"host_{name}_{field}" for field in self.packing[name].fields]

    def _set_host(self, rows: Rows) -> None:
        for name, parts in (("keys", rows.keys), ("values", rows.values)):
            for attribute, part in zip(self._host_attributes(name), parts, strict=True):
                setattr(self, attribute, part)
        self.host_positions, self.host_starts = rows.positions, rows.starts

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are held, by attribute name, those in host memory included."""
        if not self.is_initialized:
            return {}
        return super().tensors() | {name: getattr(self, name) for name in self.selected_by_subclass()}

    def selected_by_subclass(self) -> set[str]:
        """The tensors in host memory; see `RowLayer.selected_by_subclass`."""
        stored = [attribute for name in self.packing for attribute in self._host_attributes(name)]
        return {*stored, "host_positions", "host_starts"}

    def select_sequences(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Keep some sequences of the batch; see `StoringLayer.select_sequences`."""
        if self.is_initialized:
            self.make_compact()
            numbers, old = self.chosen_rows(choose, self.row_heads)[1].cpu(), self.host
            keys, values = (
                tuple(select_rows(x, old.starts, numbers)[0] for x in parts)
                for parts in (old.keys, old.values)
            )
            positions, starts = select_rows(old.positions, old.starts, numbers)
            self._set_host(Rows(keys, values, positions, starts, old.scores))
        super().select_sequences(choose)

    # -- bytes

    def host_nbytes(self) -> int:
        """The part of `nbytes` that lies in host memory."""
        if not self.is_initialized:
            return 0
        beside = (self.host_positions, self.host_starts)
        indices = sum(len(x) * x.element_size() for x in beside)
        return indices + self._rows_bytes(self.packing, self.host_starts)

    def predicted_nbytes(self) -> int:
        """As `GuidedLayer`'s, with what lies in host memory."""
        return super().predicted_nbytes() + self.host_nbytes()

    # -- evicting

    def _scores_of_all(self, scores: Tensor) -> Tensor:
        """Scores (b, R, s) of candidates, with those of the tokens in host memory behind them."""
        if not len(self.host_positions):
            return scores
        every = self._pooled(self.policy.token_scores(self._small_attention()))
        at, there = (
            x.to(scores.device).unflatten(0, (-1, self.row_heads))
            for x in pad_rows(self.host_positions.long(), self.host_starts)
        )
        return torch.cat([scores, every.gather(2, at).masked_fill(~there, -torch.inf)], 2)

    def keep_best(self, candidates: Candidates, scores: Tensor, counts: Tensor) -> None:
        """Keep the best tokens, wherever they are; the others are in host memory afterwards.

        Args:
            candidates: the tokens of the layer that may stay.
            scores: (b, R, s'), of these and, behind them, of the tokens in host memory.
            counts: (b, R), how many each row keeps.
        """
        s, host = candidates.positions.shape[2], self.host
        chosen = top_mask(scores, counts)
        stays, longest = chosen[..., :s], int(host.starts.diff().max())
        there = pad_rows(host.positions, host.starts)[1]
        back = chosen[..., s : s + longest].flatten(0, 1).cpu()[there]
        returned, left = _selected(host, back), _selected(host, ~back)
        leaving = self._leaving(candidates, candidates.valid & ~stays)
        super().keep_best(candidates, scores[..., :s], stays.sum(2))
        if len(returned.positions):
            self._set_rows(_joined(self.rows, _moved(returned, self.device)))
        self._set_host(_joined(left, leaving))

    def _leaving(self, candidates: Candidates, gone: Tensor) -> Rows:
        """Copies of candidates in host memory, as rows store them; `gone` (b, R, s) says which."""
        first, last = candidates.sinks, candidates.sinks + candidates.in_rows
        dense = max(0, self.seen - self.front_start - self.exact.recent)
        from_rows = gone[..., first:last][candidates.valid[..., first:last]]
        from_dense = (gone & ~self._in_sink_slots(candidates))[..., last : last + dense]
        old, starts = self._old_rows(), starts_of(from_dense.sum(-1).flatten())
        keys, values = (
            tuple(
                tokens_of_dense(x[:, :, :dense], self.row_heads, from_dense)
                for x in self.packed_tensors(name)
            )
            for name in self.packing
        )
        positions = candidates.positions.int()[..., last : last + dense][from_dense]
        new = Rows(keys, values, positions, starts, old.scores[:0])
        return _moved(_joined(_selected(old, from_rows), new), torch.device("cpu"))


def _on_host(x: Tensor) -> Tensor:
    """A copy in host memory."""
    return x.to("cpu", copy=True)


def _moved(rows: Rows, device: torch.device) -> Rows:
    """The rows on a device."""
    keys, values = (tuple(x.to(device) for x in parts) for parts in (rows.keys, rows.values))
    return Rows(keys, values, rows.positions.to(device), rows.starts.to(device), rows.scores)


def _selected(rows: Rows, chosen: Tensor) -> Rows:
    """Some tokens (n) of rows."""
    keys, values = (tuple(x[chosen] for x in parts) for parts in (rows.keys, rows.values))
    lengths = torch.zeros_like(rows.starts[1:]).index_add_(0, row_of(rows.starts), chosen.long())
    return Rows(keys, values, rows.positions[chosen], starts_of(lengths), rows.scores[:0])


def _joined(rows: Rows, more: Rows) -> Rows:
    """The tokens of both, ordered by position in every row; without scores."""
    starts = rows.starts + more.starts
    positions = join_rows(rows.positions, rows.starts, more.positions, more.starts)
    order = (row_of(starts) * POSITIONS + positions).argsort()
    keys, values = (
        tuple(join_rows(a, rows.starts, b, more.starts)[order] for a, b in zip(of_rows, of_more, strict=True))
        for of_rows, of_more in ((rows.keys, more.keys), (rows.values, more.values))
    )
    return Rows(keys, values, positions[order], starts, rows.scores)
