"""A row layer whose tokens, wherever they lie, can be listed as candidates, of which some are kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowkey.ops.ragged import join_rows, pad_rows, starts_of, top_mask
from lowkey.storage.cache_wide_eviction import Candidates
from lowkey.storage.packing import Packing
from lowkey.storage.row_layer import RowLayer
from lowkey.storage.rows import Rows, joined_rows, select_tokens, tokens_of_dense


class CandidateLayer(RowLayer):
    """Lists its tokens as candidates, and moves those that are kept into the rows."""

    def _old_rows(self) -> Rows:
        """The rows as they are before an eviction."""
        return self.rows

    def _candidates(self, real: Tensor | None) -> Candidates:
        """Sinks that have left the dense tokens, rows, and dense tokens, in this order.

        Args:
            real: (b, t), which of the newest tokens are no padding; None if all are.
        """
        b, old = len(self.offset), self._old_rows()
        sinks = (self.sink_index.long() - self.offset).unsqueeze(1).expand(-1, self.row_heads, -1)
        sinks_valid = (self.sink_index < self.front_start).unsqueeze(1).expand_as(sinks)
        in_rows, rows_valid = (
            x.unflatten(0, (b, self.row_heads)) for x in pad_rows(old.positions.long(), old.starts)
        )
        dense = self.positions_of(self.front_start, self.seen)
        valid = torch.arange(self.front_start, self.seen, device=self.device) >= self.first_index
        if real is not None:
            valid = torch.cat([valid[:, : valid.shape[1] - real.shape[1]], real], 1)
        dense, valid = (x.unsqueeze(1).expand(-1, self.row_heads, -1) for x in (dense, valid))
        scores = torch.zeros(b, self.row_heads, 0, device=self.device)
        if self.keeps_scores:
            in_row = pad_rows(old.scores, old.starts, in_rows.shape[2])[0].unflatten(0, (b, self.row_heads))
            new = dense.shape[2] - self.dense_scores.shape[2]
            scores = torch.cat(
                [
                    scores.new_zeros(sinks.shape),
                    in_row,
                    self.dense_scores,
                    scores.new_zeros(*dense.shape[:2], new),
                ],
                2,
            )
        else:
            scores = scores.new_zeros(1).expand(
                b, self.row_heads, sinks.shape[2] + in_rows.shape[2] + dense.shape[2]
            )
        return Candidates(
            torch.cat([sinks, in_rows, dense], 2),
            torch.cat([sinks_valid, rows_valid, valid], 2),
            scores,
            sinks.shape[2],
            in_rows.shape[2],
        )

    def _candidates_as_read(
        self, candidates: Candidates, chunk: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (b, h, s, d) of the candidates, heads in the model's order.

        Args:
            candidates: from `_candidates`.
            chunk: keys and values (b, h, t, d) of the newest dense tokens as they came, if the newest call
                brought any; older ones are read as they are stored.
        """
        first = candidates.sinks
        positions = candidates.positions[..., first : first + candidates.in_rows]
        rows = self._rows_as_read(self._old_rows(), None, positions)
        both = zip((self.sink_k, self.sink_v), rows, self._dense_as_read(chunk), strict=True)
        keys, values = (self._in_model_order(torch.cat(parts, 2)) for parts in both)
        return keys, values

    def _rows_as_read(
        self, rows: Rows, packings: Mapping[str, Packing] | None, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (b, h, s, d) of some rows, heads in the codec's order; any numbers in gaps.

        Args:
            rows: the rows.
            packings: of their keys and values; None for the layer's own.
            positions: (b, R, s), of their tokens.
        """
        stored = []
        for latents in self._unpacked(rows, packings):
            dense = pad_rows(latents, rows.starts, positions.shape[2])[0].unflatten(
                0, (len(self.offset), self.row_heads)
            )
            stored.append(dense.transpose(2, 3).flatten(1, 2))
        positions = positions.repeat_interleave(self.codec.heads_per_row, 1)
        return self.codec.rebuilt_keys(stored[0], positions), self.codec.expand_values(stored[1])

    def _in_sink_slots(self, candidates: Candidates) -> Tensor:
        """(b, 1, s): which candidates are held as exact sinks."""
        positions = candidates.positions[:, :1].unsqueeze(-1)
        sinks = (self.sink_index.long() - self.offset)[:, None, None]
        is_sink = (positions == sinks).any(-1)
        # rows never hold a sink, and another row may hold another position at the same place
        is_sink[..., candidates.sinks : candidates.sinks + candidates.in_rows] = False
        return is_sink

    def _remember(self, candidates: Candidates) -> None:
        """Note the scores of candidates that all stay where they are."""
        if not self.keeps_scores:
            return
        first, last = candidates.sinks, candidates.sinks + candidates.in_rows
        valid = candidates.valid[..., first:last]
        self.rows_scores = candidates.previous_scores[..., first:last][valid]
        self.dense_scores = candidates.previous_scores[..., last:].clone()

    def keep_best(self, candidates: Candidates, scores: Tensor, counts: Tensor) -> None:
        """Keep the candidates with the highest scores in every row; the others are freed.

        Args:
            candidates: all tokens that may stay.
            scores: (b, R, s).
            counts: (b, R), how many each row keeps.
        """
        chosen = top_mask(scores, counts)
        first, last = candidates.sinks, candidates.sinks + candidates.in_rows
        leaving = max(0, self.seen - self.front_start - self.exact.recent)
        from_rows = chosen[..., first:last][candidates.valid[..., first:last]]
        from_dense = (chosen & ~self._in_sink_slots(candidates))[..., last : last + leaving]
        old = self._old_rows()
        old_lengths = chosen[..., first:last].sum(-1).flatten()
        old_starts, new_starts = starts_of(old_lengths), starts_of(from_dense.sum(-1).flatten())
        parts = []
        for i, (name, packing) in enumerate(self.packing.items()):
            kept = select_tokens(
                packing, (old.keys, old.values)[i], self.shapes[name][1], old.starts, from_rows
            )
            dense = self.packed_tensors(name) if candidates.latents is None else (candidates.latents[i],)
            new = tuple(tokens_of_dense(x[:, :, :leaving], self.row_heads, from_dense) for x in dense)
            if candidates.latents is not None and packing.block == 1:
                new = packing.pack(new[0])  # the other of keys and values is packed in blocks
            parts.append(joined_rows(packing, kept, old_starts, new, new_starts))
        positions = candidates.positions.int()
        merged = [
            join_rows(
                old.positions[from_rows],
                old_starts,
                positions[..., last : last + leaving][from_dense],
                new_starts,
            )
        ]
        if self.keeps_scores:
            seen = candidates.previous_scores
            merged.append(
                join_rows(
                    seen[..., first:last][candidates.valid[..., first:last]][from_rows],
                    old_starts,
                    seen[..., last : last + leaving][from_dense],
                    new_starts,
                )
            )
            self.dense_scores = seen[..., last + leaving :].clone()
        scores_kept = merged[1] if self.keeps_scores else self.rows_scores
        self._set_rows(Rows(parts[0], parts[1], merged[0], old_starts + new_starts, scores_kept))
        self._empty_slots(leaving)
