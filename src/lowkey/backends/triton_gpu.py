"""Attention over stored rows on CUDA, by Triton.

Rows are cut into pieces that run side by side, and the pieces of a row are merged by log-sum-exp. The number
of pieces is bounded from shapes alone, so nothing waits for the device. Products are taken in the dtype of
what is stored and summed in fp32. Checked against loops in Triton's interpreter, and compiled for sm_80 and
sm_90; not yet run on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lowkey.backends.stored import STRIDE, Rebuilding, StepSegment, StoredRows

# tokens of a piece, and the pieces that the tokens of a call are cut into, about and at least
SMALLEST_SPLIT, LARGEST_SPLIT, LEAST_SPLITS = 128, 4096, 512
TILE_BYTES = 2**14  # of keys that one step of a program reads at most
MERGED_NUMBERS = 2**12  # of parts that the merging program reads at a time
LATENTS_AT_ONCE = 64  # channels of latents that keys are rebuilt from at a time
WIDE = 128  # channels beyond which a program has more warps
# channels of what a program reads whole: tiles of more do not fit into the shared memory of an A100
WIDEST_ROW = {torch.float32: 256, torch.bfloat16: 1024, torch.float16: 1024}


def available() -> bool:
    """Whether there are a CUDA device and Triton."""
    return torch.cuda.is_available() and find_spec("triton") is not None


def supports(dtype: torch.dtype) -> bool:
    """Whether keys of this dtype can be read."""
    return dtype in WIDEST_ROW


def reads(x: StoredRows) -> bool:
    """Whether these keys or values can be read where they lie."""
    same_strides = x.scale is None or x.low is None or x.scale.stride() == x.low.stride()
    return supports(x.dtype) and x.width <= WIDEST_ROW[x.dtype] and x.numbers.stride(-1) == 1 and same_strides


def reads_segment(x: StepSegment) -> bool:
    """Whether keys and values can be read where they lie."""
    if x.rebuilding is not None and not supports(x.rebuilding.maps.dtype):
        return False
    return reads(x.keys) and reads(x.values)


def ragged(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, scaling: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of each row's queries over the row's tokens; see `naive.ragged` for arguments and results."""
    lane = torch.zeros_like(starts[:-1])
    k, v = (
        StoredRows(_readable(x).unsqueeze(0), None, None, 0, x.shape[1], lane, starts[:-1])
        for x in (keys, values)
    )
    return stored_rows(query, k, v, starts.diff(), scaling, softcap)


