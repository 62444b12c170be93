"""Our own attention over latents beside exact tokens, and over latents that are packed in blocks of tokens.

New tokens are stored exactly first (`exact`). When a block of tokens is complete, its latents are packed into
the sequence's page of latents, from where they are read when the window has left the block.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from lowkey.backends import grouped
from lowkey.backends.ragged import prepared_segments
from lowkey.backends.segment import Part, Segment, merge_seen
from lowkey.backends.stored import StepSegment
from lowkey.storage.codec import Codec
from lowkey.storage.packing import Packing
from lowkey.storage.rebuilding import rotation_below
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from . import reading
from .batch import Metadata
from .exact import SIDE_BY_SIDE, ExactMetadata, ExactPages, View
from .latent import LatentAttention, LatentBackend, LatentImpl, merged
from .pages import SidePages
from .windowed_reading import WindowedReading

HIDDEN = 32  # first tokens of a row that kernels can leave out


class WindowedBackend(LatentBackend):
    """Says to vLLM what our attention beside exact tokens is."""

    @staticmethod
    def get_name() -> str:
        """The name under which it is registered."""
        return "LOWKEY_WINDOWED"

    @staticmethod
    def get_impl_cls() -> type[LatentImpl]:
        """The class that computes."""
        return WindowedImpl

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """How pages of layers lie beside one another."""
        return SIDE_BY_SIDE


class Stored(NamedTuple):
    """What one layer stores of a batch's sequences.

    Args:
        md: the batch, for pages of latents.
        exact: the same for pages of exact tokens.
        latents: the layer's.
        pages: its exact tokens.
    """

    md: Metadata
    exact: ExactMetadata
    latents: tuple[SidePages, SidePages]
    pages: ExactPages

    def taken(self, sequences: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Exact keys and values (b, h, n, d) of tokens (b, n) of sequences (b, 1|n)."""
        size = self.exact.block_size
        blocks = self.exact.table[sequences, index // size].long()
        k, v = (side.taken(blocks, index % size).transpose(1, 2) for side in self.pages.sides())
        return k, v

    def latents_of(self, sequences: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The latents (b, G, count, r) of the first tokens of sequences (b)."""
        blocks = self.md.table[sequences, : -(-count // self.md.block_size)].long()
        k, v = (side.read(blocks)[:, :, :count] for side in self.latents)
        return k, v


class WindowedImpl(LatentImpl):
    """One layer's attention over its pages of latents and of exact tokens."""

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Bring the maps to the dtype in which the model computes."""
        super().process_weights_after_loading(act_dtype)
        rope = self.codec.rotates_when_read
        if rope is not None and self.turns is None:
            like = torch.empty(0, dtype=act_dtype, device=torch.get_default_device())
            self.rotation = rotation_below(rope, like, self.longest)
            self.positions = torch.arange(self.longest, dtype=torch.int32)

    def _warm_up(self, like: Tensor) -> None:
        """Take a step over one page of zeros; see `LatentImpl._warm_up`."""
        page = torch.zeros(self.layout.page_shape(1, 32), dtype=self.layout.page_dtype, device=like.device)
        paged = self._paged(*self.layout.of(page))
        if paged is not None:
            meets = self.codec.meets_stored_keys(self.softcap)
            width = self.layout.keys.width if meets else self.head_size
            query = like.new_zeros(paged.rows, self.num_heads // paged.rows, width)
            table, lengths = torch.zeros(1, 1, dtype=torch.int32), np.array([32])
            paged.attend(query, table, lengths, self.scale, self.softcap)

    def forward(
        self,
        layer: Any,
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
        md, pages = attn_metadata, layer.exact
        if md is None:
            return output.zero_()
        every: Any = get_forward_context().attn_metadata
        exact: ExactMetadata = every[pages.layer_name]
        stored = Stored(md, exact, self._sides(kv_cache), pages)
        n, order = len(md.positions), self.codec.order
        for side, x in zip(pages.sides(), (key, value), strict=True):
            new = x[:n].transpose(0, 1).unsqueeze(0)  # (1, h, n, d)
            side.write(new if order is None else new[:, order], *exact.places)
        self._pack(stored)
        if md.decoding:
            self._answer(md.decoding, query, stored, output)
        unit = self.layout.unit
        if self.by_engine and unit % 32 == 0 and md.block_size % unit == 0:
            for how in exact.readings(md, pages.sinks, pages.recent, unit):
                self._answer_chunk(how, query, stored, output)
        else:
            for i in md.reading:
                self._answer([i], query, stored, output)
        return output

    def _answer_chunk(self, how: WindowedReading, query: Tensor, stored: Stored, output: Tensor) -> None:
        """New tokens of some sequences, by the engine's kernel."""
        k, v = stored.taken(how.exact[:1], how.exact[1:])
        if how.blocks.shape[1]:
            far = reading.rebuilt(how, self.codec, stored.latents, query.dtype)
            for x, first in zip(far, stored.taken(how.sinks[:1], how.sinks[1:2]), strict=True):
                x[:, :, how.sinks[2]] = first
            k, v = (torch.cat(pair, 2) for pair in zip(far, (k, v), strict=True))
        reading.attend_to(how, self.codec, (k, v), query, output, self.scale, self.softcap)

    def _pack(self, stored: Stored) -> None:
        """Pack the units that the new tokens complete, out of the pages of exact tokens."""
        md, exact = stored.md, stored.exact
        sequence, index = exact.completed_units(self.layout.unit)
        if not len(index):
            return
        k, v = stored.taken(sequence, index.unsqueeze(0))
        for side, x in zip(stored.latents, self.codec.encode(k, v, index.unsqueeze(0)), strict=True):
            unit = side.side.packing.block
            of, first = sequence[::unit], index[::unit]
            place = first % md.block_size // unit
            side.write(x, md.table[of, first // md.block_size].long(), place)

    def _answer(self, rows: list[int], query: Tensor, stored: Stored, output: Tensor) -> None:
        """New tokens of some sequences, as many of each."""
        pages = stored.pages
        view = stored.exact.view(rows, pages.sinks, pages.recent, self.layout.unit)
        q = query[view.index].unflatten(2, (self.num_kv_heads, -1)).permute(0, 2, 3, 1, 4)  # (b, h, g, t, d)
        if (order := self.codec.order) is not None:
            q = q[:, order]
        row = torch.tensor(rows, device=view.index.device)
        segments = [Segment(q, *stored.taken(row.unsqueeze(1), view.exact), view.exact_mask)]
        far = self._far_step(q, view, stored) if rows == stored.md.decoding and view.stored else None
        if far is None and view.stored:
            k, v = stored.latents_of(row, view.stored)
            # places that no query sees may hold anything, also what is no number
            own = view.stored_mask.any(1)[:, None, :, None]
            k, v = (torch.where(own, x, 0.0).to(query.dtype) for x in (k, v))
            places = torch.arange(view.stored, device=row.device).expand(len(rows), -1)
            segments.append(replace(self.codec.segment(q, k, v, places, view.at), mask=view.stored_mask))
        if far is None:
            out = grouped.attend(segments, self.scale, self.softcap)
        else:
            # a token sees itself in one of both
            out, _ = merge_seen(grouped.partial(segments, self.scale, self.softcap), far)
        if self.back is not None:
            out = out[:, self.back]
        output[view.index] = out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(output.dtype)

    def _far_step(self, query: Tensor, view: View, stored: Stored) -> Part | None:
        """Attention of a step of decoding over latents, whose pages are read where they lie.

        Args:
            query: (b, h, g, 1, d), one token of each sequence that decodes.
            view: what they see.
            stored: of the layer.

        Returns:
            The output (b, h, g, 1, d) and its log-sum-exp (b, h, g, 1); None if no kernel can read the pages.
        """
        if self.paged is None:
            return self._far_by_rows(query, view, stored)
        b, h, g = query.shape[:3]
        shift, at = None, query
        if self.codec.meets_stored_keys(self.softcap):
            at, shift = self.codec.project_query(query, view.at)
        by_row = at.reshape(b * self.paged.rows, -1, at.shape[-1])
        table, _ = stored.md.decoding_pages
        left, sinks = view.left[:, 0].numpy(), stored.pages.sinks
        sums, lse = self.paged.attend(by_row, table, left, self.scale, self.softcap, sinks)
        out, total = self.codec.expand_output(sums.view(b, h, g, 1, -1)), lse.view(b, h, g, 1)
        return out, total if shift is None else total + shift.view(b, h, g, 1) * self.scale

    def _far_by_rows(self, query: Tensor, view: View, stored: Stored) -> Part | None:
        """As `_far_step`, by kernels that know no pages."""
        sinks, far = stored.pages.sinks, stored.exact.far(stored.md, view.left)
        meets = self.codec.meets_stored_keys(self.softcap)
        if sinks > HIDDEN or (far.pages.lengths[far.pages.index == 0] <= sinks).any():
            return None
        shift, at = None, query
        if meets:
            at, shift = self.codec.project_query(query, view.at)
        elif self.rotation is None:
            return None
        heads = [side.side.heads for side in stored.latents]
        rows = math.lcm(*heads) if meets else self.num_kv_heads
        k, v = (side.rows(far.lanes(side, rows)) for side in stored.latents)
        segment = StepSegment(
            k,
            v,
            far.of_rows("lengths", rows),
            as_latents=True,
            hidden=torch.where(far.pages.index == 0, sinks, 0).repeat_interleave(rows),
            rebuilding=None if meets else self._rebuilding(far, rows),
        )
        by_row = at.flatten(1, 3).unflatten(1, (rows, -1))[far.pages.sequence].flatten(0, 1)
        ready = prepared_segments(by_row.shape[1], [segment])
        if ready is None:
            return None
        sums, _, _, lse = ready.attend((by_row, None) if meets else (None, by_row), self.scale, self.softcap)
        assert sums is not None and lse is not None
        out, total = merged(sums, lse, far.pages, len(query), rows)
        b, h, g = query.shape[:3]
        out, total = self.codec.expand_output(out.view(b, h, g, 1, -1)), total.view(b, h, g, 1)
        return out, total if shift is None else total + shift.view(b, h, g, 1) * self.scale


class WindowedAttention(LatentAttention):
    """vLLM's attention layer with pages of latents, and others of exact tokens.

    Args:
        codec: the form of keys and values.
        packings: of keys and of values.
        exact: the layer's exact tokens.
        token_bytes: of a page, for each token; it may be more than latents take.
        settings: of vLLM's layer.
    """

    backend = WindowedBackend

    def __init__(
        self,
        codec: Codec,
        packings: tuple[Packing, Packing],
        exact: ExactPages,
        token_bytes: float,
        **settings: Any,
    ) -> None:
        super().__init__(codec, packings, **settings)
        self.exact, self.unit_bytes = exact, round(token_bytes * self.layout.unit)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """What a page of latents takes."""
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.layout.keys.width,
            dtype=self.layout.page_dtype,
            tokens_per_state=self.layout.unit,
            state_content_bytes=self.unit_bytes,
        )
