"""How many bytes latents may take so that a cache of a given length holds a budget.

Exact tokens take a share of the budget that depends on the length: a window of 36 tokens is most of a short
cache and little of a long one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lowkey.core.types import Budget, LowkeyError
from lowkey.storage.exact import Exact
from lowkey.storage.packing import Packing, Scheme


@dataclass(frozen=True)
class CacheBytes:
    """The bytes of the compressed layers of a cache, for one sequence of a given length.

    Args:
        layers: number of compressed layers.
        heads: KV heads of a layer.
        head_dim: width of a head.
        itemsize: bytes of a number in the model's dtype.
        exact: sinks and recent tokens that are kept exactly.
        packed: how latents are packed; None for the model's dtype.
        tokens: length of the sequence.
    """

    layers: int
    heads: int
    head_dim: int
    itemsize: int
    exact: Exact
    packed: Scheme | None
    tokens: int

    @property
    def full_token_bytes(self) -> int:
        """Bytes of one token in the uncompressed layers."""
        return 2 * self.layers * self.heads * self.head_dim * self.itemsize

    @property
    def recent_tokens(self) -> int:
        """The length of the exact window: at least the packing's own."""
        return max(self.exact.recent, self.packed.recent if self.packed else 0)

    @property
    def is_uniform(self) -> bool:
        """Whether every token takes the same bytes: there are neither exact tokens nor integers."""
        return self.packed is None and not self.exact.sinks and not self.exact.recent

    @property
    def stored_tokens(self) -> int:
        """How many tokens have left the window; whole blocks only, if keys are packed in blocks of tokens."""
        block = max(self.packed.keys.block, self.packed.values.block) if self.packed else 1
        return max(0, self.tokens - self.recent_tokens) // block * block

    @property
    def bytes_beside_latents(self) -> int:
        """Bytes of all that is not latents: exact tokens, and the indices of rows and sinks."""
        if self.is_uniform:
            return 0
        exact_tokens = self.tokens - self.stored_tokens + self.exact.sinks
        # three row indices of 8 bytes, and the index of each sink
        index_bytes = self.layers * (24 + 4 * self.exact.sinks)
        return self.full_token_bytes * exact_tokens + index_bytes

    def latent_bytes(self, budget: Budget) -> float:
        """The bytes that the latents of one stored token may take so that the whole cache holds a budget.

        Args:
            budget: of bytes, in the compressed layers.

        Returns:
            Bytes over all compressed layers together.

        Raises:
            LowkeyError: for a budget of tokens, for one above the full cache, and for one that the exact
                tokens alone use up.
        """
        full = self.full_token_bytes
        wanted = budget.share(full, self.tokens) * full * self.tokens
        if wanted > full * self.tokens:
            whole = Budget(full, "bytes/token")
            raise LowkeyError(
                f"budget {budget}: more than the {whole} of the full cache, in the layers to compress; give "
                "less, or 100%"
            )
        if self.is_uniform or wanted == full * self.tokens:
            return wanted / self.tokens  # at 100 %, all is kept, and copies of the sinks come on top
        # exact tokens and indices are paid for first; the stored tokens share what is left
        beside = self.bytes_beside_latents
        if not self.stored_tokens or beside >= wanted:
            raise LowkeyError(
                f"budget {budget} of a cache of {self.tokens} tokens: {self.exact.sinks} sinks and "
                f"{self.recent_tokens} recent tokens alone take {100 * self.cache_share(0):.0f}%; count for "
                "a longer cache (--at), or keep fewer of them exact"
            )
        return min((wanted - beside) / self.stored_tokens, float(full))

    def cache_share(self, latent_bytes: float) -> float:
        """The share of the full cache's bytes that the whole cache holds.

        Args:
            latent_bytes: bytes of the latents of one stored token in all layers together.
        """
        held = self.bytes_beside_latents + self.stored_tokens * latent_bytes
        return held / (self.full_token_bytes * self.tokens)

    def bytes_by_rank(
        self, merge: tuple[int, int], numbers: Callable[[int], int]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The bytes of one stored token of a layer at every rank.

        Args:
            merge: how many KV heads share a latent, of keys and of values.
            numbers: how many numbers all heads of a layer take at a rank.

        Returns:
            (bytes of keys, bytes of values), each at ranks 0, 1, ..., d.
        """

        def at_all_ranks(which: int, merged: int) -> tuple[float, ...]:
            widths = (numbers(rank) * merged // self.heads for rank in range(self.head_dim + 1))
            return tuple(self.latent_token_bytes(which, merged, width) for width in widths)

        return at_all_ranks(0, merge[0]), at_all_ranks(1, merge[1])

    def latent_token_bytes(self, which: int, merged: int, width: int) -> float:
        """The bytes of one stored token of a layer's keys or values.

        Args:
            which: 0 for keys, 1 for values.
            merged: how many KV heads share a latent.
            width: of that latent.
        """
        latents = self.heads // merged  # so many latents hold all heads
        if self.packed is None:
            return latents * width * self.itemsize
        packing: Packing = (self.packed.keys, self.packed.values)[which]
        # a block of tokens is packed together, so its bytes are divided by its tokens
        block_bytes = packing.nbytes(packing.block, width, self.itemsize) if width else 0.0
        return latents * block_bytes / packing.block
