"""The form in which keys and values are stored, and how a query meets it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lowkey.backends.segment import Segment
from lowkey.core.head_groups import merged, rebuilt_heads
from lowkey.core.types import Factors, Layout
from lowkey.models.families import Rope
from lowkey.ops.ragged import row_of
from lowkey.ops.rope import rotate, unrotate


class Codec(Protocol):
    """encode: keys and values (b, h, t, d) at positions (b, t) -> stored forms (b, G, t, r), G = h unless
    heads are merged.
    readable: stored keys (b, h, s, r) at positions (b, h|1, s) -> what queries are scored against;
    readable_rows: the same for keys (n, r) of rows of different length, given each one's position (n), where
    rows start (b h + 1), and h.
    query, out: (b, h, g, t, d) to and from the stored basis.
    keys, values: readable keys and stored values -> (b, h, s, d) as the model made them, as nearly as is
    known.
    segment: stored keys (b, G, s, r) at positions (b, s) and values, ready to be attended to by queries (b,
    h, g, t, d) at (b, t); with `expand` the query as it is meets keys and values as the model made them,
    where the form allows it, so that exact ones can join them. order (h): the KV heads in the order in which
    all of this expects them, or None for their own.
    """

    @property
    def order(self) -> Tensor | None: ...

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]: ...
    def readable(self, stored: Tensor, positions: Tensor) -> Tensor: ...
    def readable_rows(self, stored: Tensor, positions: Tensor, starts: Tensor, heads: int) -> Tensor: ...
    def query(self, query: Tensor) -> Tensor: ...
    def out(self, out: Tensor) -> Tensor: ...
    def keys(self, readable: Tensor) -> Tensor: ...
    def values(self, stored: Tensor) -> Tensor: ...
    def segment(
        self, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, at: Tensor, expand: bool = False
    ) -> Segment: ...
    def like(self, states: Tensor) -> Codec: ...


@dataclass(frozen=True)
class Plain:
    """As the model made them."""

    order: ClassVar[None] = None

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

    def segment(
        self, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, at: Tensor, expand: bool = False
    ) -> Segment:
        return Segment(query, keys, values)

    def like(self, states: Tensor) -> Plain:
        return self


@dataclass(frozen=True)
class LowRank:
    """Keys in rank r_K, values in rank r_V, of each head or of several heads together.

    `post_rope`: rotated keys are projected and the query is carried into their basis; nothing is expanded
    back, unless that is cheaper. `pre_rope`: keys are stored unrotated, and expanded and rotated at their own
    positions when read (arXiv:2408.05646, whose published decoding rotates the whole history at the current
    position).
    absorb: always carry the query (True), always expand (False), or whatever takes fewer products (None); the
    numbers are the same.
    """

    factors: Factors
    layout: Layout
    rope: Rope
    absorb: bool | None = None

    @property
    def order(self) -> Tensor | None:
        return self.factors.order

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        f = self.factors
        if f.frequencies is not None:
            return self._turned(keys, f.k_down, positions, f.frequencies), merged(
                _less(values, f.v_mean), f.v_down
            )
        if self.layout == "pre_rope":
            cos, sin = self.rope(positions, keys)
            keys = unrotate(keys.float(), cos, sin).to(keys.dtype)
        return merged(_less(keys, f.k_mean), f.k_down), merged(_less(values, f.v_mean), f.v_down)

    def segment(
        self, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, at: Tensor, expand: bool = False
    ) -> Segment:
        if (frequencies := self.factors.frequencies) is not None:
            query = self._turned(query, self.factors.k_up.mT.unsqueeze(1), at, frequencies)
        elif self.layout == "post_rope" and not expand and self._carries(query, keys):
            query, keys = self._carried(query, keys)
        else:
            keys = self._expanded(keys, positions)
        if expand or not self._carries(query, values):
            return Segment(query, keys, self.values(values))
        up, mean = self.factors.v_up, self.factors.v_mean
        if mean is not None:
            values, up = _with_ones(values), torch.cat([up.expand(len(mean), -1, -1), mean.unsqueeze(1)], 1)
        return Segment(query, keys, values, None, up)

    def _turned(self, x: Tensor, into: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
        """Rotated keys (b, h, t, d) or queries (b, h, g, t, d) at positions (b, t) -> the stored basis,
        rotated by its own frequencies.
        """
        cos, sin = self.rope(positions, x)
        angle = (positions.unsqueeze(-1) * frequencies).float().repeat(1, 1, 2).unsqueeze(1)
        if x.ndim == 5:
            cos, sin, angle = cos.unsqueeze(1), sin.unsqueeze(1), angle.unsqueeze(1)
        scale = (cos.square() + sin.square())[..., :1].sqrt()  # some rotary embeddings also stretch
        return rotate(
            unrotate(x.float(), cos, sin) @ into.float(), angle.cos() * scale, angle.sin() * scale
        ).to(x.dtype)

    def _carries(self, query: Tensor, stored: Tensor) -> bool:
        """Whether so many queries are cheaper to answer in the stored basis than over expanded heads."""
        if self.absorb is not None:
            return self.absorb
        queries, d = query.shape[2] * query.shape[3], self.factors.k_up.shape[-1]
        s, width = stored.shape[2:]
        return queries * width * (s + d) <= s * d * (width + queries)

    def _carried(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (b, G, H/G, t, r) for stored keys (b, G, s, r); a mean adds a channel, which all keys
        share.
        """
        inside, mean = self.query(query), self.factors.k_mean
        if mean is not None:
            inside = torch.cat([inside, query @ mean[:, None, :, None]], -1)
            keys = _with_ones(keys)
        return inside.flatten(1, 2).unflatten(1, (keys.shape[1], -1)), keys

    def _expanded(self, stored: Tensor, positions: Tensor) -> Tensor:
        """Keys (b, h, s, d), rotated."""
        keys = _plus(rebuilt_heads(stored, self.factors.k_up), self.factors.k_mean)
        if self.layout == "post_rope":
            return keys
        cos, sin = self.rope(positions, keys)
        return rotate(keys.float(), cos, sin).to(keys.dtype)

    def readable(self, stored: Tensor, positions: Tensor) -> Tensor:
        if self.layout == "post_rope":
            return stored
        cos, sin = (
            x.squeeze(1).unflatten(0, positions.shape[:2]) for x in self.rope(positions.flatten(0, 1), stored)
        )
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
        return readable if self.layout == "pre_rope" else rebuilt_heads(readable, self.factors.k_up)

    def values(self, stored: Tensor) -> Tensor:
        return _plus(rebuilt_heads(stored, self.factors.v_up), self.factors.v_mean)

    def like(self, states: Tensor) -> LowRank:
        """On the device and in the dtype of the states that will be stored."""
        return replace(self, factors=self.factors.to(states))


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def _less(x: Tensor, mean: Tensor | None) -> Tensor:
    return x if mean is None else x - mean.unsqueeze(1)


def _plus(x: Tensor, mean: Tensor | None) -> Tensor:
    return x if mean is None else x + mean.unsqueeze(1)


def token_positions(start: int, stop: int, offset: Tensor) -> Tensor:
    """Positions (b, stop - start) of the tokens with these indices; padding has some that mean nothing."""
    return torch.arange(start, stop, device=offset.device) - offset
