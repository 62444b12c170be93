"""Chunks that leave the window become one row each, or none (after KV-Efficient VLA, arXiv:2509.21354)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowkey.core.options import option
from lowkey.ops.chunk_gate import STATE_WIDTH, chunks_to_pool, gate_sizes, gated_chunks
from lowkey.ops.hashing import drawn_uniformly
from lowkey.policies.base import EvictionContext, Policy

LARGEST_CHUNK = 255  # tokens: a row's count takes one byte


@dataclass(frozen=True)
class ChunkPolicy(Policy):
    """What both policies of chunks share: where chunks lie, and how many of them have a row.

    Args:
        chunk: tokens of a chunk. Chunks are counted from the sinks on, or from the end of a protected prompt.
        keep: share of the chunks that left the window which have a row. The rest of the budget is the window;
            rows beyond this share take what the window leaves over.
    """

    uses_queries: ClassVar[bool] = False
    layer: ClassVar[str] = "pooling"
    pools_chunks: ClassVar[bool] = True
    # Numbers that the layer remembers of each head between chunks.
    state_width: ClassVar[int] = 0

    chunk: int = option(16, at_least=1, at_most=LARGEST_CHUNK)
    keep: float = option(0.5, at_least=0, at_most=1)

    @property
    def uses_rotations(self) -> bool:
        """Keys are pooled as they were before their rotation."""
        return True

    def score(self, context: EvictionContext) -> Tensor:
        """The position of each candidate (b, h, s): the newest stay as they came; see `Policy.score`."""
        return context.positions.float()

    def kept_of_prompt(self, tokens: int, count: int, sinks: int, recent: int) -> tuple[int, int]:
        """What stays of a prompt that came in one call.

        Args:
            tokens: of the prompt.
            count: how many tokens and rows of chunks may stay.
            sinks: first tokens that are in no chunk.
            recent: newest tokens that stay as they came.

        Returns:
            (tokens that stay as they came, rows of chunks).
        """
        old = max(0, tokens - sinks - recent)
        starts = torch.arange(0, old, self.chunk)
        sizes = (old - starts).clamp_max(self.chunk)
        one = torch.tensor
        first, allowed = chunks_to_pool(
            sizes, sizes == self.chunk, one(tokens - old), one(0), one(max(count, tokens - old)), self.keep
        )
        gone = sizes[: int(first)]
        return tokens - int(gone.sum()), min(len(gone), int(allowed))

    @abstractmethod
    def rows(
        self,
        keys: Tensor,
        values: Tensor,
        numbers: Tensor,
        state: Tensor,
        active: Tensor,
        layer: int,
        gate: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rows that stand for chunks.

        Args:
            keys: mean keys (b, h, m, d) of m chunks in turn, before their rotation, in fp32.
            values: mean values (b, h, m, d).
            numbers: (m), of the chunks.
            state: (b, h, state_width), what was remembered behind the chunk before.
            active: (b, h, m), which chunks there are.
            layer: which of the cache's evicting layers this is.
            gate: what was learnt of this layer.

        Returns:
            (keys before their rotation, values, scores (b, h, m) by which rows are kept, the state).
        """


@dataclass(frozen=True)
class ChunkMean(ChunkPolicy):
    """The mean of every chunk that leaves the window. A control of `chunk-gate` that learns nothing.

    The row of a chunk is the mean of its keys, before their rotation, rotated to the chunk's centre, and the
    mean of its values. In attention it counts as often as the chunk has tokens: log(tokens) is added to its
    logit.

    Args:
        chunk: see `ChunkPolicy` (default 16).
        keep: see `ChunkPolicy` (default 1: all chunks).
        choose: which chunks have a row where not all do: the `newest`, or `random` ones (default newest).
        seed: of the random choice (default 0).

    Source: the control "mean of all chunks" of arXiv:2509.21354, which the paper does not show.
    """

    summary: ClassVar[str] = "the mean of every chunk that leaves the window, a control"
    paper: ClassVar[str] = "arXiv:2509.21354"

    keep: float = option(1.0, at_least=0, at_most=1)
    choose: Literal["newest", "random"] = "newest"
    seed: int = option(0, at_least=0, at_most=2**31 - 1)

    def rows(
        self,
        keys: Tensor,
        values: Tensor,
        numbers: Tensor,
        state: Tensor,
        active: Tensor,
        layer: int,
        gate: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The means, and the number of each chunk or a hash of it as its score; see `ChunkPolicy.rows`."""
        scores = numbers.float().expand(keys.shape[:3])
        if self.choose == "random":
            scores = drawn_uniformly(numbers.expand(keys.shape[:3]), layer, self.seed)
        return keys, values, scores, state


@dataclass(frozen=True)
class ChunkGate(ChunkPolicy):
    """A trained gate decides which chunks that leave the window have a row, and corrects their means.

    The gate of a layer is an LSTM that reads the chunks of each head in turn; two small maps correct the mean
    key and the mean value, from which they start (see `lowkey.ops.chunk_gate`). Of all chunks that left the
    window, the share `keep` of the largest gates has a row, which counts as often as the chunk has tokens.

    It needs gates of one model, which `lowkey gates MODEL OUT --method chunk-gate` trains.

    Args:
        chunk: see `ChunkPolicy` (default 16); as in training.
        keep: see `ChunkPolicy` (default 0.5); as in training.

    Source: after KV-Efficient VLA, arXiv:2509.21354. In the published code no gradient reaches the gate, its
    update while decoding fails at its first turn, keys and values are gated apart, keys are averaged after
    their rotation, and a row counts once; none of this is repeated here.
    """

    summary: ClassVar[str] = "a trained gate keeps chunks that leave the window as one row each"
    paper: ClassVar[str] = "arXiv:2509.21354"
    learns: ClassVar[str] = "chunk-gate"
    state_width: ClassVar[int] = 2 * STATE_WIDTH

    def gate_shapes(self, heads: int, groups: int, width: int, rotated: int) -> dict[str, tuple[int, ...]]:
        """The tensors of `gated_chunks`; see `Policy.gate_shapes`."""
        return gate_sizes(heads, width)

    def rows(
        self,
        keys: Tensor,
        values: Tensor,
        numbers: Tensor,
        state: Tensor,
        active: Tensor,
        layer: int,
        gate: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The corrected means, and the gate's logits as scores; see `ChunkPolicy.rows`."""
        own = {name: t.to(keys.device) for name, t in gate.items()}
        return gated_chunks(keys, values, state, own, active)
