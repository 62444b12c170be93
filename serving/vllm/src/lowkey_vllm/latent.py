"""Our own attention over pages of latents, at any widths and in any packing of single tokens.

A step of decoding reads pages where they lie: every page of a sequence is a row for lowkey's kernels, and the
parts of a sequence are merged by their log-sum-exp. A chunk of a prompt gathers its sequence's pages and
attends in matrix products, as lowkey's own cache does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from lowkey.backends import grouped
from lowkey.backends.ragged import prepared_segments
from lowkey.backends.segment import Part
from lowkey.backends.stored import Rebuilding, StepSegment
from lowkey.storage.codec import Codec
from lowkey.storage.packing import Packing
from lowkey.storage.rebuilding import Rotation, rotation_below
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from .pages import Layout, Side, SidePages


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
        found, chunks: what layers have asked for already.
    """

    starts: list[int]
    lengths: list[int]
    positions: Tensor
    slots: Tensor
    table: Tensor
    block_size: int
    found: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    chunks: dict[tuple[int, ...], Chunk] = field(default_factory=dict)

    @cached_property
    def token_positions(self) -> Tensor:
        """`positions` as one sequence (1, n), the same object for every layer."""
        return self.positions.unsqueeze(0)

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
    def decoding_tokens(self) -> Tensor:
        """Which new tokens the sequences of `decoding` have."""
        return torch.tensor([self.starts[i] for i in self.decoding], device=self.slots.device)

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

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        """See vLLM's builder."""
        m = common_attn_metadata
        starts, lengths = m.query_start_loc_cpu.tolist(), m.seq_lens.tolist()
        device = m.slot_mapping.device
        positions = torch.cat(
            [
                torch.arange(length - (stop - start), length, device=device)
                for length, start, stop in zip(lengths, starts, starts[1:], strict=False)
            ]
        )
        slots = m.slot_mapping[: len(positions)].long()
        return Metadata(
            starts, lengths, positions, slots, m.block_table_tensor, self.kv_cache_spec.block_size
        )


