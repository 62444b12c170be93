"""Attention over ragged rows on a CPU, compiled by numba (optional: `pip install 'lowkey[cpu]'`).

Its speed is bounded by the memory's bandwidth. Rows are cut into pieces that threads take in turn, so rows of
very unequal length still share the work; the pieces of a row are merged by log-sum-exp. Keys and values are
read where they lie. bf16 and fp16 numbers are widened in registers, and sums are in fp32. No gradients.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lowkey.backends.stored import StoredRows

KERNEL_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
GROUPS = (1, 2, 4, 8)  # queries that share one reading of the keys; each is one more small compilation
BLOCK = 32  # tokens of a block whose channels have scales of their own; masks are filled up to whole blocks
LN2 = math.log(2)
_lock = Lock()  # one of numba's threading layers must not be entered by two threads at a time


@cache
def available() -> bool:
    """Whether numba is installed."""
    return find_spec("numba") is not None


def supports(dtype: torch.dtype) -> bool:
    """Whether plain numbers or scales of this dtype can be read."""
    return dtype in KERNEL_KINDS


def reads(x: StoredRows) -> bool:
    """Whether these keys or values can be read where they lie."""
    if not supports(x.dtype) or (x.numbers.ndim == 4 and x.unit != BLOCK):
        return False
    if x.scale is not None and x.low is not None:
        side_by_side = x.numbers.ndim == 4 or x.scale.shape[2] == 1 or x.scale.stride(2) == 1
        if x.scale.stride() != x.low.stride() or not side_by_side:
            return False
    return x.groups[1] >= _kernel().LANES and x.numbers.stride(-1) == 1


def ragged(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, scaling: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of each row's queries over the row's tokens; see `naive.ragged` for arguments and results.

    The result is the same in every bit for any number of threads.
    """
    lanes, width = _kernel().LANES, values.shape[1]
    k, v = (
        StoredRows(x.unsqueeze(0), None, None, 0, x.shape[1], torch.zeros_like(starts[:-1]), starts[:-1])
        for x in (_readable(keys, lanes), _readable(values.to(keys.dtype), lanes))
    )
    query = pad(query, (0, max(0, lanes - query.shape[2])))
    out, lse = stored_rows(query, k, v, starts.diff(), scaling, softcap)
    return out if width == out.shape[2] else out[..., :width], lse


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
    kernel, (rows, m, _) = _kernel(), query.shape
    out, lse = torch.empty(rows, m, values.width), torch.empty(rows, m)
    g = next((n for n in GROUPS if n >= m), GROUPS[-1])
    places = torch.stack([keys.lane, keys.first, values.lane, values.first, lengths]).numpy()
    seen = np.empty((0, 0, 0), np.uint8)
    if mask is not None:
        seen = pad(mask, (0, -mask.shape[2] % BLOCK)).contiguous().view(torch.uint8).numpy()
    given = (
        query.detach().float().contiguous().numpy(),
        _place(keys),
        _place(values),
        _query_slots(keys, kernel.LANES),
        _slots(*values.groups, values.width, kernel.LANES),
    )
    with _lock:
        functions = _functions(g, _kind(keys), _kind(values))
        scales = _scales(scaling, softcap)
        with _compiling(kernel.decode_rows):
            kernel.decode_rows(
                functions, g, *scales, *given, places, seen, out.numpy(), lse.numpy(), _threads()
            )
    return out, lse


@cache
def _kernel() -> ModuleType:
    """The compiled module, loaded on first use.

    Starting numba's threads resets the thread count of an OpenMP that torch may share; it is put back.
    """
    import numba

    from lowkey.backends import numba_kernel

    threads = torch.get_num_threads()
    numba.set_num_threads(1)
    torch.set_num_threads(threads)
    return numba_kernel


@cache
def _functions(g: int, keys: str, values: str) -> np.ndarray:
    """The addresses of the C functions for g queries over keys and values of these kinds."""
    from lowkey.backends.numba_cache import telling

    kernel = _kernel()
    with telling():
        compiled = kernel.scorer(g, keys), kernel.softener(g), kernel.mixer(g, values)
    return np.array([function.address for function in compiled])


def _compiling(function: Any) -> AbstractContextManager[None]:
    """For the call of a compiled function: says so if its first call takes long, because it is compiled."""
    if function.signatures:
        return nullcontext()
    from lowkey.backends.numba_cache import telling

    return telling(lambda: not function.signatures)


def _threads() -> int:
    """Give numba as many threads as torch has, and return their number."""
    import numba

    settings: Any = numba.config  # numba fills this module when it is imported
    threads = min(torch.get_num_threads(), settings.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    return threads


def _scales(scaling: float, softcap: float | None) -> tuple[np.float32, np.float32]:
    """(what a dot product is multiplied with, the soft cap or 0).

    Scores are in units of ln 2, since the kernel raises 2 to them. Under a soft cap, the product becomes the
    argument of tanh, times 2 / ln 2.
    """
    if softcap is None:
        return np.float32(scaling / LN2), np.float32(0.0)
    return np.float32(2 * scaling / softcap / LN2), np.float32(softcap / LN2)


def _kind(x: StoredRows) -> str:
    """How numbers are stored, as `numba_vectors` and `numba_channels` name it."""
    number = KERNEL_KINDS[x.dtype]
    if not x.bits:
        return number
    return f"{'channel' if x.numbers.ndim == 4 else 'int'}{x.bits} {number}"


def _place(x: StoredRows) -> np.ndarray:
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


def _query_slots(keys: StoredRows, lanes: int) -> np.ndarray:
    """Which column of a query each number of a packed query is, -1 for none."""
    groups, size = keys.groups
    if keys.unit > 1:  # channel after channel, in whole vectors
        size += -size % lanes
    return _slots(groups, size, keys.width, lanes, once=True)


@cache
def _slots(groups: int, size: int, width: int, lanes: int, once: bool = False) -> np.ndarray:
    """Which column each number of a packed query or output is, -1 for none; see `numba_vectors._Columns`.

    Args:
        groups: of channels.
        size: channels of a group.
        width: columns; the channels behind them only fill up the last group.
        lanes: numbers of a vector.
        once: whether a column has one slot only; else those that vectors share have two.
    """
    starts = [min(i, size - lanes) for i in range(0, size, lanes)]
    columns = [group * size + start + i for group in range(groups) for start in starts for i in range(lanes)]
    found: set[int] = set()
    for i, column in enumerate(columns):
        if column >= width or (once and column in found):
            columns[i] = -1
        found.add(column)
    return np.array(columns, np.int64)


def _readable(x: Tensor, lanes: int) -> Tensor:
    """Rows of at least one vector of adjacent numbers, as the kernel reads them; mostly x itself."""
    if x.shape[1] < lanes:
        return pad(x, (0, lanes - x.shape[1]))
    return x if x.stride(1) == 1 else x.contiguous()
