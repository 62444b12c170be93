"""An evicting layer whose kept keys lose their weakest channels (ThinK, arXiv:2407.21018); the channels are
really gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowkey.backends.ragged import ragged
from lowkey.backends.segment import Part
from lowkey.models.attention_interface import Call
from lowkey.ops.ragged import pad_rows, row_of, starts_of
from lowkey.storage.budgets import EvictionCosts
from lowkey.storage.evicting import Candidates, EvictingLayer
from lowkey.storage.rollback import storage_bytes


class PruningLayer(EvictingLayer):
    """Held besides: pruned_k (m, r) with r < d, pruned_v (m, d), pruned_positions (m), pruned_starts (b h + 1): tokens,
    row after row, whose keys have lost channels. channels (b, p, h, r): those that each of p prunings left;
    until (b, p): the position up to which it went in a row; sure (b, 1): whether the newest was chosen by
    enough queries to serve again.

    An eviction prunes the keys that it keeps, but for the newest `recent` of each row, if the row does not
    fit whole. What came since is whole, and so is all that a frozen layer is given. Each pruning chooses by
    its own queries and keys; a few queries, as of decode steps, reuse the choice before. It stores no low
    rank.
    """

    pruned_k: Tensor
    pruned_v: Tensor
    pruned_positions: Tensor
    pruned_starts: Tensor
    kept_channels: Tensor
    pruned_until: Tensor
    choice_is_firm: Tensor
    # with `channels`, the share of them that stays, and `looked`, how many of the newest queries choose
    policy: Any
    saved_counters = (*EvictingLayer.saved_counters, "pruned_entries", "prunings")
    pruned_entries = prunings = 0
    pending: tuple[Tensor, Tensor, Tensor] | None = None  # within a call: what `keep` will prune by

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        b, h = key_states.shape[:2]
        self.pruned_k, self.pruned_v = self.keys.new_empty(0, self.channel_count), self.values.clone()
        self.pruned_positions, self.pruned_starts = self.positions.clone(), self.starts.clone()
        self.kept_channels = torch.zeros(b, 0, h, self.channel_count, dtype=torch.int16, device=self.device)
        self.pruned_until = torch.zeros(b, 0, dtype=torch.int32, device=self.device)
        self.choice_is_firm = torch.zeros(b, 1, dtype=torch.bool, device=self.device)

    def tensors(self) -> dict[str, Tensor]:
        more = (
            "pruned_k",
            "pruned_v",
            "pruned_positions",
            "pruned_starts",
            "kept_channels",
            "pruned_until",
            "choice_is_firm",
        )
        return super().tensors() | (
            {name: getattr(self, name) for name in more} if self.is_initialized else {}
        )

    def ragged(self) -> dict[str, tuple[str, ...]]:
        return super().ragged() | {"pruned_starts": ("pruned_k", "pruned_v", "pruned_positions")}

    def select_sequences(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().select_sequences(choose)
        self.pruned_entries = len(self.pruned_k) if self.is_initialized else 0

    def index_bytes(self) -> int:
        b, h = self.tail_k.shape[:2]
        return (
            super().index_bytes()
            + (b * h + 1) * self.pruned_starts.element_size()
            + b
            + self.prunings * self._pruning_bytes()
        )

    def _pruning_bytes(self) -> int:
        """What it takes to know the channels of one pruning."""
        b, h = self.tail_k.shape[:2]
        return b * (
            h * self.channel_count * self.kept_channels.element_size() + self.pruned_until.element_size()
        )

    def predicted_nbytes(self) -> int:
        return super().predicted_nbytes() + (
            self.pruned_entries * self.pruned_entry_bytes if self.is_initialized else 0
        )

    def _waiting_bytes(self) -> int:
        return super()._waiting_bytes() + storage_bytes(self.pending or ())

    @property
    def channel_share(self) -> float:
        """Of the channels, that stays. A budget is of bytes: no more are dropped than is needed for every
        token to stay.
        """
        budget = self.policy.budget
        return (
            max(self.policy.channels, 2 * budget.amount / 100 - 1)
            if self._in_percent()
            else self.policy.channels
        )

    def _in_percent(self) -> bool:
        return self.policy.budget is not None and self.policy.budget.unit == "%"

    @property
    def channel_count(self) -> int:
        """r"""
        return max(1, round(self.channel_share * self.keys.shape[-1]))

    @property
    def pruned_entry_bytes(self) -> int:
        """What a token without its weakest channels takes."""
        return self.entry_bytes - (self.keys.shape[-1] - self.channel_count) * self.keys.element_size()

    def costs(self, tokens: Tensor) -> EvictionCosts:
        """With one more pruning, and the recent tokens whole."""
        whole = super().costs(tokens)
        fixed = whole.fixed + self.cache_eviction.layers * self._pruning_bytes() / whole.rows
        return replace(
            whole,
            entry=self.pruned_entry_bytes,
            fixed=fixed,
            whole=self.entry_bytes - self.pruned_entry_bytes,
        )

    def tokens_per_head(self, tokens: int) -> float:
        """A percentage is of keys and values alone."""
        share = self.channel_share if self._in_percent() and not self._fits(tokens) else 1
        return super().tokens_per_head(tokens) * 2 / (1 + share)

    def _fits(self, tokens: int) -> bool:
        """Whether a row of so many tokens needs no pruning."""
        if self.channel_count == self.keys.shape[-1]:
            return True
        if self.policy.budget is None or self.policy.budget.unit in ("%", "tokens"):
            return super().tokens_per_head(tokens) >= tokens
        return super().costs(self.tokens_seen()).pay(self.policy, tokens) >= tokens

    def kept_positions(self, row: int) -> list[Tensor]:
        h = self.tail_k.shape[1]
        edges = self.pruned_starts[row * h : (row + 1) * h + 1].tolist()
        whole = super().kept_positions(row)
        return [
            torch.cat([self.pruned_positions[a:b].long(), x])
            for a, b, x in zip(edges[:-1], edges[1:], whole, strict=True)
        ]

    # -- attending

    def _stored_parts(self, call: Call, stop: int) -> list[Part]:
        parts = super()._stored_parts(call, stop)
        if not self.pruned_entries:
            return parts
        query, keys = call.query.flatten(2, 3), self.pruned_k
        if self.prunings == 1:
            query = query.gather(
                3, self.kept_channels[:, 0].long().unsqueeze(2).expand(-1, -1, query.shape[2], -1)
            )
        else:
            keys = self._widened()
        out, lse = ragged(
            query.flatten(0, 1), keys, self.pruned_v, self.pruned_starts, call.scaling, call.softcap
        )
        return [*parts, (out.view(*call.query.shape[:4], -1), lse.view(call.query.shape[:4]))]

    def _widened(self) -> Tensor:
        """Keys (m, d) with zeros for what they lost."""
        wide = self.pruned_k.new_zeros(self.pruned_entries, self.keys.shape[-1])
        return wide.scatter_(1, self._channels_of(self.pruned_positions, self.pruned_starts), self.pruned_k)

    def _channels_of(self, where: Tensor, starts: Tensor) -> Tensor:
        """(m, r): the channels of pruned tokens at these positions."""
        row = row_of(starts)
        sequence = row // self.tail_k.shape[1]
        pruning = (where.unsqueeze(1) >= self.pruned_until[sequence]).sum(1)
        return self.kept_channels[sequence, pruning, row % self.tail_k.shape[1]].long()

    # -- evicting

    def _stored_candidates(self, stop: int) -> Candidates:
        """Pruned tokens come first: they are older."""
        whole = super()._stored_candidates(stop)
        shape = self.tail_k.shape[:2]
        keys, values, positions = (
            pad_rows(x, self.pruned_starts)[0].unflatten(0, shape)
            for x in (self._widened(), self.pruned_v, self.pruned_positions.long())
        )
        real = pad_rows(self.pruned_positions, self.pruned_starts)[1].unflatten(0, shape)
        thin = Candidates(keys, values, positions, real, torch.zeros_like(real, dtype=torch.float32))
        return Candidates(
            *(torch.cat(pair, 2) for pair in zip(vars(thin).values(), vars(whole).values(), strict=True))
        )

    def _evict(self, call: Call, found: Candidates, repeating: Tensor | None = None) -> None:
        tokens = self.tokens_seen()
        if not self.frozen and not all(self._fits(n) for n in tokens.tolist()):
            self.pending = self._pruning(call, found, tokens)
        super()._evict(call, found, repeating)

    def _pruning(self, call: Call, found: Candidates, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(up to where each row is pruned (b), the energy of its newest queries (b, h, d), of how many these
        are (b))
        """
        before = self.pruned_until[:, -1].long() if self.prunings else self._first_positions().view(-1)
        fits = self.decoding_rows(call.query.shape[3]) | torch.tensor(
            [self._fits(n) for n in tokens.tolist()], device=self.device
        )
        stop = before.maximum(self._first_positions().view(-1) + tokens - self.policy.recent)
        context = self._context(call, found, None)
        newest = context.newest_query_positions(self.policy.looked) >= 0
        some = newest.any(0)
        queries = context.queries[:, :, :, some].float().square().sum(2)
        energy = queries.masked_fill(~newest[:, None, some, None], 0.0).sum(2)
        return before.where(fits, stop), energy, newest.sum(1)

    def keep_best(self, found: Candidates, scores: Tensor, counts: Tensor) -> None:
        """As any evicting layer; then keys that are not among the newest lose channels."""
        super().keep_best(found, scores, counts)
        about, self.pending = self.pending, None
        if about is not None:
            self._choose(*about)
        if not self.prunings:
            return
        row = row_of(self.starts)
        old = self.positions < self.pruned_until[:, -1][row // self.tail_k.shape[1]]
        lengths = torch.zeros_like(self.starts[1:]).index_add_(0, row, old.long())
        self.pruned_positions, self.pruned_v, self.pruned_starts, self.pruned_entries = (
            self.positions[old],
            self.values[old],
            starts_of(lengths),
            int(old.sum()),
        )
        self.pruned_k = self.keys[old].gather(1, self._channels_of(self.pruned_positions, self.pruned_starts))
        self.starts = starts_of(self.starts.diff() - lengths)
        self.keys, self.values, self.positions = self.keys[~old], self.values[~old], self.positions[~old]
        self.kept_entries -= self.pruned_entries

    def _choose(self, stop: Tensor, energy: Tensor, looked: Tensor) -> None:
        """Add a pruning up to `stop`, unless every row goes on with the channels that it has."""
        b, h = self.tail_k.shape[:2]
        row = row_of(self.starts)
        before = self.pruned_until[:, -1] if self.prunings else self._first_positions().view(-1).int()
        at = self.positions
        new = (at >= before[row // h]) & (at < stop[row // h])
        sums = torch.zeros(b * h, self.keys.shape[-1], device=self.device).index_add_(
            0, row[new], self.keys[new].float().square()
        )
        chosen = (
            (energy * sums.view(b, h, -1)).topk(self.channel_count, dim=-1).indices.sort(-1).values.short()
        )
        again = self.choice_is_firm[:, 0] & (looked < self.policy.looked)
        if self.prunings and bool(again.all()):
            self.pruned_until = torch.cat([self.pruned_until[:, :-1], stop.int().unsqueeze(1)], 1)
            return
        if self.prunings:
            chosen = torch.where(again[:, None, None], self.kept_channels[:, -1], chosen)
        self.kept_channels = torch.cat([self.kept_channels, chosen.unsqueeze(1)], 1)
        self.pruned_until = torch.cat([self.pruned_until, stop.int().unsqueeze(1)], 1)
        self.choice_is_firm = self.choice_is_firm | (
            (looked >= self.policy.looked) & (stop > before)
        ).unsqueeze(1)
        self.prunings += 1

    def reset(self) -> None:
        super().reset()
        self.pruned_entries = self.prunings = 0
        self.pending = None
