"""An evicting layer that drops nothing: tokens that are not kept are held in fewer bits.

The tokens that the policy keeps are *important*. They lie in the rows of an `EvictingLayer`, in the layer's
own packing. The others lie in rows of their own, in the packing that the policy's `rest` names (ZipVL,
arXiv:2410.08584, has 4 and 2 bits). A query meets both, and all else that the layer holds, under one softmax.

A token that was packed in fewer bits stays so: what it lost cannot come back. It still takes its share of the
attention by which later evictions choose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowkey.backends.segment import Part
from lowkey.backends.stored import StepSegment
from lowkey.models.attention_interface import Call
from lowkey.ops.ragged import join_rows, pad_rows, row_of, select_rows, starts_of, top_mask
from lowkey.policies.base import EvictionContext
from lowkey.storage.budgets import LEAST_INCREMENT, EvictionCosts
from lowkey.storage.cache_wide_eviction import Candidates
from lowkey.storage.evicting import EvictingLayer
from lowkey.storage.flaws import first_flaw, packed_rows_flaw, rows_flaw, unlike
from lowkey.storage.packing import scheme
from lowkey.storage.reading import reads_in_place
from lowkey.storage.rebuilding import Rotation
from lowkey.storage.rows import POSITIONS, Rows, pack_rows, select_row_numbers, select_tokens, tokens_of_dense


class MixedLayer(EvictingLayer):
    """An `EvictingLayer` that holds the tokens which are not kept in fewer bits; see the module's docstring.

    Attributes:
        rest_keys..., rest_values...: the tensors of the packings of the other tokens, row after row.
        rest_positions: (m), their positions.
        rest_starts: (b R + 1), where each row begins.
        rest_entries: m.
    """

    rest_positions: Tensor
    rest_starts: Tensor
    saved_counters = (*EvictingLayer.saved_counters, "rest_entries")
    rest_entries = 0
    rest_longest: int | None = None  # the tokens of the longest row of the rest; None until it is counted

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rest = scheme(self.policy.rest)
        self.rest_packing = {"keys": rest.keys, "values": rest.values}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty tensors for this batch size, device and dtype."""
        super().lazy_initialization(key_states, value_states)
        starts = self.rows_starts.clone()
        keys, values = (
            pack_rows(packing, key_states.new_empty(0, self._latents(name), self.shapes[name][1]), starts)
            for name, packing in self.rest_packing.items()
        )
        self._set_rest(Rows(keys, values, self.rows_positions.clone(), starts, self.rows_scores))

    def _rest_attributes(self, name: str) -> list[str]:
        """The attributes that hold what the rest's packing of `keys` or `values` stores."""
        return [f"rest_{name}_{field}" for field in self.rest_packing[name].fields]

    @property
    def rest(self) -> Rows:
        """The tokens that are held in fewer bits."""
        keys, values = (
            tuple(getattr(self, attribute) for attribute in self._rest_attributes(name))
            for name in self.rest_packing
        )
        return Rows(keys, values, self.rest_positions, self.rest_starts, self.rows_scores[:0])

    def _set_rest(self, rows: Rows) -> None:
        for name, parts in (("keys", rows.keys), ("values", rows.values)):
            for attribute, part in zip(self._rest_attributes(name), parts, strict=True):
                setattr(self, attribute, part)
        self.rest_positions, self.rest_starts = rows.positions, rows.starts
        self.rest_entries, self.rest_longest = len(rows.positions), None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are held, by attribute name."""
        if not self.is_initialized:
            return {}
        return super().tensors() | {name: getattr(self, name) for name in self.selected_by_subclass()}

    def selected_by_subclass(self) -> set[str]:
        """The tensors of the rest; see `RowLayer.selected_by_subclass`."""
        stored = [attribute for name in self.rest_packing for attribute in self._rest_attributes(name)]
        return {*stored, "rest_positions", "rest_starts"}

    def select_sequences(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Keep some sequences of the batch; see `StoringLayer.select_sequences`."""
        if self.is_initialized:
            self.make_compact()
            (_, numbers), old = self.chosen_rows(choose, self.row_heads), self.rest
            keys, values = (
                select_row_numbers(packing, parts, old.starts, numbers)
                for packing, parts in zip(self.rest_packing.values(), (old.keys, old.values), strict=True)
            )
            self._set_rest(Rows(keys, values, *select_rows(old.positions, old.starts, numbers), old.scores))
        super().select_sequences(choose)

    def own_flaw(self, heads: int, key_width: int, value_width: int) -> str | None:
        """Check the rest; see `PositionedLayer.own_flaw`."""
        rows = len(self.offset) * self.row_heads
        return (
            first_flaw(
                unlike("rest_positions", self.rest_positions, self.rest_entries),
                unlike("rest_starts", self.rest_starts, rows + 1),
            )
            or rows_flaw(self, self.row_heads, self.rest_starts, self.rest_positions, self.rest_entries)
            or first_flaw(
                *(
                    packed_rows_flaw(
                        self, self._rest_attributes(name), packing, self.rest_starts, self.shapes[name]
                    )
                    for name, packing in self.rest_packing.items()
                )
            )
        )

    # -- bytes

    def index_bytes(self) -> int:
        """The bytes that are held whatever is kept, where the rows of the rest begin included."""
        return super().index_bytes() + len(self.rest_starts) * self.rest_starts.element_size()

    def predicted_nbytes(self) -> int:
        """As `EvictingLayer`'s, with the rest."""
        if not self.is_initialized:
            return 0
        beside = (self.rest_entries * self.rest_positions.element_size()) + (
            len(self.rest_starts) * self.rest_starts.element_size()
        )
        return super().predicted_nbytes() + self._rows_bytes(self.rest_packing, self.rest_starts) + beside

    def costs(self) -> EvictionCosts:
        """As `EvictingLayer`'s, where every token takes at least what one of the rest does."""
        whole, layers = super().costs(), self.cache_eviction.layers
        packed = [
            self._packed_token_bytes(of_layer, self.rest_packing)
            for of_layer in self.cache_eviction.shapes(tuple(self.shapes.values()))
        ]
        position = self.rest_positions.element_size()
        block = max(packing.block for packing in self.rest_packing.values())
        return replace(
            whole,
            entry_bytes=tuple(
                max(LEAST_INCREMENT, entry - rest - position)
                for entry, rest in zip(whole.entry_bytes, packed, strict=True)
            ),
            fixed_bytes=whole.fixed_bytes + self.row_heads * (block - 1) * sum(packed),
            rest_bytes=sum(packed) / layers + position,
        )

    # -- attending

    def _row_segments(self, rotation: Rotation | None) -> list[StepSegment]:
        segments = super()._row_segments(rotation)
        if not self.rest_entries:
            return segments
        return [self._segment_of(self.rest, self.rest_packing, rotation), *segments]

    def _row_parts(self, call: Call, split: bool = False) -> list[Part]:
        parts = super()._row_parts(call, split)
        if not self.rest_entries:
            return parts
        return [*self._parts_of(self.rest, self.rest_packing, call, split, self._longest_of_rest), *parts]

    def _longest_of_rest(self) -> int:
        """The most tokens of a row of the rest, which are counted once after each change."""
        if self.rest_longest is None:
            self.rest_longest = int(self.rest_starts.diff().max())
        return self.rest_longest

    def _reads_in_place(self, call: Call) -> bool:
        rest = self.rest
        return super()._reads_in_place(call) and reads_in_place(call.query, (*rest.keys, *rest.values))

    # -- evicting

    @property
    def packs_anew(self) -> bool:
        """True: what goes to the rest is packed from the numbers that came, where these are at hand."""
        return True

    def _context(
        self,
        call: Call,
        candidates: Candidates,
        chunk: tuple[Tensor, Tensor] | None,
        repetition_lse: Tensor | None,
    ) -> EvictionContext:
        """As `EvictingLayer._context`, with the rest before the candidates: attention is over all tokens."""
        own, rest = super()._context(call, candidates, chunk, repetition_lse), self.rest
        if not self.rest_entries:
            return own
        positions, valid = (
            x.unflatten(0, (len(self.offset), self.row_heads))
            for x in pad_rows(rest.positions.long(), rest.starts)
        )
        keys, values = (
            self._in_model_order(x) for x in self._rows_as_read(rest, self.rest_packing, positions)
        )
        of_heads = self._of_heads(positions - self._first_positions())
        return replace(
            own,
            keys=torch.cat([keys, own.keys], 2),
            values=torch.cat([values, own.values], 2),
            positions=torch.cat([of_heads, own.positions], 2),
            valid=torch.cat([self._of_heads(valid), own.valid], 2),
            previous_scores=torch.cat(
                [own.previous_scores.new_zeros(of_heads.shape), own.previous_scores], 2
            ),
        )

    def _scored(
        self,
        call: Call,
        candidates: Candidates,
        chunk: tuple[Tensor, Tensor] | None,
        repetition_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `EvictingLayer._scored`; the rest is no candidate."""
        scores, mass = super()._scored(call, candidates, chunk, repetition_lse)
        rest = self._longest_of_rest()
        return scores[..., rest:], None if mass is None else mass[..., rest:]

    def keep_best(self, candidates: Candidates, scores: Tensor, counts: Tensor) -> None:
        """As `EvictingLayer.keep_best`; tokens that are not kept go to the rest."""
        rest = self._rest_with(candidates, candidates.valid & ~top_mask(scores, counts))
        if self.block == 1:
            candidates = replace(candidates, latents=None)  # those that are kept are packed already
        super().keep_best(candidates, scores, counts)
        self._set_rest(rest)

    def _rest_with(self, candidates: Candidates, gone: Tensor) -> Rows:
        """The rest with the candidates that are not kept.

        Args:
            candidates: all tokens that might stay.
            gone: (b, R, s), which of them do not.
        """
        first, last = candidates.sinks, candidates.sinks + candidates.in_rows
        leaving = max(0, self.seen - self.front_start - self.exact.recent)
        in_rows, in_dense = gone[..., first:last], (gone & ~self._in_sink_slots(candidates))[..., last:]
        from_rows = in_rows[candidates.valid[..., first:last]]
        from_dense = in_dense[..., :leaving]
        row_starts, dense_starts = (starts_of(x.sum(-1).flatten()) for x in (in_rows, from_dense))
        old, whole, new_starts = self.rest, self._unpacked(self._old_rows()), row_starts + dense_starts
        of_dense = candidates.positions.int()[..., last : last + leaving][from_dense]
        new_positions = join_rows(self._old_rows().positions[from_rows], row_starts, of_dense, dense_starts)
        positions = join_rows(old.positions, old.starts, new_positions, new_starts)
        starts = old.starts + new_starts
        # older tokens that were important so far come between those of the rest
        order = (row_of(starts) * POSITIONS + positions).argsort() if len(from_rows) else None
        parts = []
        for i, (name, packing) in enumerate(self.rest_packing.items()):
            latents = candidates.latents[i] if candidates.latents is not None else None
            assert latents is not None, "packs_anew"
            dense = tokens_of_dense(latents[:, :, :leaving], self.row_heads, from_dense)
            new = join_rows(whole[i][from_rows], row_starts, dense, dense_starts)
            everything = torch.ones_like(old.positions, dtype=torch.bool)
            before = select_tokens(
                packing, (old.keys, old.values)[i], self.shapes[name][1], old.starts, everything
            )
            both = zip(before, packing.pack(new) if packing.block == 1 else (new,), strict=True)
            joined = [join_rows(a, old.starts, b, new_starts) for a, b in both]
            joined = joined if order is None else [x[order] for x in joined]
            parts.append(tuple(joined) if packing.block == 1 else pack_rows(packing, joined[0], starts))
        positions = positions if order is None else positions[order]
        return Rows(parts[0], parts[1], positions, starts, old.scores)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.rest_entries, self.rest_longest = 0, None
