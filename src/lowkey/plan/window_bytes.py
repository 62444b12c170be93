"""How many bytes latents may take, when a cache of a given length is to hold a budget with its windows of
exact tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lowkey.core.types import Budget, LowkeyError
from lowkey.storage.exact import Exact
from lowkey.storage.packing import Packing, Scheme


@dataclass(frozen=True)
class Holding:
    """A cache of `tokens` tokens in layers of (KV heads x head dim) numbers of `itemsize` bytes.

    exact: tokens kept as they are; packed: how latents are written down, None for the model's own numbers.
    """

    layers: int
    heads: int
    head_dim: int
    itemsize: int
    exact: Exact
    packed: Scheme | None
    tokens: int

    @property
    def full(self) -> int:
        """Bytes of one token in the uncompressed layers."""
        return 2 * self.layers * self.heads * self.head_dim * self.itemsize

    @property
    def recent(self) -> int:
        """How many last tokens are kept as they are: as many as the packing's own, at least."""
        return max(self.exact.recent, self.packed.recent if self.packed else 0)

    @property
    def plain(self) -> bool:
        """Whether there are neither windows nor integers, so that every token takes the same bytes."""
        return self.packed is None and not self.exact.sinks and not self.exact.recent

    @property
    def stored(self) -> int:
        """How many tokens have left the recent window; in whole blocks, where keys are packed in blocks of
        tokens.
        """
        block = max(self.packed.keys.block, self.packed.values.block) if self.packed else 1
        return max(0, self.tokens - self.recent) // block * block

    @property
    def bytes_beside_latents(self) -> int:
        """Bytes of all that is not latents: the exact tokens, where rows begin and end, and where the sinks
        of each row are.
        """
        if self.plain:
            return 0
        exact_tokens = self.tokens - self.stored + self.exact.sinks
        return self.full * exact_tokens + self.layers * (24 + 4 * self.exact.sinks)

    def latents(self, budget: Budget) -> float:
        """Bytes that the latents of one stored token may take in all layers together, so that the whole cache
        holds `budget`.

        Errors: LowkeyError for a budget of tokens, for one above the full cache, and for one that the windows
        alone use up.
        """
        wanted = budget.share(self.full, self.tokens) * self.full * self.tokens
        if wanted > self.full * self.tokens:
            whole = Budget(self.full, "bytes/token")
            raise LowkeyError(
                f"budget {budget}: more than the {whole} of the full cache, in the layers to compress; give "
                "less, or 100%"
            )
        if self.plain or wanted == self.full * self.tokens:
            return wanted / self.tokens  # all is kept, and copies of the sinks come on top
        beside = self.bytes_beside_latents
        if not self.stored or beside >= wanted:
            raise LowkeyError(
                f"budget {budget} of a cache of {self.tokens} tokens: {self.exact.sinks} sinks and "
                f"{self.recent} recent tokens alone take {100 * self.cache_share(0):.0f}%; count for a "
                "longer cache (--at), or keep fewer of them exact"
            )
        return min((wanted - beside) / self.stored, float(self.full))

    def cache_share(self, latents: float) -> float:
        """Return the share of the full cache's bytes that the whole cache holds.

        Args:
            latents: bytes of the latents of one stored token in all layers together.
        """
        return (self.bytes_beside_latents + self.stored * latents) / (self.full * self.tokens)

    def sizes(
        self, merge: tuple[int, int], numbers: Callable[[int], int]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Bytes of one stored token of a layer's keys and of its values at ranks 0, 1, ..., d, of which each
        takes so many numbers, when so many KV heads share a latent of keys, and of values."""

        def side(which: int, merged: int) -> tuple[float, ...]:
            widths = (numbers(rank) * merged // self.heads for rank in range(self.head_dim + 1))
            return tuple(self.latent(which, merged, width) for width in widths)

        return side(0, merge[0]), side(1, merge[1])

    def latent(self, which: int, merged: int, width: int) -> float:
        """Bytes of one stored token of a layer's keys (0) or values (1), when every `merged` heads share a
        latent of this width.
        """
        if self.packed is None:
            return self.heads // merged * width * self.itemsize
        packing: Packing = (self.packed.keys, self.packed.values)[which]
        return (
            self.heads // merged * packing.nbytes(packing.block, width, self.itemsize) / packing.block
            if width
            else 0.0
        )
