"""What all layers need to know of a batch of requests, found once.

New tokens of a sequence are either one, which decodes, or a chunk of its prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lowkey.storage.codec import Codec
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionMetadata, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheSpec

from . import reading
from .pages import SidePages
from .reading import Reading


@dataclass(frozen=True)
class PageRows:
    """The pages of all sequences that take a step of decoding, in order.

    Args:
        blocks: (n), the block of each page.
        sequence: (n), which of the sequences it is of.
        index: (n), its place in that sequence.
        lengths: (n), its tokens.
        longest: pages of the longest sequence.
    """

    blocks: Tensor
    sequence: Tensor
    index: Tensor
    lengths: Tensor
    longest: int


@dataclass(frozen=True)
class Chunk:
    """As many new tokens of each of some sequences.

    Args:
        blocks: (b, pages), of the sequences.
        index: (b, t), where in the batch the new tokens are.
        at: (b, t), their positions.
        positions: (b, s), of all tokens of the longest sequence.
        visible: (b, t, s), which of them each new token sees.
    """

    blocks: Tensor
    index: Tensor
    at: Tensor
    positions: Tensor
    visible: Tensor


@dataclass
class Metadata(AttentionMetadata):
    """What all layers of a group need to know of a batch.

    Args:
        starts: (b + 1), where the new tokens of each sequence begin.
        lengths: (b), tokens of each sequence, new ones included.
        positions: (n), of the new tokens.
        slots: (n), block and place of the new tokens, as one number.
        table: (b, pages), the blocks of each sequence.
        block_size: tokens of a page.
        found, chunks, turned: what layers have asked for already.
    """

    starts: list[int]
    lengths: list[int]
    positions: Tensor
    slots: Tensor
    table: Tensor
    block_size: int
    found: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    chunks: dict[tuple[int, ...], Chunk] = field(default_factory=dict)
    turned: dict[torch.dtype, tuple[Tensor, Tensor] | None] = field(default_factory=dict)

    @cached_property
    def token_positions(self) -> Tensor:
        """`positions` as one sequence (1, n), the same object for every layer."""
        return self.positions.unsqueeze(0)

    def turn(self, codec: Codec, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """What new keys are turned back by before they are stored, found once; None if they are not."""
        if codec.rotates_when_read is None:
            return None
        if like.dtype not in self.turned:
            self.turned[like.dtype] = codec.turn(self.token_positions, like)
        return self.turned[like.dtype]

    def lanes(self, side: SidePages, rows: int) -> Tensor:
        """The lanes of all rows of `pages`, found once for layers that lie alike.

        Args:
            side: the keys or the values of a layer.
            rows: of a page; several may read the same lane.
        """
        heads = side.side.heads
        key = side.of_a_page, side.of_a_head, heads, rows
        if key not in self.found:
            row = torch.arange(rows, device=self.table.device) * heads // rows
            self.found[key] = side.lanes(self.pages.blocks)[:, row].flatten()
        return self.found[key]

    def of_rows(self, x: str, rows: int) -> Tensor:
        """The `lengths` or the `starts` of all rows of `pages`, found once."""
        key = rows, int(x == "starts")
        if key not in self.found:
            of_pages = self.pages.lengths if x == "lengths" else self.pages.index * self.block_size
            self.found[key] = of_pages.repeat_interleave(rows)
        return self.found[key]

    def chunk(self, rows: tuple[int, ...]) -> Chunk:
        """The new tokens of some sequences, as many of each; found once."""
        if rows not in self.chunks:
            device, longest = self.slots.device, max(self.lengths[i] for i in rows)
            pages = -(-longest // self.block_size)
            blocks = self.table[torch.tensor(rows, device=self.table.device), :pages].long()
            spans = [range(self.starts[i], self.starts[i + 1]) for i in rows]
            index = torch.tensor(spans, device=device)
            at, positions = self.positions[index], torch.arange(longest, device=device)
            visible = positions <= at.unsqueeze(2)
            self.chunks[rows] = Chunk(blocks, index, at, positions.expand(len(rows), -1), visible)
        return self.chunks[rows]

    @cached_property
    def decoding(self) -> list[int]:
        """Sequences with one new token."""
        return [i for i, length in enumerate(self.starts[1:]) if length - self.starts[i] == 1]

    @cached_property
    def reading(self) -> list[int]:
        """Sequences with more."""
        return [i for i, length in enumerate(self.starts[1:]) if length - self.starts[i] > 1]

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """The blocks (n) of the new tokens, and their places there (n)."""
        return self.slots // self.block_size, self.slots % self.block_size

    @cached_property
    def decoding_tokens(self) -> Tensor | slice:
        """Which new tokens the sequences of `decoding` have."""
        if self.decoding == list(range(len(self.decoding))):
            return slice(0, len(self.decoding))
        return torch.tensor([self.starts[i] for i in self.decoding], device=self.slots.device)

    @cached_property
    def decoding_pages(self) -> tuple[Tensor, np.ndarray]:
        """The blocks of these sequences (b, n), and their tokens (b)."""
        rows = self.decoding
        table = self.table[: len(rows)] if rows == list(range(len(rows))) else self.table[torch.tensor(rows)]
        return table.contiguous(), np.array([self.lengths[i] for i in rows], np.int64)

    @cached_property
    def readings(self) -> list[Reading]:
        """Sequences with more than one new token, as the engine's kernel reads them."""
        return reading.readings(self.starts, self.lengths, self.table, self.block_size)

    @cached_property
    def pages(self) -> PageRows:
        """The pages of the sequences that take a step of decoding."""
        size, lengths = self.block_size, torch.tensor([self.lengths[i] for i in self.decoding])
        counts = (lengths + size - 1) // size
        sequence = torch.repeat_interleave(torch.arange(len(counts)), counts)
        index = torch.arange(len(sequence)) - (counts.cumsum(0) - counts)[sequence]
        device = self.table.device
        blocks = self.table[torch.tensor(self.decoding)[sequence].to(device), index.to(device)].long()
        left = (lengths[sequence] - index * size).clamp_max(size)
        parts = (x.to(device) for x in (sequence, index, left))
        return PageRows(blocks, *parts, int(counts.max()))


class Shared:
    """What all layers of a model have in common, made by the first that asks.

    Attributes:
        made: by the key that they ask with.
        batch: the engine's description of a batch, and what was built of it last. The engine has a builder
            for each form of pages, and gives the same description to all of them.
    """

    def __init__(self) -> None:
        self.made: dict[Hashable, Any] = {}
        self.batch: tuple[CommonAttentionMetadata, Metadata] | None = None

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What this key stands for, made if it is not there."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


class Builder(AttentionMetadataBuilder[Metadata]):
    """Makes a batch's `Metadata` from what the engine knows of it."""

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layer = vllm_config.compilation_config.static_forward_context.get(layer_names[0])
        self.shared = getattr(getattr(layer, "impl", None), "shared", None) or Shared()

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        """See vLLM's builder."""
        m = common_attn_metadata
        if self.shared.batch is not None and self.shared.batch[0] is m:
            return self.shared.batch[1]
        starts, lengths = m.query_start_loc_cpu.tolist(), m.seq_lens.tolist()
        device = m.slot_mapping.device
        positions = torch.cat(
            [
                torch.arange(length - (stop - start), length, device=device)
                for length, start, stop in zip(lengths, starts, starts[1:], strict=False)
            ]
        )
        slots = m.slot_mapping[: len(positions)].long()
        built = Metadata(
            starts, lengths, positions, slots, m.block_table_tensor, self.kv_cache_spec.block_size
        )
        self.shared.batch = m, built
        return built
