"""Keys that the kernel rebuilds from latents and rotates as it reads them, against fp64 by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from stored_rows import PACKINGS, draw, ragged

from lowkey.backends import numba_cpu
from lowkey.backends.ragged import prepared_segments
from lowkey.backends.stored import STRIDE, Rebuilding, StepSegment

pytestmark = pytest.mark.skipif(not numba_cpu.available(), reason="numba is not installed")
HEADS, WIDTH, STOP = 3, 32, 4096
FACTOR = 1.3  # as YaRN scales cosines and sines
LENGTHS = (150, 0, 33, 1, 64, 7)  # of two sequences


def rotation(p, bits):
    """The tables of an embedding of p channels, and its angles per position."""
    angle = 10000.0 ** (-torch.arange(0, p, 2).double() / p)

    def table(x):
        at = x.double()[:, None] * angle
        return torch.stack([at.cos(), at.sin()], 1).float().numpy()

    coarse = table(torch.arange(0, STOP, STRIDE)) * np.float32(FACTOR)
    return (coarse, table(torch.arange(STRIDE)), bits), angle


def made(how, rank, p, d, dtype, lengths=LENGTHS, with_mean=True, stop=STOP, shared=False):
    """(a segment, rotated keys of each row in fp64, their values)."""
    generator = torch.Generator().manual_seed(1)
    tables, angle = rotation(p, numba_cpu.MANTISSA[dtype])
    keys, numbers = ragged(how, draw(lengths, 1, rank, dtype, 2), lengths)
    values, own = ragged("plain", draw(lengths, 1, WIDTH, dtype, 3), lengths)
    maps = (torch.randn(HEADS, rank, d, generator=generator) / rank**0.5).to(dtype)
    mean = torch.randn(HEADS, d, generator=generator).to(dtype) if with_mean else None
    if shared:
        maps, mean = maps[:1].expand(HEADS, -1, -1), mean[:1].expand(HEADS, -1)
    positions = torch.randint(0, stop, (sum(lengths) + 5,), generator=generator).int()
    firsts = np.cumsum([5, *lengths[:-1]])
    # integers are decoded to numbers of the model's dtype
    latents = numbers[:, 0].to(dtype).double() if how != "plain" else numbers[:, 0]
    rotated = []
    for row, (first, n) in enumerate(zip(firsts, lengths, strict=True)):
        key = latents[first - 5 : first - 5 + n] @ maps[row % HEADS].double()
        key = key if mean is None else key + mean[row % HEADS].double()
        at = positions[first : first + n].double()[:, None] * angle
        cos, sin = ((FACTOR * x).to(dtype).double() for x in (at.cos(), at.sin()))
        a, b = key[:, : p // 2], key[:, p // 2 : p]
        rotated.append(torch.cat([a * cos - b * sin, b * cos + a * sin, key[:, p:]], 1))
    rebuilding = Rebuilding(maps, mean, positions, torch.from_numpy(firsts), tables)
    segment = StepSegment(keys, values, torch.tensor(lengths), True, 0, rebuilding)
    return segment, rotated, own[:, 0].split(list(lengths))


def check(made, m, scaling, atol, softcap=None, lengths=LENGTHS):
    """One kernel call, against the definition."""
    segment, rotated, values = made
    d = rotated[0].shape[1]
    query = torch.randn(len(lengths), m, d, generator=torch.Generator().manual_seed(5))
    kernel = prepared_segments(m, [segment])
    sums, _, _, lse = kernel.attend((None, query), scaling, softcap)
    for row, n in enumerate(lengths):
        scores = rotated[row] @ query[row].double().mT * scaling
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        wanted = (scores.softmax(0).mT @ values[row], scores.logsumexp(0)) if n else (0.0, -torch.inf)
        for found, exact in zip((sums, lse), wanted, strict=True):
            own = found[row].double()
            torch.testing.assert_close(
                own, torch.as_tensor(exact).expand_as(own).double(), atol=atol, rtol=atol
            )


@pytest.mark.parametrize("how", PACKINGS)
@pytest.mark.parametrize("rank", [10, 33, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_packing_is_rebuilt(how, rank, dtype):
    # a scaling that keeps scores small: an angle next to the middle of two numbers is rounded to either
    atol = {torch.float32: 3e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    check(made(how, rank, 64, 64, dtype), 3, 0.05, atol)


@pytest.mark.parametrize(
    ("p", "d"), [(16, 16), (64, 64), (32, 64), (96, 96), (80, 80), (24, 100), (128, 128), (256, 256)]
)
@pytest.mark.parametrize("m", [1, 2, 5, 8, 11])
def test_any_width_and_part_of_a_head_is_rotated(p, d, m):
    check(made("plain", 40, p, d, torch.float32), m, 0.1, 5e-4)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_mean", [False, True])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 1023, 1500])
def test_rows_of_any_length_are_rebuilt(n, with_mean, softcap):
    lengths = (n, n, 2)
    found = made("channel4", 24, 64, 64, torch.float32, lengths, with_mean)
    check(found, 4, 0.1, 5e-4, softcap, lengths=lengths)


def test_angles_are_rounded_as_the_model_rounds_them():
    # positions below STRIDE are in one table as they are, so that rounding has one answer
    found = made("plain", 32, 64, 64, torch.bfloat16, stop=STRIDE)
    check(found, 3, 0.5, 1e-4)
    segment, rotated, values = found
    tables = (*segment.rebuilding.rotation[:2], 0)
    unrounded = replace(segment, rebuilding=replace(segment.rebuilding, rotation=tables))
    with pytest.raises(AssertionError):
        check((unrounded, rotated, values), 3, 0.5, 1e-4)


@pytest.mark.parametrize("how", ["plain", "token4", "channel2"])
def test_threads_do_not_change_rebuilt_keys(how):
    segment, _, _ = made(how, 48, 64, 64, torch.bfloat16)
    query = torch.randn(len(LENGTHS), 3, 64, generator=torch.Generator().manual_seed(5))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(prepared_segments(3, [segment]).attend((None, query), 0.1))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        assert np.array_equal(a, b)


def test_maps_may_be_views():
    segment, rotated, values = made("plain", 32, 64, 64, torch.float32)
    wide = torch.zeros(HEADS, 64, 70).copy_(torch.nn.functional.pad(segment.rebuilding.maps.mT, (3, 35)))
    views = wide[..., 3:35].mT
    assert torch.equal(views, segment.rebuilding.maps) and views.stride(2) != 1
    seen = replace(segment, rebuilding=replace(segment.rebuilding, maps=views))
    check((seen, rotated, values), 3, 0.1, 5e-4)


def test_one_map_may_serve_all_heads():
    check(made("token8", 32, 64, 64, torch.float32, shared=True), 2, 0.1, 5e-4)
