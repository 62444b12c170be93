"""Our own attention over pages of latents, at any widths and in any packing of single tokens.

A step of decoding reads pages where they lie, all sequences of a layer in one call of lowkey's kernel for
pages. Where that is not to be had, on a GPU, every page is a row for lowkey's other kernels, and the parts of
a sequence are merged by their log-sum-exp. Chunks of prompts are read as `reading` says; where the engine's
kernel cannot, a sequence's pages are gathered for matrix products, as lowkey's own cache takes them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lowkey.backends import grouped, numba_pages
from lowkey.backends.numba_pages import PagedRebuilding, Pages, Turns
from lowkey.backends.ragged import prepared_segments
from lowkey.backends.segment import Part
from lowkey.backends.stored import Rebuilding, StepSegment
from lowkey.storage.codec import Codec
from lowkey.storage.packing import Packing
from lowkey.storage.rebuilding import Rotation, rotation_below, turns_below
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from . import reading
from .batch import Builder, Metadata, PageRows, Shared
from .pages import Layout, Side, SidePages


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
        shared: with the other layers.
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
        shared: Shared,
    ) -> None:
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = (
            num_heads,
            head_size,
            scale,
            num_kv_heads,
        )
        self.kv_cache_dtype, self.softcap = kv_cache_dtype, logits_soft_cap or None
        self.codec, self.layout, self.longest, self.shared = codec, layout, longest, shared
        self.back = None if codec.order is None else codec.order.argsort()
        self.rotation: Rotation | None = None
        self.turns: Turns | None = None
        self.held: tuple[int, tuple[SidePages, SidePages]] | None = None
        self.paged: Pages | None = None  # of what is held

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Bring the maps to the dtype in which the model computes."""
        like = torch.empty(0, dtype=act_dtype, device=torch.get_default_device())
        self.codec, self.layout = self.codec.to_match(like), self.layout.to_dtype(act_dtype)
        rope = self.codec.rotates_when_read
        self.by_engine = reading.reads(self.codec, like, self.head_size)
        if rope is not None and like.device.type == "cpu":
            # a table of all positions, which layers share
            def turns() -> Turns:
                return turns_below(rope, like, self.longest, self.head_size)

            self.turns = self.shared.once((Turns, like.dtype), turns)
        elif rope is not None:
            self.rotation = rotation_below(rope, like, self.longest)
            self.positions = torch.arange(self.longest, dtype=torch.int32)
        self._warm_up(like)

    def _warm_up(self, like: Tensor) -> None:
        """Take a step over one page of zeros, so that kernels are compiled before the first user asks."""
        zero = torch.zeros(1, dtype=torch.long, device=like.device)
        page = torch.zeros(self.layout.page_shape(1, 32), dtype=self.layout.page_dtype, device=like.device)
        query = like.new_zeros(1, self.num_heads, self.head_size)
        md = Metadata([0, 1], [1], zero, zero, zero.unsqueeze(0).int(), 32)
        self._step(query, md, *self._sides(page), torch.empty_like(query))

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
        if self.by_engine:
            for how in md.readings:
                sides = keys, values
                reading.attend(how, self.codec, sides, query, output, self.scale, self.softcap)
        else:
            for i in md.reading:
                self._read([i], query, md, keys, values, output)
        return output

    def _sides(self, cache: Tensor) -> tuple[SidePages, SidePages]:
        """Keys and values in the engine's cache, which stays where it is."""
        if self.held is None or self.held[0] != cache.data_ptr():
            self.held = cache.data_ptr(), self.layout.of(cache)
            self.paged = self._paged(*self.held[1])
        return self.held[1]

    def _paged(self, keys: SidePages, values: SidePages) -> Pages | None:
        """The pages as one kernel reads them in a step; None if it cannot."""
        if not numba_pages.available() or not (keys.planes and values.planes):
            return None
        k, v = keys.paged(), values.paged()
        if keys.planes[0].device.type != "cpu" or not numba_pages.reads(k, v):
            return None
        rebuilding = None
        if not self.codec.meets_stored_keys(self.softcap):
            if self.turns is None:
                return None
            rebuilding = PagedRebuilding(*self.codec.key_maps(self.num_kv_heads), self.turns)
        return Pages(self.num_heads // math.lcm(k.heads, v.heads), k, v, keys.tokens, rebuilding)

    def _write(self, key: Tensor, value: Tensor, md: Metadata, keys: SidePages, values: SidePages) -> None:
        k, v = (x.transpose(0, 1).unsqueeze(0) for x in (key, value))  # (1, h, n, d)
        if (order := self.codec.order) is not None:
            k, v = k[:, order], v[:, order]
        stored = self.codec.encode(k, v, md.token_positions, md.turn(self.codec, k))
        for side, x in zip((keys, values), stored, strict=True):
            side.write(x, *md.places)

    def _step(self, query: Tensor, md: Metadata, keys: SidePages, values: SidePages, output: Tensor) -> None:
        """One token of each sequence that decodes, over all of its pages."""
        if self.paged is None:
            self._step_by_rows(query, md, keys, values, output)
            return
        at, b, h = md.decoding_tokens, len(md.decoding), self.num_kv_heads
        q = query[at].unflatten(1, (h, -1)).unsqueeze(3)  # (b, h, g, 1, d)
        if (order := self.codec.order) is not None:
            q = q[:, order]
        if self.codec.meets_stored_keys(self.softcap):
            # what is added to all scores of a query for a mean changes nothing under one softmax
            q, _ = self.codec.project_query(q, md.positions[at].unsqueeze(1))
        by_row = q.reshape(b * self.paged.rows, -1, q.shape[-1])
        out, _ = self.paged.attend(by_row, *md.decoding_pages, self.scale, self.softcap)
        out = self.codec.expand_output(out.view(b, h, -1, 1, out.shape[-1]))
        if self.back is not None:
            out = out[:, self.back]
        output[at] = out.reshape(b, self.num_heads, -1).to(output.dtype)

    def _step_by_rows(
        self, query: Tensor, md: Metadata, keys: SidePages, values: SidePages, output: Tensor
    ) -> None:
        """As `_step`, by kernels that know no pages."""
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
    weights = scores.softmax(1).nan_to_num(0.0)  # a sequence may have no page
    return (weights.unsqueeze(-1) * out).sum(1), scores.logsumexp(1)


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
