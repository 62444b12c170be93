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

from lowkey.backends.ragged import ragged
from lowkey.backends.segment import Part
from lowkey.models.attention_interface import Call
from lowkey.ops.ragged import pad_rows, row_of, starts_of
from lowkey.storage.budgets import EvictionCosts
from lowkey.storage.cache_wide_eviction import Candidates
from lowkey.storage.evicting import EvictingLayer
from lowkey.storage.flaws import first_flaw, rows_flaw, unlike
from lowkey.storage.rollback import storage_bytes


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
        b, h = key_states.shape[:2]
        self.pruned_k, self.pruned_v = self.keys.new_empty(0, self.channel_count), self.values.clone()
        self.pruned_positions, self.pruned_starts = self.positions.clone(), self.starts.clone()
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
        b, h = self.tail_k.shape[:2]
        starts, firm = (b * h + 1) * self.pruned_starts.element_size(), b
        return super().index_bytes() + starts + firm + self.prunings * self._pruning_bytes()

    def _pruning_bytes(self) -> int:
        """The bytes of one pruning's channels and end."""
        b, h = self.tail_k.shape[:2]
        return b * (
            h * self.channel_count * self.kept_channels.element_size() + self.pruned_until.element_size()
        )

    def predicted_nbytes(self) -> int:
        """As `EvictingLayer`'s, with the pruned tokens."""
        pruned = self.pruned_entries * self.pruned_entry_bytes if self.is_initialized else 0
        return super().predicted_nbytes() + pruned

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
        return max(1, round(self.channel_share * self.keys.shape[-1]))

    @property
    def pruned_entry_bytes(self) -> int:
        """The bytes of one pruned token of one head."""
        return self.entry_bytes - (self.keys.shape[-1] - self.channel_count) * self.keys.element_size()

    def costs(self) -> EvictionCosts:
        """As `EvictingLayer`'s, with one more pruning, and with recent tokens whole."""
        whole = super().costs()
        next_pruning = self.cache_eviction.layers * self._pruning_bytes() / whole.sequences
        return replace(
            whole,
            entry_bytes=self.pruned_entry_bytes,
            fixed_bytes=whole.fixed_bytes + next_pruning,
            recent_extra_bytes=self.entry_bytes - self.pruned_entry_bytes,
        )

    def tokens_per_head(self, tokens: int) -> float:
        """The budget of a sequence, in tokens per head; a percentage is of the bytes of keys and values."""
        share = self.channel_share if self._budget_is_a_percentage() and not self._fits(tokens) else 1
        return super().tokens_per_head(tokens) * 2 / (1 + share)

    def _fits(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens fits into the budget without any pruning."""
        if self.channel_count == self.keys.shape[-1]:
            return True
        if self.policy.budget is None or self.policy.budget.unit in ("%", "tokens"):
            return super().tokens_per_head(tokens) >= tokens
        return super().costs().tokens_per_head(self.policy, tokens) >= tokens

    def kept_positions(self, sequence: int) -> list[Tensor]:
        """For each KV head, the positions that are held for a sequence of the batch, ascending."""
        h = self.tail_k.shape[1]
        edges = self.pruned_starts[sequence * h : (sequence + 1) * h + 1].tolist()
        whole = super().kept_positions(sequence)
        return [
            torch.cat([self.pruned_positions[a:b].long(), x])
            for a, b, x in zip(edges[:-1], edges[1:], whole, strict=True)
        ]

    def own_flaw(self, heads: int, key_width: int, value_width: int) -> str | None:
        """Check the pruned tokens and the channels of each pruning; see `PositionedLayer.own_flaw`."""
        b = len(self.offset)
        at, until = self.kept_channels.long(), self.pruned_until
        wrong = first_flaw(
            unlike("pruned_k", self.pruned_k, self.pruned_entries, self.channel_count),
            unlike("pruned_v", self.pruned_v, self.pruned_entries, self.values.shape[-1]),
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

    def _stored_parts(self, call: Call, stop: int) -> list[Part]:
        parts = super()._stored_parts(call, stop)
        if not self.pruned_entries:
            return parts
        query, keys = call.query.flatten(2, 3), self.pruned_k
        if self.prunings == 1:
            # all keys of a head have the same channels: the query loses the others
            channels = self.kept_channels[:, 0].long().unsqueeze(2)
            query = query.gather(3, channels.expand(-1, -1, query.shape[2], -1))
        else:
            keys = self._with_zero_channels()
        out, lse = ragged(
            query.flatten(0, 1), keys, self.pruned_v, self.pruned_starts, call.scaling, call.softcap
        )
        return [*parts, (out.view(*call.query.shape[:4], -1), lse.view(call.query.shape[:4]))]

    def _with_zero_channels(self) -> Tensor:
        """The pruned keys (m, d), with zeros for the channels that they lost."""
        # prunings differ in channels, so keys of several cannot be multiplied in their narrow form
        wide = self.pruned_k.new_zeros(self.pruned_entries, self.keys.shape[-1])
        return wide.scatter_(1, self._channels_of(self.pruned_positions, self.pruned_starts), self.pruned_k)

    def _channels_of(self, positions: Tensor, starts: Tensor) -> Tensor:
        """The channels (m, r) that pruned tokens at these positions have left."""
        row = row_of(starts)
        sequence = row // self.tail_k.shape[1]
        pruning = (positions.unsqueeze(1) >= self.pruned_until[sequence]).sum(1)  # how many ended before
        return self.kept_channels[sequence, pruning, row % self.tail_k.shape[1]].long()

    # -- evicting

    def _stored_candidates(self, stop: int) -> Candidates:
        """Pruned tokens first, since they are older, then those of `EvictingLayer`."""
        shape = self.tail_k.shape[:2]
        keys, values, positions = (
            pad_rows(x, self.pruned_starts)[0].unflatten(0, shape)
            for x in (self._with_zero_channels(), self.pruned_v, self.pruned_positions.long())
        )
        valid = pad_rows(self.pruned_positions, self.pruned_starts)[1].unflatten(0, shape)
        scores = torch.zeros_like(valid, dtype=torch.float32)
        return Candidates(keys, values, positions, valid, scores).followed_by(
            super()._stored_candidates(stop)
        )

    def _evict(self, call: Call, candidates: Candidates, repetition_lse: Tensor | None = None) -> None:
        tokens = self.tokens_seen()
        if not self.frozen and not all(self._fits(n) for n in tokens.tolist()):
            self.pending = self._pruning(call, candidates, tokens)
        super()._evict(call, candidates, repetition_lse)

    def _pruning(self, call: Call, candidates: Candidates, tokens: Tensor) -> PendingPruning:
        """How far each sequence is to be pruned, and the queries that choose its channels."""
        first = self._first_positions().view(-1)
        before = self.pruned_until[:, -1].long() if self.prunings else first
        fits = torch.tensor([self._fits(n) for n in tokens.tolist()], device=self.device)
        unchanged = self.decoding_rows(call.query.shape[3]) | fits
        until = before.maximum(first + tokens - self.policy.recent)
        # the queries that were recorded, and those of this call
        context = self._context(call, candidates, None)
        newest = context.newest_query_positions(self.policy.looked) >= 0  # (b, w)
        columns = newest.any(0)  # only these queries are converted to fp32
        squares = context.queries[:, :, :, columns].float().square().sum(2)
        energy = squares.masked_fill(~newest[:, None, columns, None], 0.0).sum(2)
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
        row = row_of(self.starts)
        old = self.positions < self.pruned_until[:, -1][row // self.tail_k.shape[1]]
        lengths = torch.zeros_like(self.starts[1:]).index_add_(0, row, old.long())
        self.pruned_positions, self.pruned_v = self.positions[old], self.values[old]
        self.pruned_starts, self.pruned_entries = starts_of(lengths), int(old.sum())
        channels = self._channels_of(self.pruned_positions, self.pruned_starts)
        self.pruned_k = self.keys[old].gather(1, channels)
        self.starts = starts_of(self.starts.diff() - lengths)  # the whole tokens that are left
        self.keys, self.values, self.positions = self.keys[~old], self.values[~old], self.positions[~old]
        self.kept_entries -= self.pruned_entries

    def _choose_channels(self, pending: PendingPruning) -> None:
        """Add a pruning, unless every sequence goes on with the channels that it has.

        A channel's worth is the energy of the queries in it times that of the keys that are pruned anew.
        """
        b, h = self.tail_k.shape[:2]
        row = row_of(self.starts)
        before = self.pruned_until[:, -1] if self.prunings else self._first_positions().view(-1).int()
        new = (self.positions >= before[row // h]) & (self.positions < pending.until[row // h])
        key_energy = torch.zeros(b * h, self.keys.shape[-1], device=self.device).index_add_(
            0, row[new], self.keys[new].float().square()
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
