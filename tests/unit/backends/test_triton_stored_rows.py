"""The Triton kernel over rows as packings hold them, in Triton's interpreter, against fp64 loops."""

from __future__ import annotations

import pytest
import torch
from stored_rows import check

from lowkey.backends import triton_gpu

CASES = (
    (("plain", "plain"), (64, 80), torch.float32),
    (("token8", "token4"), (37, 21), torch.bfloat16),
    (("token2", "plain"), (96, 64), torch.float32),
    (("channel4", "token2"), (64, 80), torch.bfloat16),
    (("channel2", "channel8"), (37, 21), torch.float32),
)


@pytest.mark.parametrize(("how", "widths", "dtype"), CASES)
def test_triton_is_attention_over_what_the_packing_holds(how, widths, dtype, monkeypatch):
    monkeypatch.setattr(triton_gpu, "SMALLEST_SPLIT", 64)  # several pieces per row
    mask = torch.rand(2, 1, 200, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[0, 0, :130] = False
    mask[1] = False
    check(triton_gpu, how, (0, 1, 200, 33), 3, widths, dtype, 2.0, None, 5e-3)
    check(triton_gpu, how, (0, 33, 200, 64), 2, widths, dtype, None, mask, 5e-3)
