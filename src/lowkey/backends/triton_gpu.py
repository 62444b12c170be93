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

from lowkey.backends.stored import StoredRows

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


def reads(x: StoredRows) -> bool:
    """Whether these keys or values can be read where they lie."""
    same_strides = x.scale is None or x.low is None or x.scale.stride() == x.low.stride()
    return supports(x.dtype) and x.numbers.stride(-1) == 1 and same_strides


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
    (rows, m, r), v = query.shape, values.width
    query = query.to(keys.dtype).contiguous()
    out, lse = (torch.empty(rows, m, *rest, device=query.device) for rest in ((v,), ()))
    if rows * m == 0:
        return out, lse
    tokens = min(keys.most_tokens, values.most_tokens)
    size = _size(tokens)
    first_piece, row_of = _pieces(lengths, size, tokens // size + rows)
    parts, lses = (torch.empty(len(row_of), m, *rest, device=query.device) for rest in ((v,), ()))
    places = torch.stack([keys.lane, keys.first, values.lane, values.first])
    seen = places if mask is None else mask.contiguous().view(torch.uint8)
    of_mask = (1, 1, 0) if mask is None else (rows // len(mask), mask.shape[1], mask.shape[2])
    queries = min(max(16, _power(m)), 64)  # tl.dot wants tiles of at least 16 rows
    element = query.element_size()
    blocks = {"M": queries, "N": _tokens(r, element), "R": _padded(r), "V": _padded(v)}
    # the interpreter has no bf16 products
    kind = {
        "K_BITS": keys.bits,
        "K_UNIT": keys.unit,
        "V_BITS": values.bits,
        "V_UNIT": values.unit,
        "CAPPED": softcap is not None,
        "MASKED": mask is not None,
        "EXACT": keys.dtype == torch.float32 or not query.is_cuda,
    }
    _kernel().attend[len(row_of), -(-m // queries)](
        query,
        lengths,
        first_piece,
        row_of,
        places,
        seen,
        parts,
        lses,
        *_place(keys),
        *_place(values),
        scaling,
        softcap or 1.0,
        size,
        rows,
        m,
        r,
        v,
        *of_mask,
        **kind,
        **blocks,
    )
    _kernel().merge[rows, m](parts, lses, first_piece, out, lse, m, v, V=_padded(v))
    return out, lse


def _place(x: StoredRows) -> tuple[Tensor | int, ...]:
    """Keys or values as `triton_kernel.decoded` takes them: tensors, strides, and channels of a group."""
    scale, low = (x.numbers if t is None else t for t in (x.scale, x.low))
    channel = x.numbers.stride(2) if x.unit > 1 else 1
    return (
        *(x.numbers, scale, low),
        *(x.numbers.stride(0), x.numbers.stride(1), channel),
        *(scale.stride(0), scale.stride(1), scale.stride(2)),
        x.groups[1],
    )


@cache
def _kernel() -> ModuleType:
    from lowkey.backends import triton_kernel

    return triton_kernel


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
