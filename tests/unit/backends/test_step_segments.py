"""One kernel call over tokens of several kinds, against fp64 by hand."""

from __future__ import annotations

import pytest
import torch
from step_segments import KINDS, LATENT, ROWS, WIDTH, attention_by_hand, made, moved

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
    for x, y, latents in zip(found, wanted, (True, False, True, None), strict=True):
        if latents is not None and not any(k[3] is latents for k in kinds):
            assert x is None or not latents
            continue
        y = torch.where(y.isinf(), -torch.inf, y)
        torch.testing.assert_close(x.double(), y, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kinds", KINDS, ids=len)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_segments_have_biases_and_columns_of_their_own(kinds, softcap):
    segments, numbers = made(kinds, torch.float32)
    segments, generator = moved(segments), torch.Generator().manual_seed(9)
    latent, query, bias = (torch.randn(ROWS, 3, n, generator=generator) for n in (LATENT + 40, WIDTH + 40, 1))
    found = numba_cpu.Segments(3, segments).attend((latent, query), 0.1, softcap, bias=bias[..., 0])
    wanted = attention_by_hand(kinds, numbers, latent, query, 0.1, softcap, bias[..., 0], segments)
    for x, y, latents in zip(found, wanted, (True, False, None, None), strict=True):
        if x is not None and (latents is None or any(k[3] is latents for k in kinds)):
            torch.testing.assert_close(x.double(), y, atol=2e-4, rtol=2e-4)
