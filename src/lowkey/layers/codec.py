"""The form in which keys and values are stored, and how a query meets it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowkey.families import Rope
from lowkey.ops.ragged import row_of
from lowkey.ops.rope import rotate, unrotate
from lowkey.types import Factors, Layout


class Codec(Protocol):
    """encode: keys and values (b, h, t, d) at positions (b, t) -> stored forms (b, h, t, r).
    readable: stored keys (b, h, s, r) at positions (b, h|1, s) -> what queries are scored against; readable_rows: the same for keys
    (n, r) of rows of different length, given each one's position (n), where rows start (b h + 1), and h.
    query, out: (b, h, g, t, d) to and from the stored basis.
    keys, values: readable keys and stored values -> (b, h, s, d) as the model made them, as nearly as is known.
    """

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]: ...
    def readable(self, stored: Tensor, positions: Tensor) -> Tensor: ...
    def readable_rows(self, stored: Tensor, positions: Tensor, starts: Tensor, heads: int) -> Tensor: ...
    def query(self, query: Tensor) -> Tensor: ...
    def out(self, out: Tensor) -> Tensor: ...
    def keys(self, readable: Tensor) -> Tensor: ...
    def values(self, stored: Tensor) -> Tensor: ...
    def like(self, states: Tensor) -> Codec: ...


@dataclass(frozen=True)
class Plain:
    """As the model made them."""

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values

    def readable(self, stored: Tensor, positions: Tensor) -> Tensor:
        return stored

    def readable_rows(self, stored: Tensor, positions: Tensor, starts: Tensor, heads: int) -> Tensor:
        return stored

    def query(self, query: Tensor) -> Tensor:
        return query

    def out(self, out: Tensor) -> Tensor:
        return out

    def keys(self, readable: Tensor) -> Tensor:
        return readable

    def values(self, stored: Tensor) -> Tensor:
        return stored

    def like(self, states: Tensor) -> Plain:
        return self


@dataclass(frozen=True)
class LowRank:
    """Keys in rank r_K, values in rank r_V.

    `post_rope`: rotated keys are projected and the query is carried into their basis; nothing is expanded back.
    `pre_rope`: keys are stored unrotated, and expanded and rotated at their own positions when read (arXiv:2408.05646, whose published
    decoding rotates the whole history at the current position).
    """

    factors: Factors
    layout: Layout
    rope: Rope

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.layout == "pre_rope":
            cos, sin = self.rope(positions, keys)
            keys = unrotate(keys.float(), cos, sin).to(keys.dtype)
        return keys @ self.factors.k_down, values @ self.factors.v_down

    def readable(self, stored: Tensor, positions: Tensor) -> Tensor:
        if self.layout == "post_rope":
            return stored
        cos, sin = (x.squeeze(1).unflatten(0, positions.shape[:2]) for x in self.rope(positions.flatten(0, 1), stored))
        return rotate((stored @ self.factors.k_up).float(), cos, sin).to(stored.dtype)

    def readable_rows(self, stored: Tensor, positions: Tensor, starts: Tensor, heads: int) -> Tensor:
        if self.layout == "post_rope":
            return stored
        up = self.factors.k_up
        expanded, head = stored.new_empty(len(stored), up.shape[-1]), row_of(starts) % heads
        for j, matrix in enumerate(up):
            own = head == j if len(up) > 1 else slice(None)
            expanded[own] = stored[own] @ matrix
        cos, sin = (x[0, 0] for x in self.rope(positions.unsqueeze(0), stored))
        return rotate(expanded.float(), cos, sin).to(stored.dtype)

    def query(self, query: Tensor) -> Tensor:
        return query if self.layout == "pre_rope" else query @ self.factors.k_up.mT.unsqueeze(1)

    def out(self, out: Tensor) -> Tensor:
        return out.to(self.factors.v_up.dtype) @ self.factors.v_up.unsqueeze(1)

    def keys(self, readable: Tensor) -> Tensor:
        return readable if self.layout == "pre_rope" else readable @ self.factors.k_up

    def values(self, stored: Tensor) -> Tensor:
        return stored @ self.factors.v_up

    def like(self, states: Tensor) -> LowRank:
        """On the device and in the dtype of the states that will be stored."""
        return LowRank(self.factors.to(states), self.layout, self.rope)


def token_positions(start: int, stop: int, offset: Tensor) -> Tensor:
    """Positions (b, stop - start) of the tokens with these indices; padding has some that mean nothing."""
    return torch.arange(start, stop, device=offset.device) - offset
