"""Attention over ragged rows on CUDA, by Triton.

Rows are cut into pieces that run side by side, and the pieces of a row are merged by log-sum-exp. The number
of pieces is bounded from shapes alone, so nothing waits for the device. Products are taken in the dtype of
what is stored and summed in fp32. Checked against loops in Triton's interpreter, and compiled for sm_80 and
sm_90; not yet run on a GPU.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

# tokens of a piece, and the pieces that the tokens of a call are cut into, about and at least
SMALLEST_SPLIT, LARGEST_SPLIT, LEAST_SPLITS = 128, 4096, 512
TILE_BYTES = 2**14  # of keys that one step of a program reads at most
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available() -> bool:
    """Whether there are a CUDA device and Triton."""
    return torch.cuda.is_available() and find_spec("triton") is not None


def supports(dtype: torch.dtype) -> bool:
    """Whether keys of this dtype can be read."""
    return dtype in KERNEL_DTYPES


def ragged(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, scaling: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of each row's queries over the row's tokens; see `naive.ragged` for arguments and results."""
    (rows, m, r), v = query.shape, values.shape[1]
    query, keys, values = query.to(keys.dtype).contiguous(), _readable(keys), _readable(values)
    out, lse = (torch.empty(rows, m, *rest, device=query.device) for rest in ((v,), ()))
    if rows * m == 0:
        return out, lse
    size = _size(len(keys))
    first, row_of = _pieces(starts, size, len(keys) // size + rows)
    parts, lses = (torch.empty(len(row_of), m, *rest, device=query.device) for rest in ((v,), ()))
    queries = min(max(16, _power(m)), 64)  # tl.dot wants tiles of at least 16 rows
    blocks = {"M": queries, "N": _tokens(r, keys.element_size()), "R": _padded(r), "V": _padded(v)}
    # the interpreter has no bf16 products
    kind = {"CAPPED": softcap is not None, "EXACT": keys.dtype == torch.float32 or not keys.is_cuda}
    shape = scaling, softcap or 1.0, size, m, r, v, keys.stride(0), values.stride(0)
    _kernel().attend[len(row_of), -(-m // queries)](
        query, keys, values, starts, first, row_of, parts, lses, *shape, **kind, **blocks
    )
    _kernel().merge[rows, m](parts, lses, first, out, lse, m, v, V=_padded(v))
    return out, lse


@cache
def _kernel() -> ModuleType:
    from lowkey.backends import triton_kernel

    return triton_kernel


def _pieces(starts: Tensor, size: int, most: int) -> tuple[Tensor, Tensor]:
    """Cut rows into pieces of `size` tokens.

    Returns:
        (the number of each row's first piece (R + 1), the row of each piece (most), -1 behind the last).
    """
    first = pad(((starts.diff() + size - 1) // size).cumsum(0), (1, 0))
    piece = torch.arange(most, device=starts.device)
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