class LatentBackend(AttentionBackend):
    """Says to vLLM what our attention is."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        """The name under which it is registered."""
        return "LOWKEY_LATENT"

    @staticmethod
    def get_impl_cls() -> type[LatentImpl]:
        """The class that computes."""
        return LatentImpl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """The class that makes metadata."""
        return Builder


class LatentImpl(AttentionImpl):
    """One layer's attention over its pages.

    Args:
        num_heads, head_size, scale, num_kv_heads: of the model.
        codec: the form of keys and values.
        layout: how they lie in pages.
        longest: the longest sequence that the engine takes.
        kv_cache_dtype, logits_soft_cap and others: of vLLM's layers; none of them is used here.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: Any,
        sliding_window: Any,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        codec: Codec,
        layout: Layout,
        longest: int,
    ) -> None:
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = (
            num_heads,
            head_size,
            scale,
            num_kv_heads,
        )
        self.kv_cache_dtype, self.softcap = kv_cache_dtype, logits_soft_cap or None
        self.codec, self.layout, self.longest = codec, layout, longest
        self.back = None if codec.order is None else codec.order.argsort()
        self.rotation: Rotation | None = None
        self.held: tuple[int, tuple[SidePages, SidePages]] | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Bring the maps to the dtype in which the model computes."""
        like = torch.empty(0, dtype=act_dtype, device=torch.get_default_device())
        self.codec, self.layout = self.codec.to_match(like), self.layout.to_dtype(act_dtype)
        rope = self.codec.rotates_when_read
        if rope is not None:
            self.rotation = rotation_below(rope, like, self.longest)
            self.positions = torch.arange(self.longest, dtype=torch.int32)
        self._warm_up(like)

    def _warm_up(self, like: Tensor) -> None:
        """Take a step over one page of zeros, so that kernels are compiled before the first user asks."""
        zero = torch.zeros(1, dtype=torch.long, device=like.device)
        page = torch.zeros(self.layout.page_shape(1, 32), dtype=self.layout.page_dtype, device=like.device)
        query = like.new_zeros(1, self.num_heads, self.head_size)
        md = Metadata([0, 1], [1], zero, zero, zero.unsqueeze(0), 32)
        self._step(query, md, *self.layout.of(page), torch.empty_like(query))

    def forward(
        self,
        layer: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store new tokens and attend; see vLLM's `AttentionImpl.forward`."""
        md = attn_metadata
        if md is None:
            return output.zero_()
        keys, values = self._sides(kv_cache)
        n = len(md.positions)
        self._write(key[:n], value[:n], md, keys, values)
        if md.decoding:
            self._step(query, md, keys, values, output)
        for i in md.reading:
            self._read([i], query, md, keys, values, output)
        return output

    def _sides(self, cache: Tensor) -> tuple[SidePages, SidePages]:
        """Keys and values in the engine's cache, which stays where it is."""
        if self.held is None or self.held[0] != cache.data_ptr():
            self.held = cache.data_ptr(), self.layout.of(cache)
        return self.held[1]

    def _write(self, key: Tensor, value: Tensor, md: Metadata, keys: SidePages, values: SidePages) -> None:
        k, v = (x.transpose(0, 1).unsqueeze(0) for x in (key, value))  # (1, h, n, d)
        if (order := self.codec.order) is not None:
            k, v = k[:, order], v[:, order]
        stored = self.codec.encode(k, v, md.token_positions)
        for side, x in zip((keys, values), stored, strict=True):
            side.write(x, *md.places)

    def _step(self, query: Tensor, md: Metadata, keys: SidePages, values: SidePages, output: Tensor) -> None:
        """One token of each sequence that decodes, over all of its pages."""
        at = md.decoding_tokens
        q = query[at].unflatten(1, (self.num_kv_heads, -1)).unsqueeze(3)  # (b, h, g, 1, d)
        if (order := self.codec.order) is not None:
            q = q[:, order]
        meets = self.codec.meets_stored_keys(self.softcap)
        counts = keys.side.heads, values.side.heads
        if meets:
            # what is added to all scores of a query for a mean changes nothing under one softmax
            q, _ = self.codec.project_query(q, md.positions[at].unsqueeze(1))
            rows_of_a_page = math.lcm(*counts)
        else:
            rows_of_a_page = self.num_kv_heads
        pages = md.pages
        k, v = (side.rows(md.lanes(side, rows_of_a_page)) for side in (keys, values))
        lengths = md.of_rows("lengths", rows_of_a_page)
        rebuilding = None if meets else self._rebuilding(md, rows_of_a_page)
        by_row = q.flatten(1, 3).unflatten(1, (rows_of_a_page, -1))[pages.sequence].flatten(0, 1)
        ready = None
        if meets or rebuilding is not None:
            segment = StepSegment(k, v, lengths, as_latents=True, rebuilding=rebuilding)
            ready = prepared_segments(by_row.shape[1], [segment])
        if ready is None:
            self._read(md.decoding, query, md, keys, values, output)
            return
        queries = (by_row, None) if meets else (None, by_row)
        sums, _, _, lse = ready.attend(queries, self.scale, self.softcap)
        assert sums is not None and lse is not None
        out, _ = merged(sums, lse, pages, len(md.decoding), rows_of_a_page)  # (b, rows, m, r)
        b, h = len(md.decoding), self.num_kv_heads
        out = self.codec.expand_output(out.view(b, h, -1, 1, out.shape[-1]))
        if self.back is not None:
            out = out[:, self.back]
        output[at] = out.reshape(b, self.num_heads, -1).to(output.dtype)

    def _rebuilding(self, md: Metadata, rows_of_a_page: int) -> Rebuilding | None:
        """How keys that are stored before rotation are rebuilt; None for such as have another form."""
        if self.rotation is None:
            return None
        maps, mean = self.codec.key_maps(self.num_kv_heads)
        return Rebuilding(maps, mean, self.positions, md.of_rows("starts", rows_of_a_page), self.rotation)

    def _read(
        self, rows: list[int], query: Tensor, md: Metadata, keys: SidePages, values: SidePages, output: Tensor
    ) -> None:
        """New tokens of some sequences, as many of each, over pages that are gathered and decoded."""
        chunk = md.chunk(tuple(rows))
        longest = chunk.positions.shape[1]
        k, v = (side.read(chunk.blocks)[:, :, :longest].to(query.dtype) for side in (keys, values))
        q = query[chunk.index].unflatten(2, (self.num_kv_heads, -1)).permute(0, 2, 3, 1, 4)  # (b, h, g, t, d)
        if (order := self.codec.order) is not None:
            q = q[:, order]
        if len(rows) > 1:  # blocks behind a shorter sequence may hold anything, also what is no number
            own = chunk.visible.any(1)[:, None, :, None]
            k, v = (torch.where(own, x, 0.0) for x in (k, v))
        segment = self.codec.segment(q, k, v, chunk.positions, chunk.at)
        segment = replace(segment, mask=chunk.visible)
        out = grouped.attend([segment], self.scale, self.softcap)
        if self.back is not None:
            out = out[:, self.back]
        output[chunk.index] = out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(output.dtype)


