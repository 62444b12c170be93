"""Attention over ragged rows on a CPU, compiled by numba (optional: `pip install 'lowkey[cpu]'`).

Its speed is bounded by the memory's bandwidth. Rows are cut into pieces that threads take in turn, so rows of
very unequal length still share the work; the pieces of a row are merged by log-sum-exp. Keys and values are
read where they lie. bf16 and fp16 numbers are widened in registers, and sums are in fp32. No gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np
import torch

# taken now: an engine that serves may replace the name in torch by a function that does nothing
from torch import Tensor, get_num_threads, set_num_threads
from torch.nn.functional import pad

from lowkey.backends.stored import Rebuilding, StepSegment, StoredRows

KERNEL_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
GROUPS = (1, 2, 4, 8)  # queries that share one reading of the keys; each is one more small compilation
BLOCK = 32  # tokens of a block whose channels have scales of their own; masks are filled up to whole blocks
LN2 = math.log(2)
MANTISSA = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}  # bits that a dtype leaves out
NO_MASK, NO_BIAS = np.empty((0, 0, 0), np.uint8), np.empty((0, 0), np.float32)
LOCK = Lock()  # one of numba's threading layers must not be entered by two threads at a time


@cache
def available() -> bool:
    """Whether numba is installed."""
    return find_spec("numba") is not None


def supports(dtype: torch.dtype) -> bool:
    """Whether plain numbers or scales of this dtype can be read."""
    return dtype in KERNEL_KINDS


def reads_segment(x: StepSegment) -> bool:
    """Whether keys and values can be read where they lie."""
    if x.keys is None or not reads(x.values):
        return False
    return reads(x.keys) and (x.rebuilding is None or supports(x.rebuilding.maps.dtype))


def reads(x: StoredRows) -> bool:
    """Whether these keys or values can be read where they lie."""
    if not supports(x.dtype) or (x.numbers.ndim == 4 and x.unit != BLOCK):
        return False
    if x.scale is not None and x.low is not None:
        side_by_side = x.numbers.ndim == 4 or x.scale.shape[2] == 1 or x.scale.stride(2) == 1
        if x.scale.stride() != x.low.stride() or not side_by_side:
            return False
    return x.numbers.stride(-1) == 1


def ragged(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, scaling: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of each row's queries over the row's tokens; see `naive.ragged` for arguments and results.

    The result is the same in every bit for any number of threads.
    """
    k, v = (
        StoredRows(x.unsqueeze(0), None, None, 0, x.shape[1], torch.zeros_like(starts[:-1]), starts[:-1])
        for x in (keys, values.to(keys.dtype))
    )
    k, v = (x if x.numbers.stride(-1) == 1 else replace(x, numbers=x.numbers.contiguous()) for x in (k, v))
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

    Codes are widened in registers. The result is the same in every bit for any number of threads.
    """
    own = Segments(query.shape[1], [StepSegment(keys, values, lengths)])
    _, out, _, lse = own.attend((None, query), scaling, softcap, mask)
    assert out is not None and lse is not None
    return out, lse


class Segments:
    """Tokens of several kinds that the same queries attend to, prepared once for many calls.

    Queries and outputs are in one of two bases: that of latents (0) and that of the model (1).

    Attributes:
        widths: channels of outputs in either basis, 0 where there are none.
        places: (S, 5, R), int64, in the next call: the lane and first unit of each row's keys and of its
            values, and its tokens.
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
        kernel, pairs = kernel_module(), [(s.keys, s.values) for s in segments]
        self.group = g = next((n for n in GROUPS if n >= queries), GROUPS[-1])
        self.basis = np.array([not s.as_latents for s in segments], np.int64)
        self.places = np.zeros((len(pairs), 5, len(segments[0].values.lane)), np.int64)
        self.hidden = np.zeros_like(self.places[:, 0])
        self.firsts = np.zeros_like(self.places[:, 0])
        self.shifts = np.zeros_like(self.firsts, np.float32)
        with LOCK:
            plans = [
                None if s.rebuilding is None else _Rebuilding(k, s.rebuilding)
                for (k, _), s in zip(pairs, segments, strict=True)
            ]
        for i, (s, (k, v)) in enumerate(zip(segments, pairs, strict=True)):
            self.places[i, :4] = [x.numpy() for x in (k.lane, k.first, v.lane, v.first)]
            self.hidden[i] = s.hidden
            if s.lengths is not None:
                self.places[i, 4] = s.lengths.numpy()
            if s.rebuilding is not None:
                self.firsts[i] = s.rebuilding.firsts.numpy()
            if s.bias is not None:
                self.shifts[i] = s.bias.numpy() / np.float32(LN2)
        if counts is not None:
            self.steps = np.repeat(self.places[None], len(counts), 0)
            for i, s in enumerate(segments):
                if s.lengths is None:
                    self.steps[:, i, 1:4:2] += counts[:, i, :1]
                    self.steps[:, i, 4] = counts[:, i, 1]
        # the addresses below point into these
        self.held = [plans, [x for pair in pairs for y in pair for x in (y.numbers, y.scale, y.low)]]
        self.keys, self.values = (np.stack([place_of(x) for x in side]) for side in zip(*pairs, strict=True))
        nothing = np.zeros(kernel.DESCRIBED, np.int64)
        self.rebuilt = np.stack([nothing if p is None else p.described for p in plans])
        columns = [
            _moved(query_slots(s.keys, kernel.LANES) if p is None else p.slots, s.column)
            for s, p in zip(segments, plans, strict=True)
        ]
        self.key_slots = _joined(columns)
        self.value_slots = _joined([number_slots(*v.groups, v.width, kernel.LANES, True) for _, v in pairs])
        self.widths = [
            max((s.values.width for s in segments if s.as_latents == latents), default=0)
            for latents in (True, False)
        ]
        with LOCK:
            kinds = [
                (kind_read(k), kind_read(v), None if p is None else p.form)
                for (k, v), p in zip(pairs, plans, strict=True)
            ]
            self.functions = np.stack([_functions(g, *kind) for kind in kinds])

    def tensors(self) -> list[Tensor]:
        """None: tables are no tensors, and small."""
        return []

    def move(self, step: int) -> None:
        """Let the next call be that of this step; see `ragged.PreparedSegments`."""
        self.places = self.steps[step]

    def attend(
        self,
        queries: tuple[Tensor | None, Tensor | None],
        scaling: float,
        softcap: float | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        sums_only: bool = False,
        share_beside: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Attention over all segments, under one softmax.

        Args:
            queries: (R, m, r) in either basis; None where no segment is met in it. Keys that are rebuilt are
                met in the model's. R may be two dimensions, in any order in memory; those of results are
                the same, and the outer one of sums of latents has the shorter step.
            scaling: what scores are multiplied with.
            softcap: the soft cap of scaled scores, or None.
            mask: see `stored.stored_rows`.
            bias: (R, m), added to all scores in basis 0; None for none.
            sums_only: whether only the outputs are wanted. Making a tensor takes longer than its numbers do.
            share_beside: whether the share is one more channel of the output in basis 0.

        Returns:
            (outputs (R, m, v) in basis 0 and in basis 1, whose sum over a common basis is attention; the
            share of the weights (R, m) in basis 0; the log-sum-exp of all scores (R, m)), in fp32. None
            where no segment is in that basis.
        """
        shape = next(x.shape[:-1] for x in queries if x is not None)
        rows, m = math.prod(shape[:-1]), shape[-1]
        # where there is none, an empty array of the same kind, so that the kernel is compiled once
        both = [np.empty((rows, m, 0), np.float32) if x is None else as_numbers(x, 2) for x in queries]
        outputs = (
            *(np.empty((rows, m, width), np.float32) for width in self.widths),
            np.empty((rows, m), np.float32),
            np.empty((rows, m), np.float32),
        )
        seen = NO_MASK
        if mask is not None:
            seen = pad(mask, (0, -mask.shape[2] % BLOCK)).contiguous().view(torch.uint8).numpy()
        shift = NO_BIAS if bias is None else as_numbers(bias, 1) * np.float32(scaling / LN2)
        attend = kernel_module().attend_segments
        with LOCK, compiling(attend):
            attend(
                self.functions,
                self.group,
                *score_scales(scaling, softcap),
                *both,
                self.basis,
                self.keys,
                self.values,
                *self.key_slots,
                *self.value_slots,
                self.places,
                self.hidden,
                seen,
                shift,
                self.shifts,
                self.rebuilt,
                self.firsts,
                *outputs,
                usable_threads(),
            )
        sums, out, share, lse = outputs
        if share_beside:
            sums = np.concatenate([sums, share[..., None]], 2)
        sums = sums.reshape(*shape, sums.shape[-1])  # (not -1, which rows without queries leave open)
        if len(shape) > 2:  # maps of heads take the numbers of each head side by side
            sums = np.ascontiguousarray(sums.swapaxes(0, 1)).swapaxes(0, 1)
        return (
            torch.from_numpy(sums) if self.widths[0] else None,
            torch.from_numpy(out.reshape(*shape, out.shape[-1])) if self.widths[1] else None,
            torch.from_numpy(share.reshape(shape)) if self.widths[0] and not sums_only else None,
            None if sums_only else torch.from_numpy(lse.reshape(shape)),
        )


def as_numbers(x: Tensor, dims: int) -> np.ndarray:
    """The numbers of a tensor in fp32, adjacent, all but the last dimensions as one; mostly a view."""
    numbers = x.float().numpy(force=x.requires_grad)
    # numpy does without the tensor operations that this takes
    return np.ascontiguousarray(numbers.reshape(-1, *numbers.shape[-dims:]))


class _Rebuilding:
    """What the kernel is told of keys that are rebuilt. The caller keeps their maps and means alive.

    Attributes:
        form: whether pairs of bf16 are multiplied, and the bits that the rotation leaves out.
        described: as `numba_kernel` describes such keys.
        slots: which column of a query each number of a packed query is, -1 for none.
    """

    def __init__(self, keys: StoredRows, how: Rebuilding) -> None:
        kernel, rebuilding = kernel_module(), rebuilding_module()
        lanes, (h, rank, d) = kernel.LANES, how.maps.shape
        coarse, fine, bits = how.rotation
        by_pairs = int(rebuilding.MULTIPLIES_PAIRS and how.maps.dtype == torch.bfloat16)
        self.form = by_pairs, bits
        self.columns, self.slots = key_vectors(coarse.shape[2], d, lanes)
        pairs = self.columns.shape[1] // 2
        tables = (turns_of_vectors(x, pairs * lanes) for x in (coarse, fine))
        self.coarse, self.fine = tables
        self.positions = how.positions.numpy()
        groups, size = keys.groups
        numbers = groups * size
        number, mean = KERNEL_KINDS[how.maps.dtype], how.mean
        described = np.zeros(kernel.DESCRIBED, np.int64)
        described[: kernel.DECODER_AT] = (
            pairs,
            -(-numbers // 2) if by_pairs else numbers,
            h,
            rank,
            self.positions.ctypes.data,
            self.coarse.ctypes.data,
            self.fine.ctypes.data,
            self.columns.ctypes.data,
        )
        described[kernel.DECODER_AT : kernel.MAPS_AT] = (
            rebuilding.decoder(kind_stored(keys), by_pairs).address,
            rebuilding.packer(number, by_pairs).address,
            rebuilding.packer(number, 0).address,
        )
        for at, x in ((kernel.MAPS_AT, how.maps), (kernel.MEANS_AT, mean)):
            if x is not None:
                size = x.element_size()
                described[at : at + 1 + x.ndim] = x.data_ptr(), *(size * n for n in x.stride())
        self.described = described


def key_vectors(half: int, d: int, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of a key that is rebuilt: in pairs, first those that the embedding turns together.

    Args:
        half: pairs of channels that it turns.
        d: channels.
        lanes: numbers of a vector.

    Returns:
        (the first column and the number of columns of each vector (2, vectors), the column of each number of
        a packed query, -1 for none).
    """
    starts = [(i, half + i, min(lanes, half - i)) for i in range(0, half, lanes)]
    ends = [min(i + lanes, d) for i in range(2 * half, d, 2 * lanes)]
    rest = [
        (i, e, e - i, min(lanes, d - e)) for i, e in zip(range(2 * half, d, 2 * lanes), ends, strict=True)
    ]
    first = [x for a, b, _ in starts for x in (a, b)] + [x for a, b, _, _ in rest for x in (a, b)]
    count = [n for _, _, n in starts for _ in (0, 1)] + [x for _, _, n, m in rest for x in (n, m)]
    slots = [a + i if i < n else -1 for a, n in zip(first, count, strict=True) for i in range(lanes)]
    return np.array([first, count], np.int64), np.array(slots, np.int64)


def turns_of_vectors(x: np.ndarray, width: int) -> np.ndarray:
    """Cosines and sines (n, 2, p / 2), and up to this width those of an angle of 0."""
    rest = np.broadcast_to(np.array([[1.0], [0.0]], np.float32), (len(x), 2, width - x.shape[2]))
    return np.ascontiguousarray(np.concatenate([x, rest], 2) if rest.size else x)


@cache
def rebuilding_module() -> ModuleType:
    """The compiled module, loaded on first use."""
    kernel_module()
    from lowkey.backends import numba_rebuilding_kernel

    return numba_rebuilding_kernel


def _joined(slots: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(columns of all segments side by side, -1 where one has fewer; how many each has)."""
    counts = np.array([len(x) for x in slots], np.int64)
    joined = np.full((len(slots), counts.max()), -1, np.int64)
    for row, x in zip(joined, slots, strict=True):
        row[: len(x)] = x
    return joined, counts


@cache
def kernel_module() -> ModuleType:
    """The compiled module, loaded on first use.

    Starting numba's threads resets the thread count of an OpenMP that torch may share; it is put back.
    """
    import numba

    from lowkey.backends import numba_kernel

    threads = get_num_threads()
    numba.set_num_threads(1)
    set_num_threads(threads)
    return numba_kernel


@cache
def _functions(g: int, keys: str, values: str, form: tuple[int, int] | None) -> np.ndarray:
    """The addresses of the C functions for g queries over keys and values of these kinds.

    form: see `_Rebuilding`; None for keys that are not rebuilt.
    """
    from lowkey.backends.numba_cache import telling

    kernel = kernel_module()
    with telling():
        scorer = kernel.scorer(g, keys) if form is None else rebuilding_module().rebuilder(g, *form)
        return np.array([x.address for x in (scorer, kernel.softener(g), kernel.mixer(g, values))])


def compiling(function: Any) -> AbstractContextManager[None]:
    """For the call of a compiled function: says so if its first call takes long, because it is compiled."""
    if function.signatures:
        return nullcontext()
    from lowkey.backends.numba_cache import telling

    return telling(lambda: not function.signatures)


def usable_threads() -> int:
    """Give numba as many threads as torch has, and return their number."""
    import numba

    settings: Any = numba.config  # numba fills this module when it is imported
    threads = min(torch.get_num_threads(), settings.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    return threads


def score_scale(scaling: float, softcap: float | None = None) -> np.float32:
    """What a dot product is multiplied with, in the units of the kernel."""
    return score_scales(scaling, softcap)[0]


def score_scales(scaling: float, softcap: float | None) -> tuple[np.float32, np.float32]:
    """(what a dot product is multiplied with, the soft cap or 0).

    Scores are in units of ln 2, since the kernel raises 2 to them. Under a soft cap, the product becomes the
    argument of tanh, times 2 / ln 2.
    """
    if softcap is None:
        return np.float32(scaling / LN2), np.float32(0.0)
    return np.float32(2 * scaling / softcap / LN2), np.float32(softcap / LN2)


def kind_stored(x: StoredRows) -> str:
    """How numbers are stored, as `numba_vectors` and `numba_channels` name it."""
    number = KERNEL_KINDS[x.dtype]
    if not x.bits:
        return number
    return f"{'channel' if x.numbers.ndim == 4 else 'int'}{x.bits} {number}"


def place_of(x: StoredRows) -> np.ndarray:
    """Where keys or values are, as `numba_kernel` describes a place."""
    scale, low = (x.numbers if t is None else t for t in (x.scale, x.low))
    size, scale_size = x.numbers.element_size(), scale.element_size()
    by_channel = x.numbers.ndim == 4
    place = (
        *(t.data_ptr() for t in (x.numbers, scale, low)),
        x.numbers.stride(0) * size,
        scale.stride(0) * scale_size,
        x.numbers.stride(1) * size,
        scale.stride(1) * scale_size,
        x.numbers.stride(2) * size if by_channel else 0,
        scale.stride(2) * scale_size if by_channel else 0,
        *x.groups,
        x.unit,
    )
    return np.array(place, np.int64)


def kind_read(x: StoredRows) -> str:
    """The kind of numbers that are read vector by vector."""
    is_narrow = x.numbers.ndim == 3 and x.groups[1] < kernel_module().LANES
    return f"narrow {kind_stored(x)}" if is_narrow else kind_stored(x)


def query_slots(keys: StoredRows, lanes: int) -> np.ndarray:
    """Which column of a query each number of a packed query is, -1 for none."""
    groups, size = keys.groups
    if keys.unit > 1:  # channel after channel, in whole vectors
        size += -size % lanes
    return number_slots(groups, size, keys.width, lanes, once=True)


def _moved(slots: np.ndarray, columns: int) -> np.ndarray:
    """Slots of a query whose columns begin so many later."""
    return np.where(slots < 0, slots, slots + columns) if columns else slots


@cache
def number_slots(groups: int, size: int, width: int, lanes: int, once: bool = False) -> np.ndarray:
    """Which column each number of a packed query or output is, -1 for none; see `numba_vectors.Columns`.

    Args:
        groups: of channels.
        size: channels of a group.
        width: columns; the channels behind them only fill up the last group.
        lanes: numbers of a vector.
        once: whether a column has one slot only; else those that vectors share have two.
    """
    starts = [max(0, min(i, size - lanes)) for i in range(0, size, lanes)]
    columns = [
        group * size + start + i if start + i < size else -1
        for group in range(groups)
        for start in starts
        for i in range(lanes)
    ]
    found: set[int] = set()
    for i, column in enumerate(columns):
        if column >= width or (once and column in found):
            columns[i] = -1
        found.add(column)
    return np.array(columns, np.int64)
