"""The forms in which keys and values are stored, and how a query meets each form."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lowkey.backends.segment import Segment
from lowkey.core.head_groups import group_latents, rebuilt_heads
from lowkey.core.types import Factors, Layout
from lowkey.models.families import Rope
from lowkey.ops.ragged import row_of
from lowkey.ops.rope import inverse_turn, rotate, turned, unrotate


class Codec(Protocol):
    """Turns keys and values into the form that is stored, and lets queries meet that form.

    Stored keys and values have G heads: G = h, or fewer where several KV heads share a latent.
    """

    @property
    def order(self) -> Tensor | None:
        """(h): the KV heads in the order in which all methods expect them, or None for the model's order."""
        ...

    @property
    def inverse_order(self) -> Tensor | None:
        """(h): where each KV head of the model is in `order`, or None."""
        ...

    def encode(
        self, keys: Tensor, values: Tensor, positions: Tensor, turn: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Bring keys and values into the form that is stored.

        Args:
            keys: (b, h, t, d), rotated.
            values: (b, h, t, d).
            positions: (b|1, t).
            turn: what `turn` returns for them, if it is at hand.

        Returns:
            Stored keys and values (b, G, t, r).
        """
        ...

    def turn(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """What `encode` turns keys back by at positions (b, t): a pair (b, 1, t, d) in fp32; or None."""
        ...

    @property
    def heads_per_row(self) -> int:
        """The smallest number of KV heads side by side that share no latent with any others."""
        ...

    def meets_stored_keys(self, softcap: float | None) -> bool:
        """Whether queries can be brought to the stored keys, so that no key has to be rebuilt."""
        ...

    def step_maps(self) -> tuple[Tensor, Tensor] | None:
        """The maps of queries into the basis of stored keys and of sums of values into that of the model.

        Returns:
            (h|1, d, r_K) and (h|1, r_V, d). A mean of keys is one more column, a mean of values one more row.
            None if neither takes a product.
        """
        ...

    def project_query(
        self, query: Tensor, at: Tensor, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Bring queries into the basis of stored keys.

        Args:
            query: (b, h, g, t, d), or (b, h, g, d) in a step.
            at: (b|1, t), the positions of the queries.
            into: the first of `step_maps`, if it is at hand.

        Returns:
            Queries (b, h, g, t, r), and what is to be added to all their scores (b, h, g, t), or None; in a
            step without t.
        """
        ...

    def rotated_keys_of_rows(
        self, stored: Tensor, positions: Tensor, starts: Tensor, row_heads: int
    ) -> Tensor:
        """Rebuild the keys of ragged rows; see `lowkey.storage.rows`.

        Args:
            stored: keys (n, a, r) of all rows, one behind another.
            positions: (n), the position of each token.
            starts: (b R + 1), where each row begins.
            row_heads: R, the rows of each sequence.

        Returns:
            Rotated keys (h / R, n, d), for each KV head of a row.
        """
        ...

    def rebuilt_keys(self, stored: Tensor, positions: Tensor) -> Tensor:
        """Rotated keys (b, h, s, d), as nearly as the form knows them.

        Args:
            stored: keys (b, G, s, r).
            positions: (b, s), or (b, h, s) where heads hold different tokens.
        """
        ...

    @property
    def rotates_when_read(self) -> Rope | None:
        """What rotates stored keys when they are read; None if they are stored as queries meet them."""
        ...

    def key_maps(self, heads: int) -> tuple[Tensor, Tensor | None]:
        """What rebuilds keys before they are rotated, where `rotates_when_read`.

        Args:
            heads: h, the KV heads.

        Returns:
            The maps (h, r, d) from latents to heads, and what is added then (h, d), or None: views of what
            the codec holds.
        """
        ...

    def expand_output(self, out: Tensor, maps: Tensor | None = None) -> Tensor:
        """Weighted sums of stored values (b, h, g, t, r) -> outputs (b, h, g, t, d).

        Args:
            out: the sums; in a step (b, h, g, r), and then outputs have no t, either.
            maps: the second of `step_maps`, if it is at hand. If it has a row for a mean of values, `out` has
                the sum of the weights as one more channel; else this is 1.
        """
        ...

    def expand_values(self, stored: Tensor) -> Tensor:
        """Stored values (b, G, s, r) -> values (b, h, s, d) as nearly as the form knows them."""
        ...

    def segment(
        self, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, at: Tensor, expand: bool = False
    ) -> Segment:
        """Prepare stored tokens and the queries for attention.

        Args:
            query: (b, h, g, t, d).
            keys: stored keys (b, G, s, r).
            values: stored values (b, G, s, r).
            positions: (b, s), of the stored tokens.
            at: (b, t), the positions of the queries.
            expand: rebuild keys and values and leave the queries in the model's basis, where the form
                allows it, so that exact tokens can be joined to the segment.

        Returns:
            The segment, without a mask.
        """
        ...

    def to_match(self, states: Tensor) -> Codec:
        """The same codec on the device and in the dtype of the states that will be stored."""
        ...


@dataclass(frozen=True)
class Plain:
    """Stores keys and values as the model made them; see `Codec` for the methods."""

    order: ClassVar[None] = None
    inverse_order: ClassVar[None] = None
    heads_per_row: ClassVar[int] = 1
    rotates_when_read: ClassVar[None] = None

    def key_maps(self, heads: int) -> tuple[Tensor, Tensor | None]:
        """Not defined: stored keys are read as they are."""
        raise NotImplementedError

    def encode(
        self, keys: Tensor, values: Tensor, positions: Tensor, turn: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values, unchanged."""
        return keys, values

    def turn(self, positions: Tensor, like: Tensor) -> None:
        """None: keys are stored as they come."""
        return None

    def meets_stored_keys(self, softcap: float | None) -> bool:
        """True: stored keys are the model's own."""
        return True

    def step_maps(self) -> tuple[Tensor, Tensor] | None:
        """None: queries and outputs are in the model's basis."""
        return None

    def project_query(
        self, query: Tensor, at: Tensor, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The queries, unchanged."""
        return query, None

    def rotated_keys_of_rows(
        self, stored: Tensor, positions: Tensor, starts: Tensor, row_heads: int
    ) -> Tensor:
        """The stored keys, unchanged."""
        return stored.movedim(1, 0)

    def rebuilt_keys(self, stored: Tensor, positions: Tensor) -> Tensor:
        """The stored keys, unchanged."""
        return stored

    def expand_output(self, out: Tensor, maps: Tensor | None = None) -> Tensor:
        """The outputs, unchanged."""
        return out

    def expand_values(self, stored: Tensor) -> Tensor:
        """The values, unchanged."""
        return stored

    def segment(
        self, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, at: Tensor, expand: bool = False
    ) -> Segment:
        """A segment of the tokens as they are."""
        return Segment(query, keys, values)

    def to_match(self, states: Tensor) -> Plain:
        """This codec: it has no tensors."""
        return self


@dataclass(frozen=True)
class LowRank:
    """Stores keys in rank r_K and values in rank r_V, of each head or of several heads together.

    Layout `post_rope`: rotated keys are projected, and the query is projected into their basis. Nothing is
    expanded, unless that is cheaper. Layout `pre_rope`: keys are stored unrotated, and are expanded and
    rotated at their own positions when they are read (arXiv:2408.05646; the published decoding rotates the
    whole history at the current position instead).

    Args:
        factors: the maps into and out of the stored basis.
        layout: `post_rope` or `pre_rope`.
        rope: the model's rotary embedding.
        absorb: how queries meet stored tokens. True: always project the queries; False: always expand the
            stored tokens; None: whichever takes fewer products. The results are the same.
    """

    factors: Factors
    layout: Layout
    rope: Rope
    absorb: bool | None = None

    @property
    def order(self) -> Tensor | None:
        """(h): the KV heads in the order in which they are grouped, or None for the model's order."""
        return self.factors.order

    @cached_property
    def inverse_order(self) -> Tensor | None:
        """(h): where each KV head of the model is in `order`, or None."""
        return None if self.order is None else self.order.argsort()

    def encode(
        self, keys: Tensor, values: Tensor, positions: Tensor, turn: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Project keys and values into their latents; see `Codec.encode`."""
        f = self.factors
        latent_values = group_latents(_minus_mean(values, f.v_mean), f.v_down)
        if f.frequencies is not None:
            return self._rotated_by_own_frequencies(keys, f.k_down, positions, f.frequencies), latent_values
        if turn is not None:
            keys = turned(keys.float(), *turn).to(keys.dtype)
        elif self.layout == "pre_rope":
            cos, sin = self.rope(positions, keys)
            keys = unrotate(keys.float(), cos, sin).to(keys.dtype)
        return group_latents(_minus_mean(keys, f.k_mean), f.k_down), latent_values

    def turn(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """See `Codec.turn`; None also where the embedding leaves some channels alone."""
        if self.rotates_when_read is None:
            return None
        cos, sin = self.rope(positions, like)
        return inverse_turn(cos, sin) if cos.shape[-1] == like.shape[-1] else None

    def segment(
        self, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, at: Tensor, expand: bool = False
    ) -> Segment:
        """Prepare stored tokens and queries for attention; see `Codec.segment`."""
        # scores: either the query goes into the keys' basis, or the keys come back into the query's
        if (frequencies := self.factors.frequencies) is not None:
            query = self._rotated_by_own_frequencies(
                query, self.factors.k_up.mT.unsqueeze(1), at, frequencies
            )
        elif self.layout == "post_rope" and not expand and self._projecting_is_cheaper(query, keys):
            query, keys = self._projected(query, keys)
        else:
            keys = self.rebuilt_keys(keys, positions)
        # outputs: either the values come back into d channels first, or their weighted sum does
        if expand or not self._projecting_is_cheaper(query, values):
            return Segment(query, keys, self.expand_values(values))
        up, mean = self.factors.v_up, self.factors.v_mean
        if mean is not None:
            # a channel of ones sums the weights, which the last row of the map multiplies with the mean
            values, up = _with_ones(values), torch.cat([up.expand(len(mean), -1, -1), mean.unsqueeze(1)], 1)
        return Segment(query, keys, values, None, up)

    def _rotated_by_own_frequencies(
        self, x: Tensor, into: Tensor, positions: Tensor, frequencies: Tensor
    ) -> Tensor:
        """Undo the model's rotation, project, and rotate again by the factors' own frequencies.

        Args:
            x: rotated keys (b, h, t, d) or queries (b, h, g, t, d).
            into: the map into the stored basis.
            positions: (b, t).
            frequencies: (r_K / 2), radians per position.

        Returns:
            x in the stored basis.
        """
        cos, sin = self.rope(positions, x)
        angle = (positions.unsqueeze(-1) * frequencies).float().repeat(1, 1, 2).unsqueeze(1)
        if x.ndim == 5:
            cos, sin, angle = cos.unsqueeze(1), sin.unsqueeze(1), angle.unsqueeze(1)
        scale = (cos.square() + sin.square())[..., :1].sqrt()  # YaRN multiplies cos and sin by a factor
        latent = unrotate(x.float(), cos, sin) @ into.float()
        return rotate(latent, angle.cos() * scale, angle.sin() * scale).to(x.dtype)

    def _projecting_is_cheaper(self, query: Tensor, stored: Tensor) -> bool:
        """Whether so many queries take fewer products in the stored basis than over expanded heads.

        Args:
            query: (b, h, g, t, d).
            stored: (b, G, s, width).
        """
        if self.absorb is not None:
            return self.absorb
        queries, d = query.shape[2] * query.shape[3], self.factors.k_up.shape[-1]
        s, width = stored.shape[2:]
        projecting = queries * width * (s + d)  # scores at the latent's width, and the projection of queries
        expanding = s * d * (width + queries)  # the expansion of every token, and scores at width d
        return projecting <= expanding

    def _projected(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (b, G, H/G, t, r) for stored keys (b, G, s, r).

        A mean that was subtracted from the keys is met by one more channel: the query's product with the
        mean, against a 1 in every key.
        """
        projected, mean = query @ self.factors.k_up.mT.unsqueeze(1), self.factors.k_mean
        if mean is not None:
            projected = torch.cat([projected, query @ mean[:, None, :, None]], -1)
            keys = _with_ones(keys)
        return projected.flatten(1, 2).unflatten(1, (keys.shape[1], -1)), keys

    @property
    def heads_per_row(self) -> int:
        """KV heads that share latents with no others; see `Codec.heads_per_row`."""
        return math.lcm(*self.factors.merge)

    def meets_stored_keys(self, softcap: float | None) -> bool:
        """Whether queries can be brought to the stored keys; see `Codec.meets_stored_keys`.

        A mean that was subtracted adds the same to all scores of a query. Under a soft cap it does not, and
        keys have to be rebuilt.
        """
        if self.factors.frequencies is not None:
            return True
        return self.layout == "post_rope" and (softcap is None or self.factors.k_mean is None)

    def step_maps(self) -> tuple[Tensor, Tensor]:
        """Maps of queries and of outputs; see `Codec.step_maps`."""
        f = self.factors
        into, out_of = f.k_up.mT, f.v_up
        if f.k_mean is not None:
            into = torch.cat([into.expand(len(f.k_mean), -1, -1), f.k_mean.unsqueeze(2)], 2)
        if f.v_mean is not None:
            out_of = torch.cat([out_of.expand(len(f.v_mean), -1, -1), f.v_mean.unsqueeze(1)], 1)
        return into, out_of

    def project_query(
        self, query: Tensor, at: Tensor, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Queries in the basis of the stored keys; see `Codec.project_query`."""
        f = self.factors
        if f.frequencies is not None:
            with_t, up = query.unsqueeze(3) if query.ndim == 4 else query, f.k_up.mT.unsqueeze(1)
            turned = self._rotated_by_own_frequencies(with_t, up, at, f.frequencies)
            return turned.view(*query.shape[:-1], -1), None
        latent = _mapped(query, self.step_maps()[0] if into is None else into)
        if f.k_mean is None:
            return latent, None
        return latent[..., :-1], latent[..., -1].float()

    def rotated_keys_of_rows(
        self, stored: Tensor, positions: Tensor, starts: Tensor, row_heads: int
    ) -> Tensor:
        """Rebuilt keys (h / R, n, d) of ragged rows; see `Codec.rotated_keys_of_rows`."""
        n, a = stored.shape[:2]
        f, of_a_row = self.factors, self.heads_per_row
        up = f.k_up.expand(row_heads * of_a_row, -1, -1).unflatten(0, (row_heads, of_a_row))
        keys = stored.new_empty(of_a_row, n, up.shape[-1])
        head = row_of(starts) % row_heads
        for i in range(row_heads):
            own = head == i
            latents = stored[own].movedim(1, 0).repeat_interleave(of_a_row // a, 0)
            mean = None if f.k_mean is None else f.k_mean.unflatten(0, (row_heads, of_a_row))[i]
            keys[:, own] = _plus_mean(latents @ up[i], mean)
        if self.layout == "post_rope":
            return keys
        cos, sin = (x[0, 0] for x in self.rope(positions.unsqueeze(0), stored))
        return rotate(keys.float(), cos, sin).to(stored.dtype)

    def rebuilt_keys(self, stored: Tensor, positions: Tensor) -> Tensor:
        """Rotated keys (b, h, s, d); see `Codec.rebuilt_keys`."""
        keys = _plus_mean(rebuilt_heads(stored, self.factors.k_up), self.factors.k_mean)
        if self.layout == "post_rope":
            return keys
        if positions.ndim == 2:
            cos, sin = self.rope(positions, keys)
        else:
            cos, sin = (
                x.squeeze(1).unflatten(0, positions.shape[:2])
                for x in self.rope(positions.flatten(0, 1), keys)
            )
        return rotate(keys.float(), cos, sin).to(keys.dtype)

    @property
    def rotates_when_read(self) -> Rope | None:
        """The model's rotary embedding, if keys are stored before their rotation; see `Codec`."""
        return self.rope if self.layout == "pre_rope" and self.factors.frequencies is None else None

    def key_maps(self, heads: int) -> tuple[Tensor, Tensor | None]:
        """Maps and means of heads; see `Codec.key_maps`."""
        up, mean = self.factors.k_up, self.factors.k_mean
        return up.expand(heads, -1, -1), None if mean is None else mean.expand(heads, -1)

    def expand_output(self, out: Tensor, maps: Tensor | None = None) -> Tensor:
        """Outputs (b, h, g, t, d); see `Codec.expand_output`."""
        if maps is not None:
            return _mapped(out.to(maps.dtype), maps)
        up, mean = self.factors.v_up, self.factors.v_mean
        out = _mapped(out.to(up.dtype), up)
        return out if mean is None else out + mean[:, None, None]

    def expand_values(self, stored: Tensor) -> Tensor:
        """Values (b, h, s, d); see `Codec.expand_values`."""
        return _plus_mean(rebuilt_heads(stored, self.factors.v_up), self.factors.v_mean)

    def to_match(self, states: Tensor) -> LowRank:
        """The same maps on the device and in the dtype of the states that will be stored."""
        return replace(self, factors=self.factors.to(states))


def _mapped(x: Tensor, maps: Tensor) -> Tensor:
    """Numbers (b, h, ..., n) times the map (h, n, m) of their head, or times one map (1, n, m) for all."""
    if len(maps) == 1:
        return x @ maps[0]
    b, h, *rest, n = x.shape
    # a product of more dimensions would copy the maps for every query
    out = torch.bmm(x.transpose(0, 1).reshape(h, -1, n), maps)
    return out.view(h, b, *rest, -1).transpose(0, 1)


def _with_ones(x: Tensor) -> Tensor:
    """One more channel, all ones."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def _minus_mean(x: Tensor, mean: Tensor | None) -> Tensor:
    return x if mean is None else x - mean.unsqueeze(1)


def _plus_mean(x: Tensor, mean: Tensor | None) -> Tensor:
    return x if mean is None else x + mean.unsqueeze(1)


def token_positions(start: int, stop: int, offset: Tensor) -> Tensor:
    """Positions (b, stop - start) of the tokens with these indices; those of padding mean nothing.

    Args:
        start: the first index.
        stop: the index behind the last.
        offset: (b, 1), index less position in each sequence.
    """
    return torch.arange(start, stop, device=offset.device) - offset
