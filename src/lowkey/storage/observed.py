"""The cache of a small model that reads along (`lowkey.policies.smallkv`): it keeps all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowkey.backends import grouped
from lowkey.backends.segment import Segment, softcapped
from lowkey.core.types import LowkeyError
from lowkey.models.attention_interface import Call
from lowkey.ops.matching import top_tokens
from lowkey.ops.precision import for_products
from lowkey.policies.base import block_of_queries
from lowkey.storage.attention_recording import attend_to_prompt
from lowkey.storage.base import StockSlidingLayer, StoringLayer


class ObservedLayer(StoringLayer):
    """Stores all tokens of a small model as they are, with what is asked about its attention.

    Args:
        policy: says what will be asked: `window`, `matched_queries` and `matched_share` of `SmallKVTokens`.

    Attributes:
        keys: (b, h, s, d).
        values: (b, h, s, d).
        queries: (b, h, g, w, d), the newest w.
        sums: (b, h, g, s) in fp32, the attention that tokens got from all queries; (b, h, g, 0) if the policy
            looks at a window of queries.
        top: (b, h g, k), the tokens of most attention of each head; none behind the matching of heads.
        matched: whether the heads of the large model have been matched.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    sums: Tensor
    top: Tensor
    scaling = 1.0
    softcap: float | None = None
    groups = 0

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy, self.matched = policy, False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty tensors for this batch size, device and dtype."""
        self.device = key_states.device
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        b, h, _, d = key_states.shape
        self.queries = key_states.new_empty(b, h, 0, 0, d)
        self.sums = key_states.new_empty(b, h, 0, 0, dtype=torch.float32)
        self.top = torch.zeros(b, 0, 0, dtype=torch.int32, device=self.device)
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are held, by attribute name."""
        if not self.is_initialized:
            return {}
        return {name: getattr(self, name) for name in ("keys", "values", "queries", "sums", "top")}

    def growing_dims(self) -> dict[str, int]:
        """Keys and values grow along the tokens; the others are replaced."""
        return {"keys": 2, "values": 2} if self.is_initialized else {}

    def predicted_nbytes(self) -> int:
        """The bytes of all keys and values, of the newest queries, and of what was summed and found."""
        if not self.is_initialized:
            return 0
        return self._bytes(self.queries.shape[3], self.top.shape[2])

    def matched_nbytes(self) -> int:
        """The bytes that will be held once the heads have been matched."""
        return self._bytes(min(self.seen, max(self.policy.window, 1)), 0) if self.is_initialized else 0

    def _bytes(self, queries: int, top: int) -> int:
        """The bytes with so many newest queries, and so many tokens of most attention."""
        b, h, _, d = self.keys.shape
        numbers = 2 * self.seen + self.groups * queries
        others = self.groups * (top + (0 if self.policy.window else self.seen))
        return b * h * (d * numbers * self.keys.element_size() + 4 * others)

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Store the new tokens and queries, and answer the call.

        Raises:
            LowkeyError: for a mask: padding has no place here.
        """
        if call.mask is not None:
            raise LowkeyError(
                "attention_mask: a small model reads along only without padding; give rows of one length, or "
                "a cache for each"
            )
        b, h, g, t, _ = call.query.shape
        begins = not self.keys.shape[2]
        # new tensors: writing in place would change what a snapshot of the layer holds
        self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.scaling, self.softcap, self.groups = call.scaling, call.softcap, g
        old = self.queries if self.queries.shape[2] else self.queries.new_empty(b, h, g, 0, keys.shape[3])
        self.queries = torch.cat([old, call.query], 3)[:, :, :, -self._queries_held(t, begins) :].clone()
        if not self.policy.window:
            sums = self.sums if self.sums.shape[2] else self.sums.new_zeros(b, h, g, 0)
            self.sums = pad(sums, (0, t)) + self._summed(call.query)
        if not self.matched:
            looked = self._summed(self.queries[:, :, :, -self.policy.matched_queries :])
            self.top = top_tokens(looked.flatten(1, 2), self.policy.matched_share)
        if begins and t > 1 and call.softcap is None:
            return attend_to_prompt(keys, values, call)
        segment = Segment(call.query, self.keys, self.values, call.full_mask(self.seen))
        return grouped.attend([segment], call.scaling, call.softcap)

    def _queries_held(self, t: int, begins: bool) -> int:
        """How many of the newest queries are held behind a call of t tokens."""
        asked = t if self.policy.holds_values and not begins else 1
        return max(self.policy.window, asked, 0 if self.matched else self.policy.matched_queries)

    def forget(self, matched: bool) -> None:
        """Drop what nobody will ask for behind a call, given whether heads have been matched."""
        if not self.is_initialized:
            return
        if matched and not self.matched:
            self.matched, self.top = True, self.top[:, :, :0].clone()
        held = max(self.policy.window, 1, 0 if self.matched else self.policy.matched_queries)
        if self.queries.shape[3] > held:
            self.queries = self.queries[:, :, :, -held:].clone()

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.matched, self.groups = False, 0

    def _summed(self, queries: Tensor) -> Tensor:
        """The attention (b, h, g, s) that the newest queries (b, h, g, w, d) pay, summed over them."""
        b, h, g, w, _ = queries.shape
        keys, total = for_products(self.keys).mT, self.keys.new_zeros(b, h, g, self.seen, dtype=torch.float32)
        step = block_of_queries(b * h * g * self.seen, self.device)
        for start in range(0, w, step):
            block = for_products(queries[:, :, :, start : start + step])
            stop = self.seen - w + start + block.shape[3]
            products = (block.flatten(2, 3) @ keys[..., :stop]).float().unflatten(2, block.shape[2:4])
            total[..., :stop] += self._weights(products).sum(3)
        return total

    def _weights(self, products: Tensor) -> Tensor:
        """Attention weights (..., w, n) from the products of the w queries of the newest of n tokens."""
        w, n = products.shape[-2:]
        logits = softcapped(products * self.scaling, self.softcap)
        later = torch.ones(w, n, dtype=torch.bool, device=logits.device).triu(n - w + 1)
        return logits.masked_fill_(later, -torch.inf).softmax(-1)

    def weights(self, sequence: Tensor, head: Tensor, count: int) -> Tensor:
        """Attention weights of the newest queries of some heads.

        Args:
            sequence: (p), their sequences.
            head: (p), their numbers among the query heads.
            count: how many queries.

        Returns:
            (p, count, s) in fp32.
        """
        kv, group = head // self.groups, head % self.groups
        queries = for_products(self.queries[:, :, :, -count:][sequence, kv, group])
        return self._weights((queries @ for_products(self.keys[sequence, kv]).mT).float())


@dataclass(frozen=True)
class Observed:
    """The attention of a small model over all its layers. Heads are numbered through, layer by layer.

    Args:
        layers: of its cache.
        beside: further layers of it, whose windows slide.
    """

    layers: Sequence[ObservedLayer] = ()
    beside: Sequence[StockSlidingLayer] = ()

    @classmethod
    def of(cls, layers: Sequence[object]) -> Observed:
        """What is observed of the layers of a cache."""
        return cls(
            tuple(layer for layer in layers if isinstance(layer, ObservedLayer)),
            tuple(layer for layer in layers if isinstance(layer, StockSlidingLayer)),
        )

    @property
    def seen(self) -> int:
        """The number of tokens that the small model has read."""
        return self.layers[0].seen if self.layers else 0

    def nbytes(self, matched: bool) -> int:
        """The bytes of the small model's cache: those that are held, or will be once heads are `matched`."""
        own = (layer.matched_nbytes() if matched else layer.nbytes() for layer in self.layers)
        return sum(own) + sum(layer.nbytes() for layer in self.beside)

    def top(self) -> Tensor:
        """The tokens of most attention (b, S, k) of all heads."""
        return torch.cat([layer.top for layer in self.layers], 1)

    def attention(self, heads: Tensor, window: int) -> Tensor:
        """What chosen heads attend to, summed over queries.

        Args:
            heads: (b, H), their numbers.
            window: how many newest queries are summed; 0 for all.

        Returns:
            (b, H, s) in fp32.
        """
        if window:
            return self.weights(heads, min(window, self.layers[0].queries.shape[3])).sum(2)
        sums = torch.cat([layer.sums.flatten(1, 2).to(heads.device) for layer in self.layers], 1)
        return sums.gather(1, heads.long().unsqueeze(2).expand(-1, -1, sums.shape[2]))

    def weights(self, heads: Tensor, count: int) -> Tensor:
        """The attention weights (b, H, count, s) of the newest queries of chosen heads (b, H)."""
        out = torch.zeros(*heads.shape, count, self.seen, device=heads.device)
        first = 0
        for layer in self.layers:
            own = layer.keys.shape[1] * layer.groups
            sequence, place = ((heads >= first) & (heads < first + own)).nonzero(as_tuple=True)
            if len(place):
                number = (heads[sequence, place] - first).to(layer.device)
                found = layer.weights(sequence.to(layer.device), number, count)
                out[sequence, place] = found.to(out.device)
            first += own
        return out
