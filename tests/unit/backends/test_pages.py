"""Attention over pages is what a softmax over each sequence's own tokens says, written out in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowkey.backends import numba_pages
from lowkey.backends.numba_pages import PagedRebuilding, PagedSide, Pages, Turns
from lowkey.backends.stored import StoredRows
from lowkey.storage.packing import PerChannel, PerToken, Unpacked

pytestmark = pytest.mark.skipif(not numba_pages.available(), reason="numba is not installed")
BLOCKS, BLOCK = 9, 64
TABLE = torch.tensor([[5, 2, 7, 0], [1, 0, 0, 0], [3, 8, 0, 0]], dtype=torch.int32)
LENGTHS = np.array([180, 7, 128])
PACKINGS = {  # of keys and of values
    "plain": (Unpacked(), Unpacked()),
    "int8": (PerToken(8), PerToken(8)),
    "int4": (PerToken(4), PerToken(4)),
    "kivi4": (PerChannel(4), PerToken(4)),
}
KINDS = [  # some pairs: each is compiled for itself
    *((packing, torch.float32) for packing in ("plain", "int4", "kivi4")),
    *((packing, torch.bfloat16) for packing in ("plain", "int8", "kivi4")),
]


def paged(packing, x):
    """(a side of pages whose lanes lie page by page, what was stored in fp64) of x (blocks, heads, n, r)."""
    parts = packing.pack(x)
    known = packing.unpack((parts[0], *(part.double() for part in parts[1:])), x.shape[-1]).double()
    if packing.block > 1:
        codes, *scales = parts
        units = x.shape[2] // packing.block
        parts = codes.unflatten(-1, (units, -1)).transpose(2, 3), *(part.transpose(2, 3) for part in scales)
    lanes = [part.flatten(0, 1).contiguous() for part in parts]
    numbers, scale, low = (*lanes, None, None)[:3]
    # lanes of all three lie equally far apart, as they do in pages
    if scale is not None:
        joined = torch.cat([part.flatten(1).view(torch.uint8) for part in (scale, low, numbers)], 1)
        width = scale.flatten(1).shape[1] * scale.element_size()
        scale, low = (
            joined[:, i * width : (i + 1) * width].view(x.dtype).unflatten(1, scale.shape[1:]) for i in (0, 1)
        )
        numbers = joined[:, 2 * width :].unflatten(1, numbers.shape[1:])
    empty = torch.empty(0, dtype=torch.long)
    stored = StoredRows(numbers, scale, low, packing.bits, x.shape[-1], empty, empty)
    return PagedSide(stored, x.shape[1], 1, x.shape[1]), known


def tokens(x, sequence):
    """The tokens (heads, n, r) of a sequence."""
    blocks = TABLE[sequence, : -(-LENGTHS[sequence] // BLOCK)].long()
    return x[blocks].transpose(0, 1).flatten(1, 2)[:, : LENGTHS[sequence]]


def attention(query, keys, values, scaling, softcap):
    """(m, v) of queries (m, d) over keys (n, d) and values (n, v)."""
    scores = query @ keys.T * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.softmax(-1) @ values


def rotated(keys, angles):
    """Keys (n, d) of which pairs of the first channels are turned by angles (n, p / 2)."""
    half = angles.shape[1]
    a, b, rest = keys[:, :half], keys[:, half : 2 * half], keys[:, 2 * half :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], 1)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("packing", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("queries", [3, 9])
def test_keys_that_queries_meet(packing, dtype, heads, queries):
    rank, width = 20, 38
    keys, k = paged(PACKINGS[packing][0], random(BLOCKS, heads[0], BLOCK, rank, dtype=dtype))
    values, v = paged(PACKINGS[packing][1], random(BLOCKS, heads[1], BLOCK, width, dtype=dtype, seed=1))
    rows = max(heads)
    query = random(3 * rows, queries, rank, seed=2)
    out, lse = Pages(queries, keys, values, BLOCK).attend(query, TABLE, LENGTHS, 0.4)
    for sequence in range(3):
        for row in range(rows):
            own_k, own_v = (tokens(x, sequence)[row * n // rows] for x, n in zip((k, v), heads, strict=True))
            at = sequence * rows + row
            asked = query[at].double()
            assert torch.allclose(out[at].double(), attention(asked, own_k, own_v, 0.4, None), atol=2e-5)
            assert torch.allclose(lse[at].double(), (asked @ own_k.T * 0.4).logsumexp(-1), atol=2e-5)


@pytest.mark.parametrize(("packing", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("shape", [(3, 20, 32, 32), (11, 33, 40, 24)], ids=str)
def test_keys_that_are_rebuilt(packing, dtype, heads, shape):
    """Of three KV heads; the embedding turns all channels, or leaves some alone."""
    queries, rank, d, turned = shape
    keys, k = paged(PACKINGS[packing][0], random(BLOCKS, heads[0], BLOCK, rank, dtype=dtype))
    values, v = paged(PACKINGS[packing][1], random(BLOCKS, heads[1], BLOCK, 18, dtype=dtype, seed=1))
    maps, mean = random(3, rank, d, dtype=dtype, seed=3) / 4, random(3, d, dtype=dtype, seed=4)
    angles = torch.arange(224.0).double()[:, None] / 10 ** torch.arange(turned // 2).double()
    rotation = torch.stack([angles.cos(), angles.sin()], 1).float().numpy()
    pages = Pages(
        3 // max(heads) * queries, keys, values, BLOCK, PagedRebuilding(maps, mean, Turns(rotation, d))
    )
    query = random(3, 3, queries, d, seed=2)
    asked = query.unflatten(1, (max(heads), -1)).flatten(0, 1).flatten(1, 2)
    out = pages.attend(asked, TABLE, LENGTHS, 0.3, 20.0)[0].view(3, 3, queries, 18)
    for sequence in range(3):
        for head in range(3):
            latents = tokens(k, sequence)[head * heads[0] // 3].to(dtype).double()
            own_keys = rotated(latents @ maps[head].double() + mean[head].double(), angles[: len(latents)])
            own_values = tokens(v, sequence)[head * heads[1] // 3]
            expected = attention(query[sequence, head].double(), own_keys, own_values, 0.3, 20.0)
            assert torch.allclose(
                out[sequence, head].double(), expected, atol=2e-5 if dtype == torch.float32 else 2e-3
            )


def test_large_pages_are_cut_and_threads_share_them():
    keys, k = paged(Unpacked(), random(2, 1, 1024, 16))
    values, v = paged(Unpacked(), random(2, 1, 1024, 16, seed=1))
    query, table = random(1, 2, 16, seed=2), torch.tensor([[1, 0]], dtype=torch.int32)
    expected = attention(
        query[0].double(), *(torch.cat([x[1, 0], x[0, 0]])[:1500] for x in (k, v)), 1.0, None
    )
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(Pages(2, keys, values, 1024).attend(query, table, np.array([1500]), 1.0)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    assert torch.allclose(found[0][0].double(), expected, atol=2e-5)


def test_what_lies_behind_a_sequence_is_not_read():
    """Memory that was never written may hold what is no number."""
    x = random(BLOCKS, 1, BLOCK, 20)
    x[1, :, 7:] = torch.nan
    x[[0, 4, 6]] = torch.nan
    (keys, _), (values, _) = paged(Unpacked(), x), paged(Unpacked(), x)
    maps = random(1, 20, 32, seed=3)
    rotation = np.stack([np.ones((224, 16)), np.zeros((224, 16))], 1).astype(np.float32)
    for pages, width in (
        (Pages(3, keys, values, BLOCK), 20),
        (Pages(3, keys, values, BLOCK, PagedRebuilding(maps, None, Turns(rotation, 32))), 32),
    ):
        out, _ = pages.attend(random(3, 3, width), TABLE, np.array([180, 7, 128]), 0.4)
        assert out.isfinite().all()


@pytest.mark.parametrize("hidden", [4, 70, 500])
def test_first_tokens_that_are_hidden(hidden):
    keys, k = paged(Unpacked(), random(BLOCKS, 1, BLOCK, 20))
    values, v = paged(Unpacked(), random(BLOCKS, 1, BLOCK, 20, seed=1))
    query = random(3, 2, 20, seed=2)
    out, lse = Pages(2, keys, values, BLOCK).attend(query, TABLE, LENGTHS, 0.4, None, hidden)
    for sequence in range(3):
        own_k, own_v = (tokens(x, sequence)[0, hidden:] for x in (k, v))
        asked = query[sequence].double()
        assert torch.allclose(out[sequence].double(), attention(asked, own_k, own_v, 0.4, None), atol=2e-5)
        assert torch.allclose(lse[sequence].double(), (asked @ own_k.T * 0.4).logsumexp(-1), atol=2e-5)


def test_a_sequence_without_tokens_sees_nothing():
    (keys, _), (values, _) = (paged(Unpacked(), random(BLOCKS, 1, BLOCK, 20)) for _ in range(2))
    out, lse = Pages(2, keys, values, BLOCK).attend(random(3, 2, 20), TABLE, np.array([5, 0, 70]), 0.4)
    assert out[[0, 2]].abs().sum() > 0 and lse[[0, 2]].isfinite().all()
    assert torch.equal(out[1], torch.zeros(2, 20)) and torch.equal(lse[1], torch.full((2,), -torch.inf))
