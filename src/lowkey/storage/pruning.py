"""An evicting layer whose kept keys lose their weakest channels (ThinK, arXiv:2407.21018).

The channels are really freed. A token is *pruned* when an eviction keeps it, unless it is among the newest
`recent` of its sequence, or the sequence fits into the budget whole. Tokens that came since are whole, and so
is everything that a frozen layer is given.

Each pruning chooses channels for the tokens between the one before and itself, by its own queries and keys. A
few queries, as of decoding steps, say little about channels, so they reuse the choice before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowkey.backends.ragged import ragged, stored_rows
from lowkey.backends.segment import Part, merge_parts
from lowkey.backends.stored import StepSegment, StoredRows
from lowkey.models.attention_interface import Call
from lowkey.ops.ragged import join_rows, row_of, starts_of
from lowkey.policies.base import newest_query_positions
from lowkey.storage.budgets import EvictionCosts
from lowkey.storage.cache_wide_eviction import Candidates
from lowkey.storage.evicting import EvictingLayer
from lowkey.storage.flaws import first_flaw, rows_flaw, unlike
from lowkey.storage.packing import Unpacked
from lowkey.storage.rebuilding import Rotation
from lowkey.storage.rollback import storage_bytes
from lowkey.storage.rows import Rows, stored_in_rows


@dataclass(frozen=True)
class PendingPruning:
    """What an eviction under way will prune by, once it is known which tokens stay.

    Args:
        until: (b), the position up to which each sequence is pruned.
        energy: (b, h, d), the summed squares of each sequence's newest queries.
        queries: (b), how many queries that were.
    """

    until: Tensor
    energy: Tensor
    queries: Tensor


class PruningLayer(EvictingLayer):
    """An `EvictingLayer` that holds old tokens with fewer key channels; see the module's docstring.

    It stores keys and values as the model made them, never in low rank.

    Attributes:
        pruned_k: (m, r), the keys of pruned tokens, row after row, with r < d channels.
        pruned_v: (m, d), their values.
        pruned_positions: (m), their positions.
        pruned_starts: (b h + 1), where each row begins.
        kept_channels: (b, p, h, r), the channels that each of the p prunings left, ascending.
        pruned_until: (b, p), the position up to which each pruning went.
        choice_is_firm: (b, 1), whether the newest choice was made by enough queries to be used again.
        pruned_entries: m.
        prunings: p.
        pending: within a call, what `keep_best` will prune by.
    """

    pruned_k: Tensor
    pruned_v: Tensor
    pruned_positions: Tensor
    pruned_starts: Tensor
    kept_channels: Tensor
    pruned_until: Tensor
    choice_is_firm: Tensor
    # A policy with `channels`, the share of key channels that stays, and `looked`, the number of newest
    # queries that choose them.
    policy: Any
    saved_counters = (*EvictingLayer.saved_counters, "pruned_entries", "prunings")
    pruned_entries = prunings = 0
    pending: PendingPruning | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty tensors for this batch size, device and dtype."""
        super().lazy_initialization(key_states, value_states)
        b, h, _, self.head_dim = key_states.shape
        self.pruned_k = key_states.new_empty(0, self.channel_count)
        self.pruned_v = value_states.new_empty(0, self.head_dim)
        self.pruned_positions, self.pruned_starts = self.rows_positions.clone(), self.rows_starts.clone()
        self.kept_channels = torch.zeros(b, 0, h, self.channel_count, dtype=torch.int16, device=self.device)
        self.pruned_until = torch.zeros(b, 0, dtype=torch.int32, device=self.device)
        self.choice_is_firm = torch.zeros(b, 1, dtype=torch.bool, device=self.device)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are held, by attribute name."""
        if not self.is_initialized:
            return {}
        rows = ("pruned_k", "pruned_v", "pruned_positions", "pruned_starts")
        choices = ("kept_channels", "pruned_until", "choice_is_firm")
        return super().tensors() | {name: getattr(self, name) for name in (*rows, *choices)}

    def ragged(self) -> dict[str, tuple[str, ...]]:
        """The tensors that lie row after row, by the name of the tensor that says where rows begin."""
        return super().ragged() | {"pruned_starts": ("pruned_k", "pruned_v", "pruned_positions")}

    def select_sequences(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Keep some sequences of the batch; see `StoringLayer.select_sequences`."""
        super().select_sequences(choose)
        self.pruned_entries = len(self.pruned_k) if self.is_initialized else 0

    # -- bytes and counts

    def index_bytes(self) -> int:
        """The bytes that are held whatever is kept, the choices of all prunings included."""
        return super().index_bytes() + self._own_index_bytes()

    def _own_index_bytes(self) -> int:
        starts = len(self.pruned_starts) * self.pruned_starts.element_size()
        return starts + len(self.offset) + self.prunings * self._pruning_bytes()

    def _pruning_bytes(self) -> int:
        """The bytes of one pruning's channels and end."""
        b, h = len(self.offset), self.row_heads
        return b * (
            h * self.channel_count * self.kept_channels.element_size() + self.pruned_until.element_size()
        )

    def predicted_nbytes(self) -> int:
        """As `EvictingLayer`'s, with the pruned tokens."""
        if not self.is_initialized:
            return 0
        pruned = self.pruned_entries * int(self.pruned_entry_bytes)
        return super().predicted_nbytes() + pruned + self._own_index_bytes()

    def held_tensors(self) -> list[Tensor]:
        """All tensors that the layer keeps alive, what a pruning under way needs included."""
        pending = vars(self.pending).values() if self.pending is not None else ()
        return [*super().held_tensors(), *pending]

    def earliest_crop(self) -> int:
        """As `EvictingLayer.earliest_crop`; a pruning that moved no token into the rows is not undone."""
        return self.seen if self.prunings and not self.front_start else super().earliest_crop()

    def _waiting_bytes(self) -> int:
        pending = vars(self.pending).values() if self.pending is not None else ()
        return super()._waiting_bytes() + storage_bytes(pending)

    @property
    def channel_share(self) -> float:
        """The share of key channels that stays.

        A budget is of bytes: no more channels are dropped than every token needs to stay.
        """
        if not self._budget_is_a_percentage():
            return self.policy.channels
        # keys are half of a token's bytes: all tokens fit if (1 + share) / 2 is the budget
        return max(self.policy.channels, 2 * self.policy.budget.amount / 100 - 1)

    def _budget_is_a_percentage(self) -> bool:
        return self.policy.budget is not None and self.policy.budget.unit == "%"

    @property
    def channel_count(self) -> int:
        """The number r of channels that a pruned key has."""
        return max(1, round(self.channel_share * self.head_dim))

    @property
    def pruned_entry_bytes(self) -> float:
        """The bytes of one pruned token of one head."""
        return self.entry_bytes - (self.head_dim - self.channel_count) * self.recent_k.element_size()

    def costs(self) -> EvictionCosts:
        """As `EvictingLayer`'s, with one more pruning, and with recent tokens whole."""
        whole = super().costs()
        next_pruning = self.cache_eviction.layers * self._pruning_bytes() / whole.sequences
        return replace(
            whole,
            entry_bytes=(self.pruned_entry_bytes,) * len(whole.entry_bytes),
            fixed_bytes=whole.fixed_bytes + next_pruning,
            whole_recent=self._whole_tokens(),
            exact_extra_bytes=self.entry_bytes - self.pruned_entry_bytes,
        )

    def tokens_per_head(self, tokens: int, prompt: int = 0) -> float:
        """The budget of a sequence, in tokens per head; a percentage is of the bytes of keys and values."""
        share = self.channel_share if self._budget_is_a_percentage() and not self._fits(tokens) else 1
        return super().tokens_per_head(tokens, prompt) * 2 / (1 + share)

    def _fits(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens fits into the budget without any pruning."""
        if self.channel_count == self.head_dim:
            return True
        if self.policy.budget is None or self.policy.budget.unit in ("%", "tokens"):
            return super().tokens_per_head(tokens) >= tokens
        return super().costs().fits(self.policy, tokens)

    def own_flaw(self, heads: int, key_width: int, value_width: int) -> str | None:
        """Check the pruned tokens and the channels of each pruning; see `PositionedLayer.own_flaw`."""
        b = len(self.offset)
        at, until = self.kept_channels.long(), self.pruned_until
        wrong = first_flaw(
            unlike("pruned_k", self.pruned_k, self.pruned_entries, self.channel_count),
            unlike("pruned_v", self.pruned_v, self.pruned_entries, value_width),
            unlike("pruned_positions", self.pruned_positions, self.pruned_entries),
            unlike("pruned_starts", self.pruned_starts, b * heads + 1),
            unlike("kept_channels", self.kept_channels, b, self.prunings, heads, self.channel_count),
            unlike("pruned_until", until, b, self.prunings),
            unlike("choice_is_firm", self.choice_is_firm, b, 1),
        )
        if wrong:
            return wrong
        if bool(((at < 0) | (at >= key_width)).any()) or bool((at.diff(dim=3) <= 0).any()):
            return "channels are not those of a key, ascending"
        # channels are found by counting the prunings that ended before a token
        if bool((until.diff(dim=1) < 0).any()):
            return "a pruning went less far than the one before"
        wrong = rows_flaw(self, heads, self.pruned_starts, self.pruned_positions, self.pruned_entries)
        if wrong or not self.pruned_entries:
            return wrong
        # every pruned token must lie before the end of some pruning, which has its channels
        late = (
            self.pruned_positions >= until[:, -1][row_of(self.pruned_starts) // heads]
            if self.prunings
            else self.pruned_positions >= 0
        )
        return "tokens lost channels that no pruning took" if bool(late.any()) else None

    # -- attending

    def _row_segments(self, rotation: Rotation | None) -> list[StepSegment]:
        whole = super()._row_segments(rotation)
        if not self.pruned_entries:
            return whole
        keys, values, lengths = self._rows_of_prunings()
        p, r = self.prunings, self.channel_count
        # queries have their own channels first, then those that each pruning left
        return whole + [
            StepSegment(keys.sliced(i, p), values.sliced(i, p), lengths[i::p], column=self.head_dim + i * r)
            for i in range(p)
        ]

    def _query_columns(self) -> Tensor | None:
        if not self.pruned_entries:
            return None
        left = self.kept_channels.long().transpose(1, 2).flatten(2).flatten(0, 1)
        return torch.cat([torch.arange(self.head_dim, device=self.device).expand(len(left), -1), left], 1)

    def _rows_of_prunings(self) -> tuple[StoredRows, StoredRows, Tensor]:
        """Keys, values and lengths (b h p) of rows of one pruning each; its tokens lie together in a row."""
        row, p = row_of(self.pruned_starts), self.prunings
        counts = torch.zeros(len(self.pruned_starts[1:]) * p, dtype=torch.long, device=self.device)
        at = row * p + self._prunings_of(self.pruned_positions, row)
        lengths = counts.index_add_(0, at, torch.ones_like(row))
        keys, values = (
            stored_in_rows(Unpacked(), (x.unsqueeze(1),), x.shape[1], starts_of(lengths))
            for x in (self.pruned_k, self.pruned_v)
        )
        return keys, values, lengths

    def _row_parts(self, call: Call, split: bool = False) -> list[Part]:
        # (nothing is split: the policy has no second pass)
        parts = super()._row_parts(call, split)
        if not self.pruned_entries:
            return parts
        b, h, g, t, _ = call.query.shape
        keys, values, lengths = self._rows_of_prunings()
        # a query loses the channels that the tokens of a pruning lost
        channels = self.kept_channels.long().transpose(1, 2).unsqueeze(3).expand(-1, -1, -1, g * t, -1)
        query = call.query.flatten(2, 3).unsqueeze(2).expand(-1, -1, self.prunings, -1, -1)
        query = query.gather(4, channels)
        if self._reads_in_place(call):
            found = []
            for i in range(self.prunings):  # rows of one pruning, of which blocks are not too many at a time
                own, of_rows = query[:, :, i].flatten(0, 1), lengths[i :: self.prunings]
                sides = keys.sliced(i, self.prunings), values.sliced(i, self.prunings)
                found.append(stored_rows(own, *sides, of_rows, call.scaling, call.softcap))
        else:
            starts = starts_of(lengths)
            out, lse = ragged(
                query.flatten(0, 2), self.pruned_k, self.pruned_v, starts, call.scaling, call.softcap
            )
            found = [(out[i :: self.prunings], lse[i :: self.prunings]) for i in range(self.prunings)]
        out, lse = merge_parts(found)
        return [*parts, (out.view(b, h, g, t, -1), lse.view(b, h, g, t))]

    def _with_zero_channels(self) -> Tensor:
        """The pruned keys (m, d), with zeros for the channels that they lost."""
        wide = self.pruned_k.new_zeros(self.pruned_entries, self.head_dim)
        return wide.scatter_(1, self._channels_of(self.pruned_positions, self.pruned_starts), self.pruned_k)

    def _channels_of(self, positions: Tensor, starts: Tensor) -> Tensor:
        """The channels (m, r) that pruned tokens at these positions have left."""
        row = row_of(starts)
        sequence = row // self.row_heads
        pruning = self._prunings_of(positions, row)
        return self.kept_channels[sequence, pruning, row % self.row_heads].long()

    def _prunings_of(self, positions: Tensor, row: Tensor) -> Tensor:
        """(m): which pruning took the pruned tokens at these positions of these rows."""
        # as many as ended before
        return (positions.unsqueeze(1) >= self.pruned_until[row // self.row_heads]).sum(1)

    # -- evicting

    def _old_rows(self) -> Rows:
        """Pruned tokens first, since they are older, with zeros for lost channels, then whole ones."""
        whole = self.rows
        if not self.pruned_entries:
            return whole
        keys, values, positions = (
            join_rows(old, self.pruned_starts, new, whole.starts)
            for old, new in (
                (self._with_zero_channels().unsqueeze(1), whole.keys[0]),
                (self.pruned_v.unsqueeze(1), whole.values[0]),
                (self.pruned_positions, whole.positions),
            )
        )
        return Rows((keys,), (values,), positions, self.pruned_starts + whole.starts, whole.scores)

    def _whole_tokens(self) -> int:
        """How many of the newest tokens keep all channels."""
        return max(self.policy.recent, self.exact.recent)

    def _evict(
        self,
        call: Call,
        real: Tensor | None,
        chunk: tuple[Tensor, Tensor] | None,
        repetition_lse: Tensor | None = None,
    ) -> None:
        tokens = self.tokens_seen()
        if not self.frozen and not all(self._fits(n) for n in tokens.tolist()):
            self.pending = self._pruning(call, real, tokens)
        super()._evict(call, real, chunk, repetition_lse)

    def _scores_decide_nothing(self, tokens: Tensor) -> bool:
        # keys lose channels also where every token stays
        return super()._scores_decide_nothing(tokens) and self.pending is None

    def _pruning(self, call: Call, real: Tensor | None, tokens: Tensor) -> PendingPruning:
        """How far each sequence is to be pruned, and the queries that choose its channels."""
        first = self._first_positions().view(-1)
        before = self.pruned_until[:, -1].long() if self.prunings else first
        fits = torch.tensor([self._fits(n) for n in tokens.tolist()], device=self.device)
        unchanged = self.decoding_rows(call.query.shape[3]) | fits
        until = before.maximum(first + tokens - self._whole_tokens())
        # the queries that were recorded, and those of this call
        queries = self._with_recorded_queries(call.query)
        at = self.query_positions(queries.shape[3], real)
        newest = newest_query_positions(at, self.policy.looked) >= 0  # (b, w)
        some = newest.any(0)
        squares = queries[:, :, :, some].float().square().sum(2)
        energy = squares.masked_fill(~newest[:, None, some, None], 0.0).sum(2)
        return PendingPruning(before.where(unchanged, until), energy, newest.sum(1))

    def keep_best(self, candidates: Candidates, scores: Tensor, counts: Tensor) -> None:
        """As `EvictingLayer.keep_best`; then keys that are not among the newest lose channels."""
        super().keep_best(candidates, scores, counts)
        pending, self.pending = self.pending, None
        if pending is not None:
            self._choose_channels(pending)
        if not self.prunings:
            return
        # move every token from before the last pruning's end out of the whole rows
        whole = self.rows
        row = row_of(whole.starts)
        old = whole.positions < self.pruned_until[:, -1][row // self.row_heads]
        lengths = torch.zeros_like(whole.starts[1:]).index_add_(0, row, old.long())
        (keys,), (values,) = whole.keys, whole.values
        self.pruned_positions, self.pruned_v = whole.positions[old], values[old, 0]
        self.pruned_starts, self.pruned_entries = starts_of(lengths), int(old.sum())
        channels = self._channels_of(self.pruned_positions, self.pruned_starts)
        self.pruned_k = keys[old, 0].gather(1, channels)
        starts = starts_of(whole.starts.diff() - lengths)
        self._set_rows(Rows((keys[~old],), (values[~old],), whole.positions[~old], starts, whole.scores))

    def _choose_channels(self, pending: PendingPruning) -> None:
        """Add a pruning, unless every sequence goes on with the channels that it has.

        A channel's worth is the energy of the queries in it times that of the keys that are pruned anew.
        """
        b, h = len(self.offset), self.row_heads
        row, positions = row_of(self.rows_starts), self.rows_positions
        before = self.pruned_until[:, -1] if self.prunings else self._first_positions().view(-1).int()
        new = (positions >= before[row // h]) & (positions < pending.until[row // h])
        keys = self.rows.keys[0][new, 0].float()
        key_energy = torch.zeros(b * h, self.head_dim, device=self.device).index_add_(
            0, row[new], keys.square()
        )
        # the square of ThinK's score of a channel, |Q_c K_c^T|_F = |q_c| |k_c|
        worth = pending.energy * key_energy.view(b, h, -1)
        chosen = worth.topk(self.channel_count, dim=-1).indices.sort(-1).values.short()
        reuse = self.choice_is_firm[:, 0] & (pending.queries < self.policy.looked)
        until = pending.until.int().unsqueeze(1)
        if self.prunings and bool(reuse.all()):
            # no new choice: the last pruning just goes further
            self.pruned_until = torch.cat([self.pruned_until[:, :-1], until], 1)
            return
        if self.prunings:  # the sequences that reuse a choice get a copy of it
            chosen = torch.where(reuse[:, None, None], self.kept_channels[:, -1], chosen)
        self.kept_channels = torch.cat([self.kept_channels, chosen.unsqueeze(1)], 1)
        self.pruned_until = torch.cat([self.pruned_until, until], 1)
        enough = (pending.queries >= self.policy.looked) & (pending.until > before)
        self.choice_is_firm = self.choice_is_firm | enough.unsqueeze(1)
        self.prunings += 1

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.pruned_entries = self.prunings = 0
        self.pending = None
