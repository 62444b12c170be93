"""How latents lie in pages: what is written comes back, and kernels read the same."""

from __future__ import annotations

import pytest
import torch
from lowkey.backends.ragged import stored_rows
from lowkey.storage.packing import PerChannel, PerToken, Unpacked

from lowkey_vllm.pages import Layout, Side

BLOCKS, TOKENS = 5, 32
PACKINGS = {"fp32": Unpacked(), "int8": PerToken(8), "int4": PerToken(4), "int2": PerToken(2)}
SIDES = {"alike": ((2, 8), (2, 8)), "unlike": ((1, 20), (3, 12)), "wide": ((2, 40), (1, 7))}


def cache_of(layout: Layout, spare: int = 0, tokens: int = TOKENS) -> torch.Tensor:
    """Pages as the engine gives them, with `spare` numbers between them."""
    *_, units, content = layout.page_shape(BLOCKS, tokens)
    pages = torch.zeros(BLOCKS, units * content + spare, dtype=layout.page_dtype)
    return pages[:, : units * content].unflatten(1, (1, units, content))


def filled(packing, shapes, dtype=torch.float32, spare=0):
    """(both sides, what was written into each (1, heads, n, width), blocks, places)."""
    layout = Layout(*(Side(heads, width, PACKINGS[packing], dtype) for heads, width in shapes))
    sides = layout.of(cache_of(layout, spare))
    # three tokens in each of two blocks, and a full block
    blocks = torch.tensor([3, 3, 3, 1, 1, 1, *[4] * TOKENS])
    places = torch.tensor([0, 1, 31, 5, 6, 7, *range(TOKENS)])
    generator = torch.Generator().manual_seed(0)
    written = [
        torch.randn(1, heads, len(blocks), width, generator=generator).to(dtype) for heads, width in shapes
    ]
    for side, x in zip(sides, written, strict=True):
        side.write(x, blocks, places)
    return sides, written, blocks, places


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("shapes", SIDES)
@pytest.mark.parametrize("spare", [0, 64])
def test_what_is_written_is_read(packing, shapes, spare):
    sides, written, blocks, places = filled(packing, SIDES[shapes], spare=spare)
    for side, x in zip(sides, written, strict=True):
        expected = PACKINGS[packing].unpack(PACKINGS[packing].pack(x), x.shape[-1])
        read = side.read(torch.arange(BLOCKS).unsqueeze(0))  # (1, heads, blocks tokens, width)
        assert torch.equal(read[:, :, blocks * TOKENS + places], expected)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_read_lanes_where_they_lie(packing, dtype):
    (keys, values), (k, v), _, _ = filled(packing, SIDES["alike"], dtype)
    whole = slice(6, 6 + TOKENS)  # the full block
    lanes = keys.lanes(torch.tensor([4])).flatten()
    query = torch.randn(2, 3, 8)
    out, _ = stored_rows(query, keys.rows(lanes), values.rows(lanes), torch.tensor([TOKENS, 9]), 0.3)
    k, v = (PACKINGS[packing].unpack(PACKINGS[packing].pack(x), 8)[0, :, whole].float() for x in (k, v))
    for head, length in enumerate((TOKENS, 9)):
        weights = (query[head] @ k[head, :length].T * 0.3).softmax(-1)
        assert torch.allclose(
            out[head], weights @ v[head, :length], atol=1e-4 if dtype == torch.float32 else 2e-2
        )


def test_a_page_is_as_large_as_its_tokens():
    layout = Layout(Side(3, 20, PerToken(8), torch.bfloat16), Side(2, 40, PerToken(4), torch.bfloat16))
    # 20 codes, a scale and an offset; two groups of 20 codes of half a byte, each with a scale and an offset
    assert (layout.keys.token_bytes, layout.values.token_bytes) == (3 * (20 + 4), 2 * 2 * (10 + 4))


def test_what_holds_nothing_is_read_as_nothing():
    layout = Layout(Side(2, 8, Unpacked(), torch.float32), Side(1, 0, Unpacked(), torch.float32))
    _, values = layout.of(cache_of(layout))
    values.write(torch.empty(1, 1, 1, 0), torch.tensor([0]), torch.tensor([0]))
    assert values.read(torch.tensor([[0, 1]])).shape == (1, 1, 2 * TOKENS, 0)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_tokens_are_packed_together(bits, dtype):
    """Keys with a scale for each channel of 32 tokens, beside values packed token by token."""
    layout = Layout(Side(2, 20, PerChannel(bits), dtype), Side(1, 24, PerToken(bits), dtype))
    keys, values = layout.of(cache_of(layout, tokens=64))
    generator = torch.Generator().manual_seed(0)
    k, v = (
        torch.randn(1, s.side.heads, 96, s.side.width, generator=generator).to(dtype) for s in (keys, values)
    )
    # three units: the second of block 4, the first of block 1, and the second of block 1
    keys.write(k, torch.tensor([4, 1, 1]), torch.tensor([1, 0, 1]))
    values.write(v, torch.tensor([4, 1, 1]).repeat_interleave(32), torch.arange(96).add(32) % 64)
    at = torch.cat([torch.arange(4 * 64 + 32, 4 * 64 + 64), torch.arange(64, 128)])
    for side, x in ((keys, k), (values, v)):
        packing = side.side.packing
        read = side.read(torch.arange(BLOCKS).unsqueeze(0))
        assert torch.equal(read[:, :, at], packing.unpack(packing.pack(x), x.shape[-1]))
    lanes = keys.lanes(torch.tensor([1])).flatten()
    decoded = keys.rows(lanes).decoded(0, 64, torch.float32)
    assert torch.allclose(decoded, keys.read(torch.tensor([[1]]))[0].float(), atol=1e-2)


def test_single_tokens_are_taken():
    (keys, _), (k, _), blocks, places = filled("fp32", SIDES["alike"])
    assert torch.equal(keys.taken(blocks[2:5], places[2:5]), k[0, :, 2:5].transpose(0, 1))
