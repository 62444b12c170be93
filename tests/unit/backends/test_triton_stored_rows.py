"""The Triton kernel over rows as packings hold them, in Triton's interpreter, against fp64 loops."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

PAIRS = (
    ("plain", "plain"),
    ("token8", "token4"),
    ("token2", "plain"),
    ("channel4", "token2"),
    ("channel2", "channel8"),
)


def check_triton():
    """Runs in Triton's interpreter, in a process of its own."""
    from stored_rows import check

    from lowkey.backends import triton_gpu

    triton_gpu.SMALLEST_SPLIT = 64  # several pieces per row
    mask = torch.rand(2, 1, 200, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[0, 0, :130] = False
    mask[1] = False
    for i, how in enumerate(PAIRS):
        dtype = (torch.float32, torch.bfloat16)[i % 2]
        widths = ((64, 80), (37, 21), (96, 64))[i % 3]
        check(triton_gpu, how, (0, 1, 200, 33), 3, widths, dtype, 2.0 if i % 2 else None, None, 5e-3)
        check(triton_gpu, how, (0, 33, 200, 64), 2, widths, dtype, None, mask, 5e-3)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_is_attention_over_what_the_packing_holds():
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", "import test_triton_stored_rows as t; t.check_triton()"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
