"""Pages of exact keys and values: those of a sequence's first tokens, and of its newest ones.

They are a second group of pages beside the latents. The engine gives the blocks that a window leaves behind
back to other sequences; those of the first tokens stay as long as the sequence does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from .batch import Builder, Metadata
from .own import OwnBackend, Pages
from .pages import Layout
from .windowed_reading import WindowedReading, windowed_readings

SIDE_BY_SIDE = (KVCacheLayout.BLHNC,)  # pages of all layers in one block, so that groups may differ in size


@dataclass(frozen=True, kw_only=True)
class ExactSpec(SlidingWindowSpec):
    """Pages of a window, and of the first tokens.

    Args:
        first_blocks: of each sequence that stay.
    """

    first_blocks: int = 0

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """The most blocks that a sequence holds; see vLLM's."""
        return self.first_blocks + super().max_admission_blocks_per_request(
            max_in_flight_tokens=max_in_flight_tokens, max_model_len=max_model_len
        )


class ExactManager(SlidingWindowManager):
    """Gives out the blocks of `ExactSpec`; see vLLM's manager for the methods."""

    def __init__(self, kv_cache_spec: ExactSpec, **settings: Any) -> None:
        super().__init__(kv_cache_spec, **settings)
        self.first_blocks = kv_cache_spec.first_blocks

    @classmethod
    def find_longest_cache_hit(cls, **asked: Any) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """A known prefix is of use only if its first blocks are known, too."""
        found, length = super().find_longest_cache_hit(**asked)
        pool, spec, groups = asked["block_pool"], asked["kv_cache_spec"], asked["kv_cache_group_ids"]
        hashes = resolve_block_hashes(
            asked["block_hashes"],
            pool.hash_block_size,
            spec.block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=asked["alignment_tokens"],
        )
        for i in range(min(spec.first_blocks, len(found[0]))):
            if not found[0][i].is_null:
                continue
            known = pool.get_cached_block(hashes[i], groups)
            if known is None:
                return tuple([] for _ in groups), 0
            for blocks, block in zip(found, known, strict=True):
                blocks[i] = block
        return found, length

    @classmethod
    def reachable_block_mask(cls, start_block: int, end_block: int, **others: Any) -> list[bool] | None:
        """The first blocks are always worth knowing."""
        mask = super().reachable_block_mask(start_block=start_block, end_block=end_block, **others)
        if mask is not None:
            for i in range(start_block, min(others["kv_cache_spec"].first_blocks, end_block)):
                mask[i - start_block] = True
        return mask

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *others: Any,
        **more: Any,
    ) -> int:
        """First blocks of a known prefix count, if nobody holds them now."""
        needed = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *others, **more
        )
        skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
        return needed + self._get_num_evictable_blocks(new_computed_blocks[: min(self.first_blocks, skipped)])

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *counts: Any, **more: Any
    ) -> None:
        """The first blocks of a known prefix are held, wherever the window is."""
        super().add_local_computed_blocks(request_id, new_computed_blocks, *counts, **more)
        held = self.req_to_blocks[request_id]
        for i, block in enumerate(new_computed_blocks[: self.first_blocks]):
            if held[i].is_null and not block.is_null:
                self.block_pool.touch([block])
                held[i] = block

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Blocks that the window has left are freed, but for the first ones."""
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        self._remove_blocks_in_range(request_id, self.first_blocks, skipped)


@dataclass(frozen=True)
class View:
    """What the new tokens of some sequences see, as many of each.

    Args:
        index: (b, t), where in the batch the new tokens are.
        at: (b, t), their positions.
        left: (b, t), the tokens from the first on that their windows have left.
        stored: the tokens from the first on that some of them see as latents.
        stored_mask: (b, t, stored), which.
        exact: (b, e), tokens that are read exactly.
        exact_mask: (b, t, e), which of them each new token sees.
    """

    index: Tensor
    at: Tensor
    left: Tensor
    stored: int
    stored_mask: Tensor
    exact: Tensor
    exact_mask: Tensor


@dataclass
class ExactMetadata(Metadata):
    """A batch, for layers with exact tokens.

    What a token sees depends on its position alone: the first tokens and those of its window exactly, and all
    others as latents. So it is the same whether a prompt is read at once, in chunks, or again.

    Args:
        views, completed, steps, read: what layers have asked for already.
    """

    views: dict[tuple[int, ...], View] = field(default_factory=dict)
    completed: tuple[Tensor, Tensor] | None = None
    steps: dict[int, tuple[Metadata, Metadata]] = field(default_factory=dict)
    read: list[WindowedReading] | None = None

    def far(self, md: Metadata, left: Tensor) -> Metadata:
        """A batch as if the sequences that decode ended where their windows begin.

        Args:
            md: the batch, for pages of latents.
            left: (b, 1), the tokens of these sequences that their windows have left.
        """
        if id(md) not in self.steps:  # by identity: the batch is kept and cannot be another
            lengths = list(md.lengths)
            for i, count in zip(md.decoding, left[:, 0].tolist(), strict=True):
                lengths[i] = count
            self.steps[id(md)] = md, replace(md, lengths=lengths, found={}, chunks={})
        return self.steps[id(md)][1]

    def readings(self, latents: Metadata, sinks: int, recent: int, unit: int) -> list[WindowedReading]:
        """Sequences with more than one new token, as the engine's kernel reads them.

        Args:
            latents: the same batch, for pages of latents.
            sinks, recent, unit: see `view`.
        """
        if self.read is None:
            window = sinks, recent, unit
            self.read = windowed_readings(
                self.starts, self.lengths, latents.table, latents.block_size, window
            )
        return self.read

    def completed_units(self, unit: int) -> tuple[Tensor, Tensor]:
        """The tokens of all units that the new tokens complete: (n) sequences, and (n) places in them."""
        if self.completed is None:
            sequences, places = [], []
            for i, length in enumerate(self.lengths):
                before = length - (self.starts[i + 1] - self.starts[i])
                index = torch.arange(before // unit * unit, length // unit * unit)
                places.append(index)
                sequences.append(torch.full_like(index, i))
            device = self.table.device
            self.completed = torch.cat(sequences).to(device), torch.cat(places).to(device)
        return self.completed

    def view(self, rows: list[int], sinks: int, recent: int, unit: int) -> View:
        """What the new tokens of some sequences see.

        Args:
            rows: the sequences, with as many new tokens each.
            sinks: first tokens that are seen exactly.
            recent: newest tokens that are seen exactly, a token itself included.
            unit: tokens that are packed together, and seen exactly until all of them may be packed.
        """
        key = tuple(rows)
        if key in self.views:
            return self.views[key]
        device = self.slots.device
        index = torch.tensor([range(self.starts[i], self.starts[i + 1]) for i in rows], device=device)
        lengths = torch.tensor([[self.lengths[i]] for i in rows], device=device)
        at = self.positions[index]
        left = (at + 1 - recent).clamp_min(0) // unit * unit  # (b, t): tokens that the window has left
        stored, begin = int(left.max()), left[:, :1]
        far, first = torch.arange(stored, device=device), torch.arange(min(sinks, stored), device=device)
        near = begin + torch.arange(int((lengths - begin).max()), device=device)
        behind, own = left.unsqueeze(2), at.unsqueeze(2)
        in_window = (near.unsqueeze(1) >= behind) & (near.unsqueeze(1) <= own)
        exact = torch.cat([first.expand(len(rows), -1), near], 1).minimum(lengths - 1)
        exact_mask = torch.cat([first < behind, in_window], 2)
        self.views[key] = View(index, at, left, stored, (far < behind) & (far >= sinks), exact, exact_mask)
        return self.views[key]


class ExactBuilder(Builder):
    """Makes a batch's `ExactMetadata`."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> ExactMetadata:
        """See vLLM's builder."""
        m = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return ExactMetadata(m.starts, m.lengths, m.positions, m.slots, m.table, m.block_size)


