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
from lowkey.ops.ragged import padded, row_of, starts_of
from lowkey.storage.budgets import EvictionCosts
from lowkey.storage.evicting import Candidates, EvictingLayer
from lowkey.storage.rollback import storage_bytes


class PruningLayer(EvictingLayer):
    """Held besides: thin_k (m, r) with r < d, thin_v (m, d), thin_where (m), thin_starts (b h + 1): tokens,
    row after row, whose keys have lost channels. channels (b, p, h, r): those that each of p prunings left;
    until (b, p): the position up to which it went in a row; sure (b, 1): whether the newest was chosen by
    enough queries to serve again.

    An eviction prunes the keys that it keeps, but for the newest `recent` of each row, if the row does not
    fit whole. What came since is whole, and so is all that a frozen layer is given. Each pruning chooses by
    its own queries and keys; a few queries, as of decode steps, reuse the choice before. It stores no low
    rank.
    """

    thin_k: Tensor
    thin_v: Tensor
    thin_where: Tensor
    thin_starts: Tensor
    channels: Tensor
    until: Tensor
    sure: Tensor
    # with `channels`, the share of them that stays, and `looked`, how many of the newest queries choose
    policy: Any
    numbers = (*EvictingLayer.numbers, "thin", "prunings")
    thin = prunings = 0
    about: tuple[Tensor, Tensor, Tensor] | None = None  # within a call: what `keep` will prune by

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        b, h = key_states.shape[:2]
        self.thin_k, self.thin_v = self.keys.new_empty(0, self.width), self.values.clone()
        self.thin_where, self.thin_starts = self.where.clone(), self.starts.clone()
        self.channels = torch.zeros(b, 0, h, self.width, dtype=torch.int16, device=self.device)
        self.until = torch.zeros(b, 0, dtype=torch.int32, device=self.device)
        self.sure = torch.zeros(b, 1, dtype=torch.bool, device=self.device)

    def tensors(self) -> dict[str, Tensor]:
        more = ("thin_k", "thin_v", "thin_where", "thin_starts", "channels", "until", "sure")
        return super().tensors() | (
            {name: getattr(self, name) for name in more} if self.is_initialized else {}
        )

    def ragged(self) -> dict[str, tuple[str, ...]]:
        return super().ragged() | {"thin_starts": ("thin_k", "thin_v", "thin_where")}

    def pick(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().pick(choose)
        self.thin = len(self.thin_k) if self.is_initialized else 0

    def index_bytes(self) -> int:
        b, h = self.tail_k.shape[:2]
        return (
            super().index_bytes()
            + (b * h + 1) * self.thin_starts.element_size()
            + b
            + self.prunings * self._pruning_bytes()
        )

    def _pruning_bytes(self) -> int:
        """What it takes to know the channels of one pruning."""
        b, h = self.tail_k.shape[:2]
        return b * (h * self.width * self.channels.element_size() + self.until.element_size())

    def predicted_nbytes(self) -> int:
        return super().predicted_nbytes() + (self.thin * self.thin_bytes if self.is_initialized else 0)

    def _waiting_bytes(self) -> int:
        return super()._waiting_bytes() + storage_bytes(self.about or ())

    @property
    def share(self) -> float:
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
    def width(self) -> int:
        """r"""
        return max(1, round(self.share * self.keys.shape[-1]))

    @property
    def thin_bytes(self) -> int:
        """What a token without its weakest channels takes."""
        return self.entry_bytes - (self.keys.shape[-1] - self.width) * self.keys.element_size()

    def costs(self, tokens: Tensor) -> EvictionCosts:
        """With one more pruning, and the recent tokens whole."""
        whole = super().costs(tokens)
        fixed = whole.fixed + self.round.layers * self._pruning_bytes() / whole.rows
        return replace(whole, entry=self.thin_bytes, fixed=fixed, whole=self.entry_bytes - self.thin_bytes)

    def mean_tokens(self, tokens: int) -> float:
        """A percentage is of keys and values alone."""
        share = self.share if self._in_percent() and not self._fits(tokens) else 1
        return super().mean_tokens(tokens) * 2 / (1 + share)

    def _fits(self, tokens: int) -> bool:
        """Whether a row of so many tokens needs no pruning."""
        if self.width == self.keys.shape[-1]:
            return True
        if self.policy.budget is None or self.policy.budget.unit in ("%", "tokens"):
            return super().mean_tokens(tokens) >= tokens
        return super().costs(self.tokens()).pay(self.policy, tokens) >= tokens

    def kept_positions(self, row: int) -> list[Tensor]:
        h = self.tail_k.shape[1]
        edges = self.thin_starts[row * h : (row + 1) * h + 1].tolist()
        whole = super().kept_positions(row)
        return [
            torch.cat([self.thin_where[a:b].long(), x])
            for a, b, x in zip(edges[:-1], edges[1:], whole, strict=True)
        ]

    # -- attending

    def _stored_parts(self, call: Call, stop: int) -> list[Part]:
        parts = super()._stored_parts(call, stop)
        if not self.thin:
            return parts
        query, keys = call.query.flatten(2, 3), self.thin_k
        if self.prunings == 1:
            query = query.gather(
                3, self.channels[:, 0].long().unsqueeze(2).expand(-1, -1, query.shape[2], -1)
            )
        else:
            keys = self._widened()
        out, lse = ragged(
            query.flatten(0, 1), keys, self.thin_v, self.thin_starts, call.scaling, call.softcap
        )
        return [*parts, (out.view(*call.query.shape[:4], -1), lse.view(call.query.shape[:4]))]

    def _widened(self) -> Tensor:
        """Keys (m, d) with zeros for what they lost."""
        wide = self.thin_k.new_zeros(self.thin, self.keys.shape[-1])
        return wide.scatter_(1, self._channels_of(self.thin_where, self.thin_starts), self.thin_k)

    def _channels_of(self, where: Tensor, starts: Tensor) -> Tensor:
        """(m, r): the channels of pruned tokens at these positions."""
        row = row_of(starts)
        sequence = row // self.tail_k.shape[1]
        pruning = (where.unsqueeze(1) >= self.until[sequence]).sum(1)
        return self.channels[sequence, pruning, row % self.tail_k.shape[1]].long()

    # -- evicting

    def _padded(self, stop: int) -> Candidates:
        """Pruned tokens come first: they are older."""
        whole = super()._padded(stop)
        shape = self.tail_k.shape[:2]
        keys, values, positions = (
            padded(x, self.thin_starts)[0].unflatten(0, shape)
            for x in (self._widened(), self.thin_v, self.thin_where.long())
        )
        real = padded(self.thin_where, self.thin_starts)[1].unflatten(0, shape)
        thin = Candidates(keys, values, positions, real, torch.zeros_like(real, dtype=torch.float32))
        return Candidates(
            *(torch.cat(pair, 2) for pair in zip(vars(thin).values(), vars(whole).values(), strict=True))
        )

    def _evict(self, call: Call, found: Candidates, repeating: Tensor | None = None) -> None:
        tokens = self.tokens()
        if not self.frozen and not all(self._fits(n) for n in tokens.tolist()):
            self.about = self._pruning(call, found, tokens)
        super()._evict(call, found, repeating)

    def _pruning(self, call: Call, found: Candidates, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(up to where each row is pruned (b), the energy of its newest queries (b, h, d), of how many these
        are (b))
        """
        before = self.until[:, -1].long() if self.prunings else self._begins().view(-1)
        fits = self.steps_of(call.query.shape[3]) | torch.tensor(
            [self._fits(n) for n in tokens.tolist()], device=self.device
        )
        stop = before.maximum(self._begins().view(-1) + tokens - self.policy.recent)
        context = self._context(call, found, None)
        newest = context.newest_query_positions(self.policy.looked) >= 0
        some = newest.any(0)
        queries = context.queries[:, :, :, some].float().square().sum(2)
        energy = queries.masked_fill(~newest[:, None, some, None], 0.0).sum(2)
        return before.where(fits, stop), energy, newest.sum(1)

    def keep(self, found: Candidates, scores: Tensor, counts: Tensor) -> None:
        """As any evicting layer; then keys that are not among the newest lose channels."""
        super().keep(found, scores, counts)
        about, self.about = self.about, None
        if about is not None:
            self._choose(*about)
        if not self.prunings:
            return
        row = row_of(self.starts)
        old = self.where < self.until[:, -1][row // self.tail_k.shape[1]]
        lengths = torch.zeros_like(self.starts[1:]).index_add_(0, row, old.long())
        self.thin_where, self.thin_v, self.thin_starts, self.thin = (
            self.where[old],
            self.values[old],
            starts_of(lengths),
            int(old.sum()),
        )
        self.thin_k = self.keys[old].gather(1, self._channels_of(self.thin_where, self.thin_starts))
        self.starts = starts_of(self.starts.diff() - lengths)
        self.keys, self.values, self.where = self.keys[~old], self.values[~old], self.where[~old]
        self.kept -= self.thin

    def _choose(self, stop: Tensor, energy: Tensor, looked: Tensor) -> None:
        """Add a pruning up to `stop`, unless every row goes on with the channels that it has."""
        b, h = self.tail_k.shape[:2]
        row = row_of(self.starts)
        before = self.until[:, -1] if self.prunings else self._begins().view(-1).int()
        at = self.where
        new = (at >= before[row // h]) & (at < stop[row // h])
        sums = torch.zeros(b * h, self.keys.shape[-1], device=self.device).index_add_(
            0, row[new], self.keys[new].float().square()
        )
        chosen = (energy * sums.view(b, h, -1)).topk(self.width, dim=-1).indices.sort(-1).values.short()
        again = self.sure[:, 0] & (looked < self.policy.looked)
        if self.prunings and bool(again.all()):
            self.until = torch.cat([self.until[:, :-1], stop.int().unsqueeze(1)], 1)
            return
        if self.prunings:
            chosen = torch.where(again[:, None, None], self.channels[:, -1], chosen)
        self.channels = torch.cat([self.channels, chosen.unsqueeze(1)], 1)
        self.until = torch.cat([self.until, stop.int().unsqueeze(1)], 1)
        self.sure = self.sure | ((looked >= self.policy.looked) & (stop > before)).unsqueeze(1)
        self.prunings += 1

    def reset(self) -> None:
        super().reset()
        self.thin = self.prunings = 0
        self.about = None
