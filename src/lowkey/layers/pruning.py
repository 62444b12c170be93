"""An evicting layer whose kept keys lose their weakest channels (ThinK, arXiv:2407.21018); the channels are really gone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowkey.layers.evicting import Candidates, EvictingLayer
from lowkey.layers.undoing import storage_bytes
from lowkey.ops.ragged import row_of
from lowkey.seam import Call
from lowkey.types import Budget


class PruningLayer(EvictingLayer):
    """Keys of the rows have r < d channels, each head its own: channels (b, h, r), chosen at the first eviction and kept. The newest tokens
    stay whole, in the tail, until they join the rows. It stores no low rank.
    """

    channels: Tensor
    policy: Any  # with `channels`, the share of them that stays, and `looked`, how many of the newest queries choose

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        b, h = key_states.shape[:2]
        self.channels = torch.zeros(b, h, 0, dtype=torch.int16, device=self.device)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | ({"channels": self.channels} if self.is_initialized else {})

    def predicted_nbytes(self) -> int:
        return super().predicted_nbytes() + (self.channels.numel() * self.channels.element_size() if self.is_initialized else 0)

    def _waiting_bytes(self) -> int:
        return super()._waiting_bytes() + (storage_bytes([self.loud]) if hasattr(self, "loud") else 0)

    @property
    def share(self) -> float:
        """Of the key channels. A budget is of bytes: as long as dropping channels is enough, every token stays."""
        budget = Budget.parse(self.policy.budget)
        return max(self.policy.channels, 2 * budget.amount / 100 - 1) if budget.unit == "%" else self.policy.channels

    def mean_tokens(self, tokens: int) -> float:
        return super().mean_tokens(tokens) * (2 / (1 + self.share) if Budget.parse(self.policy.budget).unit == "%" else 1)

    def narrowed(self, x: Tensor) -> Tensor:
        if not self.channels.shape[2]:
            return x
        return x.gather(3, self.channels.long().unsqueeze(2).expand(-1, -1, x.shape[2], -1))

    def widened(self, keys: Tensor) -> Tensor:
        if not self.channels.shape[2]:
            return keys
        wide = keys.new_zeros(len(keys), self.tail_k.shape[-1])
        return wide.scatter_(1, self._channel_of_each(), keys)

    def _evict(self, call: Call, found: Candidates, repeating: Tensor | None = None) -> None:
        queries = torch.cat([self.asked, call.query], 3) if self.asked.numel() else call.query
        self.loud = queries[:, :, :, -self.policy.looked :].float().square().mean((2, 3))  # (b, h, d)
        super()._evict(call, found, repeating)

    def keep(self, found: Candidates, scores: Tensor, counts: Tensor) -> None:
        """As any evicting layer; then the newest tokens move to the tail and the other keys lose channels."""
        chosen_before = self.channels
        self.channels = self.channels[:, :, :0]
        super().keep(found, scores, counts)
        self._newest_to_tail(min(self.policy.recent, int(counts.min())))
        self.channels = chosen_before if chosen_before.shape[2] else self._choose()
        del self.loud
        if self.channels.shape[2]:
            self.keys = self.keys.gather(1, self._channel_of_each())

    def _newest_to_tail(self, tokens: int) -> None:
        b, h = self.tail_k.shape[:2]
        last = (self.starts[1:].unsqueeze(1) - tokens + torch.arange(tokens, device=self.device)).flatten()
        self.tail_k, self.tail_v = (x[last].view(b, h, tokens, x.shape[-1]) for x in (self.keys, self.values))
        stay = torch.ones(len(self.keys), dtype=torch.bool, device=self.device)
        stay[last] = False
        self.keys, self.values, self.where = self.keys[stay], self.values[stay], self.where[stay]
        self.starts = self.starts - torch.arange(b * h + 1, device=self.device) * tokens
        self.fresh, self.moved, self.kept = tokens, tokens, self.kept - b * h * tokens

    def _choose(self) -> Tensor:
        """(b, h, r): the channels in which queries and kept keys are largest together (Eq. 5, its greedy solution), ascending."""
        b, h, _, d = self.tail_k.shape
        count = round(self.share * d)
        if count == d or not len(self.keys):
            return self.channels
        sums = torch.zeros(b * h, d, device=self.device).index_add_(0, row_of(self.starts), self.keys.float().square())
        return (self.loud * sums.view(b, h, d)).topk(count, dim=-1).indices.sort(-1).values.short()

    def _channel_of_each(self) -> Tensor:
        """(n, r): the channels of every kept token."""
        return self.channels.flatten(0, 1).long()[row_of(self.starts)]