def merged(sums: Tensor, lse: Tensor, pages: PageRows, sequences: int, rows: int) -> Part:
    """Attention over whole sequences from that over their pages.

    Args:
        sums: (n rows, m, r), the output of every row of every page.
        lse: (n rows, m), their log-sum-exp.
        pages: of all sequences.
        sequences: b.
        rows: of a page.

    Returns:
        (b, rows, m, r), and its log-sum-exp (b, rows, m).
    """
    m, r = sums.shape[1:]
    if pages.longest == 1 and len(pages.blocks) == sequences:
        return sums.view(sequences, rows, m, r), lse.view(sequences, rows, m)
    scores = lse.new_full((sequences, pages.longest, rows, m), -torch.inf)
    out = sums.new_zeros(sequences, pages.longest, rows, m, r)
    scores[pages.sequence, pages.index] = lse.view(-1, rows, m)
    out[pages.sequence, pages.index] = sums.view(-1, rows, m, r)
    return (scores.softmax(1).unsqueeze(-1) * out).sum(1), scores.logsumexp(1)


class LatentAttention(Attention):
    """vLLM's attention layer with pages of latents.

    Args:
        codec: the form of keys and values.
        packings: of keys and of values.
        settings: of vLLM's layer.
    """

    backend: ClassVar[type[AttentionBackend]] = LatentBackend

    def __init__(self, codec: Codec, packings: tuple[Packing, Packing], **settings: Any) -> None:
        from vllm.config import get_current_vllm_config

        heads, width = settings["num_kv_heads"], settings["head_size"]
        dtype = torch.get_default_dtype()
        whole = torch.zeros(1, heads, 1, width)
        # what the codec makes of one token says how many heads of which width are stored
        with torch.device("cpu"):
            stored = codec.to_match(whole).encode(whole, whole, torch.zeros(1, 1, dtype=torch.long))
        sides = [
            Side(x.shape[1], x.shape[3], packing, dtype) for x, packing in zip(stored, packings, strict=True)
        ]
        self_layout = Layout(*sides)
        super().__init__(
            attn_backend=self.backend,
            codec=codec,
            layout=self_layout,
            longest=get_current_vllm_config().model_config.max_model_len,
            **settings,
        )
        self.layout = self_layout

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """What a page of this layer takes."""
        return page_spec(self.layout, vllm_config.cache_config.block_size)


def page_spec(layout: Layout, block_size: int) -> KVCacheSpec:
    """The bytes of a page, as vLLM counts them. A packed page is one of bytes."""
    dtype = layout.page_dtype
    key_bytes, value_bytes = layout.keys.token_bytes, layout.values.token_bytes
    size = dtype.itemsize
    return FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=1,
        head_size=key_bytes // size,
        head_size_v=value_bytes // size,
        dtype=dtype,
    )
