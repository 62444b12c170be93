"""One kernel call over tokens of several kinds, and keys that are rotated there, against fp64 by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from step_segments import KINDS, LATENT, ROWS, WIDTH, attention_by_hand, made

from lowkey.backends import numba_cpu

pytestmark = pytest.mark.skipif(not numba_cpu.available(), reason="numba is not installed")


@pytest.mark.parametrize("m", [1, 3, 8])
@pytest.mark.parametrize("kinds", KINDS, ids=len)
@pytest.mark.parametrize(
    ("dtype", "softcap", "with_bias"),
    [(torch.float32, None, False), (torch.float32, None, True), (torch.bfloat16, 2.0, False)],
)
def test_all_kinds_share_one_softmax(kinds, m, dtype, softcap, with_bias):
    segments, numbers = made(kinds, dtype)
    generator = torch.Generator().manual_seed(9)
    latent, query, bias = (torch.randn(ROWS, m, n, generator=generator) for n in (LATENT, WIDTH, 1))
    bias = 3 * bias[..., 0] if with_bias else None
    kernel = numba_cpu.Segments(m, segments)
    found = kernel.attend((latent, query), 0.1, softcap, bias=bias)
    wanted = attention_by_hand(kinds, numbers, latent, query, 0.1, softcap, bias)
    for x, y, latents in zip(found, wanted, (True, False, None, None), strict=True):
        if latents is not None and not any(k[3] is latents for k in kinds):
            continue
        y = torch.where(y.isinf(), -torch.inf, y)
        torch.testing.assert_close(torch.from_numpy(x).double(), y, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("bits", [0, 16])
@pytest.mark.parametrize(("p", "d"), [(64, 64), (32, 64), (128, 128)])
@pytest.mark.parametrize("lanes", [1, 3])
def test_keys_are_rotated_at_their_own_positions(p, d, lanes, bits):
    m, t, generator = 2, 150, torch.Generator().manual_seed(1)
    keys = torch.randn(lanes, t, 3 // lanes * d, generator=generator)
    query = torch.randn(3, m, d, generator=generator)
    lengths, firsts = np.array([150, 0, 77]), np.array([5, 0, 200])
    positions = torch.randint(0, 4000, (400,), generator=generator).int()
    angle = 10000.0 ** (-torch.arange(0, p, 2).double() / p)

    def table(x):
        return torch.stack([(x[:, None] * angle).cos(), (x[:, None] * angle).sin()], 1).float().numpy()

    factor = 1.3  # as YaRN scales cos and sin
    coarse = factor * table(torch.arange(0, 4096, numba_cpu.STRIDE).double())
    rotation = coarse, table(torch.arange(numba_cpu.STRIDE).double()), bits
    out = np.full((3, m, 160), np.nan, np.float32)
    numba_cpu.rotated_dots(
        keys, query, positions.numpy(), firsts, lengths, rotation, np.float32(0.5), 10, out
    )
    for row in range(3):
        n = lengths[row]
        own = keys.view(lanes, t, -1, d).transpose(1, 2).flatten(0, 1)[row, :n].double()
        at = positions[firsts[row] : firsts[row] + n].double()[:, None] * angle
        cos, sin = factor * at.cos(), factor * at.sin()
        if bits:
            cos, sin = (x.bfloat16().double() for x in (cos, sin))
        a, b = own[:, : p // 2], own[:, p // 2 : p]
        rotated = torch.cat([a * cos - b * sin, b * cos + a * sin, own[:, p:]], 1)
        wanted = 0.5 * query[row].double() @ rotated.mT
        # a cosine next to the middle of two numbers of the dtype may be rounded to the other
        torch.testing.assert_close(
            torch.from_numpy(out[row, :, 10 : 10 + n]).double(), wanted, atol=0.1 if bits else 5e-3, rtol=0
        )
        assert np.isnan(out[row, :, 10 + n :]).all() and np.isnan(out[row, :, :10]).all()