class ExactBackend(OwnBackend):
    """Says to vLLM how batches and pages of exact tokens are described."""

    @staticmethod
    def get_name() -> str:
        """The name under which it is registered."""
        return "LOWKEY_EXACT"

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """The class that makes metadata."""
        return ExactBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """How pages of layers lie beside one another."""
        return SIDE_BY_SIDE


class ExactPages(Pages):
    """The exact tokens of one layer.

    Args:
        name: of these pages.
        layout: how keys and values lie in a page.
        tokens: of a page.
        sinks: first tokens that are kept.
        recent: newest tokens that are seen exactly.
        window: newest tokens that are kept.
    """

    def __init__(self, name: str, layout: Layout, tokens: int, sinks: int, recent: int, window: int) -> None:
        super().__init__(name, layout)
        self.tokens, self.sinks, self.recent, self.window = tokens, sinks, recent, window

    def get_attn_backend(self) -> type[AttentionBackend]:
        """How batches are described."""
        return ExactBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """What a page takes."""
        keys, values = self.layout.keys, self.layout.values
        return ExactSpec(
            block_size=self.tokens,
            num_kv_heads=1,
            head_size=keys.heads * keys.width,
            head_size_v=values.heads * values.width,
            dtype=keys.dtype,
            sliding_window=self.window,
            first_blocks=cdiv(self.sinks, self.tokens),
        )
