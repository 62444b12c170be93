"""How latents lie in the pages of an engine.

A page holds one layer's block of tokens. It begins with the keys, one *lane* after another: a lane is one
stored head of one block, all its tokens in order, so that kernels read it as they read any row. A packed lane
holds the scales of its tokens, then their offsets, then their codes. Values follow in the same way. What is
packed together is a *unit*: a token, or several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from lowkey.backends.numba_pages import PagedSide
from lowkey.backends.stored import StoredRows
from lowkey.storage.packing import Packing
from torch import Tensor


@dataclass(frozen=True)
class Side:
    """How keys or values lie in a page.

    Args:
        heads: stored heads.
        width: numbers of each, before they are packed.
        packing: of units.
        dtype: of numbers, or of scales and offsets.
    """

    heads: int
    width: int
    packing: Packing
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of all heads, if tokens are packed one by one."""
        return self.page_bytes(1)

    def page_bytes(self, tokens: int) -> int:
        """Bytes of some tokens of all heads, a multiple of what is packed together."""
        return self.heads * self.packing.nbytes(tokens, self.width, self.dtype.itemsize)


class SidePages:
    """The keys or the values in all pages of a layer.

    Args:
        side: how they lie there.
        pages: (blocks, bytes of a page), uint8; rows may lie apart.
        start: where they begin in a page, in bytes.
        tokens: of a page.
    """

    def __init__(self, side: Side, pages: Tensor, start: int, tokens: int) -> None:
        self.side, self.tokens = side, tokens
        self.planes: list[Tensor] = []
        if not side.width:  # of some of our own models, where keys hold everything
            return
        self.unit = side.packing.block
        lane_bytes, units = side.page_bytes(tokens) // side.heads, tokens // self.unit
        # lanes of one page and of the next lie at different distances; their common divisor is a distance
        # at which all of them lie, with numbers between them that are no lanes
        apart = math.gcd(pages.stride(0), lane_bytes)
        self.of_a_page, self.of_a_head = pages.stride(0) // apart, lane_bytes // apart
        count = (len(pages) - 1) * self.of_a_page + (side.heads - 1) * self.of_a_head + 1
        sample = self._packed(torch.zeros(1, side.heads, self.unit, side.width, dtype=side.dtype))
        # codes last: scales stand on multiples of their size
        order = [*range(1, len(sample)), 0]
        views: dict[int, Tensor] = {}
        at = pages.storage_offset() + start
        for i in order:
            *rest, last = sample[i].shape[2:]
            shape = [*rest, last * sample[i].element_size()]
            steps = [math.prod(shape[k:]) for k in range(len(shape))]  # from a unit to the next, and within
            plane = torch.as_strided(pages, (count, units, *shape), (apart, *steps, 1), at)
            views[i] = plane.view(sample[i].dtype)
            at += units * steps[0]
        self.planes = [views[i] for i in range(len(sample))]

    def _packed(self, x: Tensor) -> list[Tensor]:
        """New tokens (1, heads, n, width) as planes hold them: (units, heads, ...) for each plane."""
        parts = self.side.packing.pack(x)
        if self.unit == 1:
            return [part[0].transpose(0, 1) for part in parts]
        units = x.shape[2] // self.unit
        codes, *scales = (
            part[0] for part in parts
        )  # (heads, width, bytes of all units), (heads, width, units)
        return [codes.unflatten(2, (units, -1)).permute(2, 0, 1, 3), *(x.permute(2, 0, 1) for x in scales)]

    def lanes(self, blocks: Tensor) -> Tensor:
        """The lanes (*blocks, heads) of blocks."""
        heads = torch.arange(self.side.heads, device=blocks.device)
        return blocks.unsqueeze(-1) * self.of_a_page + heads * self.of_a_head

    def write(self, x: Tensor, blocks: Tensor, places: Tensor) -> None:
        """Store new tokens.

        Args:
            x: (1, heads, n, width).
            blocks: (units), the block of each unit.
            places: (units), its place there.
        """
        if not self.planes:
            return
        lanes, at = self.lanes(blocks), places.unsqueeze(1)
        for plane, part in zip(self.planes, self._packed(x.to(self.side.dtype)), strict=True):
            plane[lanes, at] = part

    def taken(self, blocks: Tensor, places: Tensor) -> Tensor:
        """Single tokens (*n, heads, width) of pages that are not packed.

        Args:
            blocks: (*n), the block of each token.
            places: (*n), its place there.
        """
        return self.planes[0][self.lanes(blocks), places.unsqueeze(-1)]

    def read(self, blocks: Tensor) -> Tensor:
        """The tokens (*b, heads, n tokens, width) of blocks (*b, n), decoded."""
        if not self.planes:
            shape = (*blocks.shape[:-1], self.side.heads, blocks.shape[-1] * self.tokens, 0)
            return torch.empty(shape, dtype=self.side.dtype, device=blocks.device)
        lanes = self.lanes(blocks).transpose(-1, -2)
        if self.unit == 1:
            parts = tuple(plane[lanes].flatten(-3, -2) for plane in self.planes)
        else:
            codes, *scales = (plane[lanes] for plane in self.planes)  # (*b, heads, n, units, width, ...)
            parts = (
                codes.flatten(-4, -3).transpose(-3, -2).flatten(-2),
                *(x.flatten(-3, -2).transpose(-2, -1) for x in scales),
            )
        return self.side.packing.unpack(parts, self.side.width)

    def paged(self) -> PagedSide:
        """All pages, as the kernel for pages reads them."""
        none = torch.empty(0, dtype=torch.long)
        return PagedSide(self.rows(none), self.of_a_page, self.of_a_head, self.side.heads)

    def rows(self, lanes: Tensor) -> StoredRows:
        """Lanes (R) as kernels read them."""
        numbers, scale, low = (*self.planes, None, None)[:3]
        bits = self.side.packing.bits
        assert bits is not None
        first = torch.zeros_like(lanes)
        return StoredRows(numbers, scale, low, bits, self.side.width, lanes, first)


@dataclass(frozen=True)
class Layout:
    """How one layer lies in its pages."""

    keys: Side
    values: Side

    @property
    def unit(self) -> int:
        """Tokens that are packed together, of keys or of values."""
        return max(self.keys.packing.block, self.values.packing.block)

    def unit_bytes(self) -> int:
        """Bytes of so many tokens."""
        return self.keys.page_bytes(self.unit) + self.values.page_bytes(self.unit)

    @property
    def page_dtype(self) -> torch.dtype:
        """In which the engine counts a page: bytes, if it is packed."""
        packed = self.keys.packing.bits or self.values.packing.bits
        return torch.uint8 if packed else self.keys.dtype

    def page_shape(self, blocks: int, tokens: int) -> tuple[int, int, int, int]:
        """The engine's cache of so many blocks."""
        return blocks, 1, tokens // self.unit, self.unit_bytes() // self.page_dtype.itemsize

    def of(self, cache: Tensor) -> tuple[SidePages, SidePages]:
        """The keys and the values in an engine's cache (blocks, 1, units, content)."""
        tokens = cache.shape[2] * self.unit
        pages = torch.as_strided(
            cache, (len(cache), cache[0].numel()), (cache.stride(0), 1), cache.storage_offset()
        )
        pages = pages.view(torch.uint8)
        return (
            SidePages(self.keys, pages, 0, tokens),
            SidePages(self.values, pages, self.keys.page_bytes(tokens), tokens),
        )

    def to_dtype(self, dtype: torch.dtype) -> Layout:
        """The same for numbers of another dtype."""
        return Layout(replace(self.keys, dtype=dtype), replace(self.values, dtype=dtype))
