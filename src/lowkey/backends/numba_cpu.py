"""Attention over ragged rows on a CPU, compiled by numba (optional: `pip install 'lowkey[cpu]'`).

Its speed is bounded by the memory's bandwidth. Rows are cut into pieces that threads take in turn, so rows of
very unequal length still share the work; the pieces of a row are merged by log-sum-exp. Keys and values are
read where they lie. bf16 and fp16 numbers are widened in registers, and sums are in fp32. No gradients.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

KERNEL_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
GROUPS = (1, 2, 4, 8)  # queries that share one reading of the keys; each is one more small compilation
LN2 = math.log(2)
_lock = Lock()  # one of numba's threading layers must not be entered by two threads at a time


@cache
def available() -> bool:
    """Whether numba is installed."""
    return find_spec("numba") is not None


def supports(dtype: torch.dtype) -> bool:
    """Whether keys of this dtype can be read."""
    return dtype in KERNEL_KINDS


def ragged(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, scaling: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of each row's queries over the row's tokens; see `naive.ragged` for arguments and results.

    The result is the same in every bit for any number of threads.
    """
    kernel, (rows, m, _), width = _kernel(), query.shape, values.shape[1]
    keys, values = _readable(keys, kernel.LANES), _readable(values.to(keys.dtype), kernel.LANES)
    out, lse = torch.empty(rows, m, values.shape[1]), torch.empty(rows, m)
    g = next((n for n in GROUPS if n >= m), GROUPS[-1])
    given = (
        query.detach().float().contiguous().numpy(),
        _place(keys),
        _place(values),
        starts.contiguous().numpy(),
    )
    with _lock:
        function = kernel.piece(g, KERNEL_KINDS[keys.dtype]).address
        kernel.decode_rows(
            function, g, *_scales(scaling, softcap), *given, out.numpy(), lse.numpy(), _threads()
        )
    return out if width == out.shape[2] else out[..., :width], lse


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


def _place(x: Tensor) -> tuple[int, int, int]:
    """(address, bytes from row to row, numbers of a row)."""
    return x.data_ptr(), x.stride(0) * x.element_size(), x.shape[1]


def _readable(x: Tensor, lanes: int) -> Tensor:
    """Rows of at least one vector of adjacent numbers, as the kernel reads them; mostly x itself."""
    if x.shape[1] < lanes:
        return pad(x, (0, lanes - x.shape[1]))
    return x if x.stride(1) == 1 else x.contiguous()
