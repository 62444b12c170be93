"""Keys as the model made them, with one more channel that holds a bias of the token's score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowkey.backends.segment import Segment
from lowkey.storage.codec import Plain


@dataclass(frozen=True)
class Biased(Plain):
    """Stores keys with a channel that queries meet with a 1; see `Codec` for the methods.

    The channel holds the bias divided by the factor that attention multiplies scores with, so that every
    kernel adds the bias as it forms the product. Under a soft cap it is added before the cap. Tokens are
    stored without a bias (0); a layer may give one to tokens in rows.
    """

    def encode(
        self, keys: Tensor, values: Tensor, positions: Tensor, turn: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys with a channel of zeros, and values."""
        return torch.cat([keys, keys.new_zeros(*keys.shape[:-1], 1)], -1), values

    def project_query(
        self, query: Tensor, at: Tensor, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The queries with a channel of ones."""
        return with_ones(query), None

    def rebuilt_keys(self, stored: Tensor, positions: Tensor) -> Tensor:
        """The keys without their bias."""
        return stored[..., :-1]

    def segment(
        self, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, at: Tensor, expand: bool = False
    ) -> Segment:
        """A segment of dense tokens, which never have a bias."""
        return Segment(query, keys[..., :-1], values)

    def to_match(self, states: Tensor) -> Biased:
        """This codec: it has no tensors."""
        return self


def with_ones(queries: Tensor) -> Tensor:
    """Queries (..., d) with one more channel of ones, as they meet keys that hold a bias."""
    return torch.cat([queries, queries.new_ones(*queries.shape[:-1], 1)], -1)