def stored_rows(
    query: Tensor,
    keys: StoredRows,
    values: StoredRows,
    lengths: Tensor,
    scaling: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over keys and values as they are stored; see `stored.stored_rows` for arguments and results.

    Codes are widened in registers.
    """
    own = Segments(query.shape[1], [StepSegment(keys, values, lengths)])
    _, out, _, lse = own.attend((None, query), scaling, softcap, mask)
    return out, lse


class Segments:
    """Tokens of several kinds that the same queries attend to, prepared once for many calls.

    A call launches one kernel per segment and one that merges. Its grids and addresses are those of every
    other call, and what changes from step to step is read from memory on the device, so calls can be captured
    in a CUDA graph together with `move`.

    Queries and outputs are in one of two bases: that of latents (0) and that of the model (1).

    Attributes:
        widths: channels of outputs in either basis, 0 where there are none.
        fill_parts: whether the outputs of all segments have as many channels as those of their basis.
    """

    def __init__(
        self, queries: int, segments: Sequence[StepSegment], counts: np.ndarray | None = None
    ) -> None:
        """Prepare.

        Args:
            queries: of each row.
            segments: the tokens.
            counts: (n, S, 2, R), see `ragged.prepared_segments`; None if all segments have `lengths`.
        """
        device, self.rows = segments[0].values.lane.device, len(segments[0].values.lane)
        self.queries = min(max(16, _power(queries)), 64)  # tl.dot wants tiles of at least 16 rows
        self.widths = [
            max((s.values.width for s in segments if s.as_latents == latents), default=0)
            for latents in (True, False)
        ]
        self.fill_parts = all(s.values.width == self.widths[not s.as_latents] for s in segments)
        self.in_model_basis = torch.tensor([not s.as_latents for s in segments], device=device).to(
            torch.int32
        )
        self.places = torch.stack([_places(s) for s in segments]).unsqueeze(0)
        if counts is not None:
            changes = torch.from_numpy(counts).to(device)
            self.places = self.places.repeat(len(counts), 1, 1, 1)
            for i in (i for i, s in enumerate(segments) if s.lengths is None):
                self.places[:, i, 1:4:2] += changes[:, i, :1]
                self.places[:, i, 4] = changes[:, i, 1]
        biases = [s.bias if s.bias is not None else torch.zeros(self.rows, device=device) for s in segments]
        self.shifts = torch.stack(biases) if any(s.bias is not None for s in segments) else None
        self.step = 0 if counts is None else -1
        self.clock = torch.full((1,), self.step, dtype=torch.int64, device=device)
        firsts, rows_of, self.segments, at = [], [], [], 0
        for i, s in enumerate(segments):
            most = 0 if counts is None else int(counts[:, i, 1].max(initial=0))
            first, row_of, size = _cut(s, self.rows, most)
            firsts.append(first + at)
            rows_of.append(row_of)
            self.segments.append(_Prepared(s, at, len(row_of), size))
            at += len(row_of)
        self.first_piece, self.row_of = torch.stack(firsts), torch.cat(rows_of)
        self.tables = list(zip(self.first_piece, self.places[0], strict=True))

    def tensors(self) -> list[Tensor]:
        """The tensors that are held besides what is stored."""
        own = [x for s in self.segments if s.constants["ROTATED"] for x in s.rotation]
        tables = [self.clock, self.places, self.in_model_basis, self.first_piece, self.row_of]
        tables += [] if self.shifts is None else [self.shifts]
        return tables + [x for x in own if isinstance(x, Tensor)]

    def move(self, step: int) -> None:
        """Let the next call be that of this step, for segments whose tokens change from step to step."""
        if step == self.step + 1:  # what a captured graph repeats
            self.clock.add_(1)
        elif step != self.step:
            self.clock.fill_(step)
        self.step = step

    def attend(
        self,
        queries: tuple[Tensor | None, Tensor | None],
        scaling: float,
        softcap: float | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        sums_only: bool = False,
        share_beside: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attention over all segments, under one softmax.

        Args:
            queries: (R, m, r) in either basis; None where no segment is met in it. R may be two dimensions,
                in any order in memory; those of results are the same.
            scaling: what scores are multiplied with.
            softcap: the soft cap of scaled scores, or None.
            mask: (R', t, s), True where a query may attend; see `stored.stored_rows`. For one segment only.
            bias: (R, m), added to all scores in basis 0; None for none.
            sums_only: for other backends, which make no more results than are wanted.
            share_beside: whether the share is one more channel of the output in basis 0.

        Returns:
            (outputs (R, m, v) in basis 0 and in basis 1, whose sum over a common basis is attention; the
            share of the weights (R, m) in basis 0; the log-sum-exp of all scores (R, m)), in fp32.
        """
        given = next(x for x in queries if x is not None)
        shape, m = given.shape[:-1], given.shape[-2]
        rows = math.prod(shape[:-1])
        out_0, out_1, share, lse = (
            torch.empty(rows, m, *rest, device=given.device)
            for rest in ((self.widths[0],), (self.widths[1],), (), ())
        )
        if rows * m:
            asked: tuple[Tensor | None, ...] = queries
            shift = bias
            if len(shape) > 2:
                asked = tuple(None if x is None else x.reshape(rows, m, x.shape[-1]) for x in queries)
                shift = None if bias is None else bias.reshape(rows, m)
            with torch.cuda.device_of(given):  # Triton launches on the current device, whatever it is given
                self._launch(asked, (out_0, out_1, share, lse), scaling, softcap, mask, shift)
        if share_beside:
            out_0 = torch.cat([out_0, share.unsqueeze(2)], 2)
        if len(shape) == 2:
            return out_0, out_1, share, lse
        out_0, out_1 = (out.view(*shape, out.shape[-1]) for out in (out_0, out_1))
        return out_0, out_1, share.view(shape), lse.view(shape)

    def _launch(
        self,
        queries: tuple[Tensor | None, ...],
        outputs: tuple[Tensor, Tensor, Tensor, Tensor],
        scaling: float,
        softcap: float | None,
        mask: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        """Write what `attend` returns; see there for arguments."""
        (rows, m), device = outputs[3].shape, outputs[3].device
        width = max(self.widths)
        # a segment writes as many channels as it has, and merging reads as many as its basis has
        made = torch.empty if self.fill_parts else torch.zeros
        parts = made(len(self.row_of), m, width, device=device)
        lses = torch.empty(len(self.row_of), m, device=device)
        asked: dict[tuple[int, torch.dtype], Tensor] = {}
        for i, s in enumerate(self.segments):
            if (basis := s.basis, s.dtype) not in asked:
                query = queries[basis]
                assert query is not None
                asked[basis, s.dtype] = query.to(s.dtype).contiguous()
            query = asked[basis, s.dtype]
            s.attend(self, self.tables[i], query, scaling, softcap, mask, parts, lses)
        tile = _padded(width)
        _kernel().merge[rows, m](
            *(
                parts,
                lses,
                self.first_piece,
                self.in_model_basis,
                outputs[3] if bias is None else bias.contiguous(),
                outputs[3] if self.shifts is None else self.shifts,
            ),
            *(*outputs, scaling, len(self.segments), rows, m, width, *self.widths),
            BIASED=bias is not None,
            SHIFTED=self.shifts is not None,
            B=max(2, min(16, MERGED_NUMBERS // tile)),
            W=tile,
        )


class _Prepared:
    """One of the segments of `Segments`: what the launches of its kernel have in common."""

    def __init__(self, segment: StepSegment, first: int, pieces: int, size: int) -> None:
        """Prepare.

        Args:
            segment: the tokens.
            first: the number of its first piece.
            pieces: how many there are at most.
            size: tokens of a piece.
        """
        rebuilding, values = segment.rebuilding, segment.values
        keys = segment.keys
        self.first, self.pieces, self.size = first, pieces, size
        self.dtype = keys.dtype if rebuilding is None else rebuilding.maps.dtype
        self.basis = 0 if segment.as_latents and rebuilding is None else 1
        self.keys, self.values = _place(keys), _place(values)
        self.plan_maps, self.rotation = _plan_maps(rebuilding, keys), _rotation(rebuilding, keys)
        self.widths, self.column = (keys.width, values.width), segment.column
        pairs, rest = _channels(rebuilding)
        blocks = keys.unit > 1 or values.unit > 1
        widest = max(2 * pairs, keys.width if not pairs else 0, values.width)
        whole = not (keys.bits or values.bits or pairs)  # else there is a tile in fp32
        tile = _tokens(widest, keys.dtype.itemsize if whole else 4)
        self.constants: dict[str, Any] = {
            "K_BITS": keys.bits,
            "K_UNIT": keys.unit,
            "K_GROUP": _group(keys),
            "V_BITS": values.bits,
            "V_UNIT": values.unit,
            "V_GROUP": _group(values),
            "ROTATED": rebuilding is not None,
            "HAS_MEAN": rebuilding is not None and rebuilding.mean is not None,
            "PAIRS": pairs,
            "REST": rest,
            "STRIDE": STRIDE,
            "C": min(_padded(keys.width), LATENTS_AT_ONCE),
            "H": _padded(pairs),
            "E": _padded(rest) if rest else 0,
            "N": max(keys.unit, values.unit) if blocks else tile,
            "R": _padded(keys.width),
            "V": _padded(values.width),
        }

    def attend(
        self,
        own: Segments,
        tables: tuple[Tensor, Tensor],
        query: Tensor,
        scaling: float,
        softcap: float | None,
        mask: Tensor | None,
        parts: Tensor,
        lses: Tensor,
    ) -> None:
        """Write the parts of this segment; see `Segments.attend` for other arguments.

        Args:
            own: whose segment this is.
            tables: the first pieces and the places of its rows, as the kernel takes them.
        """
        rows, m = query.shape[:2]
        seen = own.clock if mask is None else mask.contiguous().view(torch.uint8)
        of_mask = (1, 1, 0) if mask is None else (rows // len(mask), mask.shape[1], mask.shape[2])
        _kernel().attend[self.pieces, -(-m // own.queries)](
            *(
                query[..., self.column :],
                tables[0],
                own.row_of,
                tables[1],
                own.clock,
                seen,
                parts,
                lses,
            ),
            *(self.keys, self.values, self.plan_maps + self.rotation),
            *(scaling, softcap or 1.0, self.first, self.size, rows, m, *self.widths, parts.shape[2]),
            *(own.places.stride(0) if len(own.places) > 1 else 0, query.shape[2], *of_mask),
            CAPPED=softcap is not None,
            MASKED=mask is not None,
            # the interpreter has no bf16 products
            EXACT=self.dtype == torch.float32 or not query.is_cuda,
            M=own.queries,
            num_warps=8 if max(self.constants["R"], self.constants["V"]) > WIDE else 4,
            num_stages=2,
            **self.constants,
        )


def _place(x: StoredRows) -> tuple[Tensor | int, ...]:
    """Where keys or values lie, as the kernel takes it.

    Returns:
        Numbers, scales and offsets; the steps of numbers from lane to lane, unit to unit and channel to
        channel; the same of scales; channels of a group.
    """
    scale, low = (x.numbers if t is None else t for t in (x.scale, x.low))
    channel = x.numbers.stride(2) if x.unit > 1 else 1
    return (
        *(x.numbers, scale, low),
        *(x.numbers.stride(0), x.numbers.stride(1), channel),
        *(scale.stride(0), scale.stride(1), scale.stride(2)),
        x.groups[1],
    )


def _group(x: StoredRows) -> int:
    """Channels of a token that share a scale, if the kernel can read one scale for all of them; else 0."""
    size = min(x.groups[1], _padded(x.width))
    return size if x.bits and x.unit == 1 and size == _power(size) else 0


def _plan_maps(x: Rebuilding | None, keys: StoredRows) -> tuple[Tensor, Tensor]:
    """The maps and means that rebuild keys, as the kernel takes them; any tensors where none are."""
    if x is None:
        return keys.numbers, keys.numbers
    return x.maps, x.maps if x.mean is None else x.mean


def _rotation(x: Rebuilding | None, keys: StoredRows) -> tuple[Tensor | int, ...]:
    """The rest of what rebuilds and rotates keys: tables, the number of maps, and steps within these."""
    if x is None:
        return (*[keys.numbers] * 4, 1, 1, 1, 1)
    coarse, fine = (torch.tensor(table, device=x.maps.device) for table in x.rotation[:2])
    of_mean = 0 if x.mean is None else x.mean.stride(0)
    return (x.positions, x.firsts, coarse, fine, len(x.maps), *x.maps.stride()[:2], of_mean)


def _channels(x: Rebuilding | None) -> tuple[int, int]:
    """(pairs of channels of a key that are rotated, channels that are not)."""
    if x is None:
        return 0, 0
    pairs = x.rotation[1].shape[2]
    return pairs, x.maps.shape[2] - 2 * pairs


@cache
def _kernel() -> ModuleType:
    from lowkey.backends import triton_kernel

    return triton_kernel


def _places(x: StepSegment) -> Tensor:
    """Where the tokens of each row are (6, R); see the kernel."""
    keys, values = x.keys, x.values
    hidden = torch.zeros_like(values.lane) + x.hidden
    lengths = torch.zeros_like(values.lane) if x.lengths is None else x.lengths
    return torch.stack([keys.lane, keys.first, values.lane, values.first, lengths, hidden])


def _cut(segment: StepSegment, rows: int, most: int) -> tuple[Tensor, Tensor, int]:
    """Cut a segment into pieces, as many as there may be at any step.

    Args:
        segment: the tokens.
        rows: of it.
        most: tokens of a row, if these change from step to step.

    Returns:
        (the number of each row's first piece (R + 1), the row of each piece, tokens of a piece).
    """
    device = segment.values.lane.device
    if segment.lengths is not None:
        tokens = min(segment.keys.most_tokens, segment.values.most_tokens)
        size = _size(tokens)
        return *_pieces(segment.lengths, size, tokens // size + rows), size
    size = _size(most * rows)
    pieces = max(-(-most // size), 1)
    first = torch.arange(0, (rows + 1) * pieces, pieces, device=device)
    return first, torch.arange(rows, device=device).repeat_interleave(pieces), size


def _pieces(lengths: Tensor, size: int, most: int) -> tuple[Tensor, Tensor]:
    """Cut rows into pieces of `size` tokens.

    Returns:
        (the number of each row's first piece (R + 1), the row of each piece (most), -1 behind the last).
    """
    first = pad(((lengths + size - 1) // size).cumsum(0), (1, 0))
    piece = torch.arange(most, device=lengths.device)
    return first, torch.searchsorted(first[1:], piece, right=True).masked_fill(piece >= first[-1], -1)


def _size(n: int) -> int:
    """Tokens of a piece, when a call has n tokens."""
    return min(max(_power(n // LEAST_SPLITS), SMALLEST_SPLIT), LARGEST_SPLIT)


def _tokens(r: int, element: int) -> int:
    """Tokens that a program reads in one step, for keys of r numbers of so many bytes."""
    return max(16, min(64, TILE_BYTES // (_padded(r) * element)))


def _padded(width: int) -> int:
    """The width of the tile that holds so many numbers: a power of two, and at least 16."""
    return max(16, _power(width))


def _power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _readable(x: Tensor) -> Tensor:
    """x with the numbers of a row side by side, as the kernel reads them."""
    return x if x.stride(1) == 1 else x.contiguous()
