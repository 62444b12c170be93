"""Triton's kernels over tokens of several kinds against fp64 by hand, on a GPU or in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from step_segments import KINDS, LATENT, ROWS, WIDTH, attention_by_hand, made, moved
from stored_rows import draw, ragged
from triton_compiled import FORMS

from lowkey.backends import triton_gpu
from lowkey.backends.stored import STRIDE, Rebuilding, StepSegment
from lowkey.evaluate.operations import counted_operations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3} if DEVICE == "cuda" else {}


def on_device(x):
    """A segment, or what it consists of, on the device of the kernels."""
    if isinstance(x, torch.Tensor):
        return x.to(DEVICE)
    if hasattr(x, "__dataclass_fields__"):
        return replace(x, **{name: on_device(getattr(x, name)) for name in x.__dataclass_fields__})
    return x


def draw_queries(m, widths, dtype):
    """(in the basis of latents, in that of the model), numbers of this dtype."""
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(ROWS, m, n, generator=generator).to(dtype).float() for n in widths]


def compare(found, wanted, kinds, dtype):
    tolerance = TOLERANCE.get(dtype, 2e-4)
    for x, y, latents in zip(found, wanted, (True, False, None, None), strict=True):
        if latents is None or any(k[3] is latents for k in kinds):
            assert x.dtype == torch.float32
            torch.testing.assert_close(x.cpu().double(), y, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("kinds", "m", "dtype", "softcap", "with_bias"),
    [
        (KINDS[0], 1, torch.float32, None, False),
        (KINDS[0], 20, torch.float16, 2.0, False),
        (KINDS[1], 8, torch.bfloat16, None, False),
        (KINDS[2], 3, torch.float32, None, True),
        (KINDS[2], 2, torch.bfloat16, 2.0, False),
        (KINDS[3], 4, torch.float16, 2.0, True),
    ],
)
def test_all_kinds_share_one_softmax(kinds, m, dtype, softcap, with_bias):
    segments, numbers = made(kinds, dtype)
    latent, query = draw_queries(m, (LATENT, WIDTH), dtype)
    bias = 3 * torch.randn(ROWS, m, generator=torch.Generator().manual_seed(1)) if with_bias else None
    kernel = triton_gpu.Segments(m, [on_device(s) for s in segments])
    found = kernel.attend(
        (latent.to(DEVICE), query.to(DEVICE)), 0.1, softcap, bias=None if bias is None else bias.to(DEVICE)
    )
    compare(found, attention_by_hand(kinds, numbers, latent, query, 0.1, softcap, bias), kinds, dtype)


@pytest.mark.parametrize(("kinds", "dtype"), [(KINDS[1], torch.float32), (KINDS[3], torch.float16)])
def test_segments_have_biases_and_columns_of_their_own(kinds, dtype):
    segments, numbers = made(kinds, dtype)
    segments = moved(segments)
    latent, query = draw_queries(3, (LATENT + 40, WIDTH + 40), dtype)
    kernel = triton_gpu.Segments(3, [on_device(s) for s in segments])
    found = kernel.attend((latent.to(DEVICE), query.to(DEVICE)), 0.1, 2.0)
    compare(found, attention_by_hand(kinds, numbers, latent, query, 0.1, 2.0, None, segments), kinds, dtype)


@pytest.mark.parametrize(
    "packings", [("plain", "plain"), ("token4", "token4"), ("channel2", "token2")], ids=str
)
@pytest.mark.parametrize(("width", "latent"), [(64, 16), (96, 40), (128, 24), (256, 300)])
def test_widths_of_heads_and_of_latents(packings, width, latent):
    kinds = [(*packings, (150, 1, 0), True, 0), (*packings, (65, 33, 0), False, 2)]
    segments, numbers = made(kinds, torch.float32, (latent, width))
    queries = draw_queries(2, (latent, width), torch.float32)
    kernel = triton_gpu.Segments(2, [on_device(s) for s in segments])
    found = kernel.attend(tuple(x.to(DEVICE) for x in queries), width**-0.5)
    wanted = attention_by_hand(kinds, numbers, *queries, width**-0.5, None, None)
    compare(found, wanted, kinds, torch.float32)


@pytest.mark.parametrize(
    ("packing", "p", "d", "heads", "latent", "dtype", "mean"),
    [
        ("plain", 64, 64, 3, 100, torch.float32, True),
        ("token4", 64, 96, 1, 24, torch.float32, False),
        ("channel2", 128, 128, 3, 80, torch.float32, True),
        ("plain", 64, 64, 1, 16, torch.bfloat16, True),
        ("token8", 32, 80, 3, 40, torch.bfloat16, False),
    ],
)
def test_keys_are_rebuilt_and_rotated(packing, p, d, heads, latent, dtype, mean):
    kinds = [(packing, "token4", (150, 0, 77), True, 2), ("plain", "plain", (9, 9, 9), False, 0)]
    (segment, window), numbers = made(kinds, dtype, (latent, d))
    if heads == ROWS:  # the heads share the tokens of the first
        lengths = torch.full((ROWS,), 150)
        one, exact = ragged(packing, draw((150,), 1, latent, dtype, 0), (150,))
        keys, numbers[0][0] = one.repeated(ROWS), [exact[:, 0]] * ROWS
        values, exact = ragged("token4", draw((150,), 1, latent, dtype, 1), (150,))
        values, numbers[0][1] = values.repeated(ROWS), [exact[:, 0]] * ROWS
    else:
        keys, values, lengths = segment.keys, segment.values, segment.lengths
    generator = torch.Generator().manual_seed(2)
    maps = (torch.randn(heads, latent, d, generator=generator) / latent**0.5).to(dtype)
    shift = torch.randn(heads, d, generator=generator).to(dtype) if mean else None
    positions = torch.randint(0, 4000, (400,), generator=generator).int()
    firsts = torch.tensor([0, 150, 200])
    angle, factor = 10000.0 ** (-torch.arange(0, p, 2).double() / p), 1.3  # as YaRN scales cos and sin

    def table(x):
        return torch.stack([(x[:, None] * angle).cos(), (x[:, None] * angle).sin()], 1).float()

    coarse = factor * table(torch.arange(0, 4096, STRIDE).double())
    fine = table(torch.arange(STRIDE).double())
    how = Rebuilding(maps, shift, positions, firsts, (coarse.numpy(), fine.numpy(), 0))
    own = StepSegment(keys, values, lengths, True, 2, how)
    latents, numbers[0][0] = numbers[0][0], []
    for row, x in enumerate(latents):
        k = x @ maps[row % heads].double()
        k = k if shift is None else k + shift[row % heads].double()
        at = positions[firsts[row] : firsts[row] + len(k)].double()[:, None] * angle
        cos, sin = ((factor * t).to(dtype).double() for t in (at.cos(), at.sin()))
        a, b = k[:, : p // 2], k[:, p // 2 : p]
        numbers[0][0].append(torch.cat([a * cos - b * sin, b * cos + a * sin, k[:, p:]], 1))
    _, query = draw_queries(4, (latent, d), dtype)
    kernel = triton_gpu.Segments(4, [on_device(x) for x in (own, window)])
    found = kernel.attend((None, query.to(DEVICE)), 0.1)
    # the definition has one basis for queries and sums of a segment
    wide = [(*kind[:3], False, kind[4]) for kind in kinds]
    of_values = [(numbers[0][0], [torch.zeros(len(x), d).double() for x in latents]), numbers[1]]
    _, out, _, lse = attention_by_hand(wide, of_values, query[..., :0], query, 0.1, None, None)
    # a cosine next to the middle of two numbers of the dtype may be rounded to the other
    tolerance = 2e-2 if dtype == torch.bfloat16 else 5e-4
    torch.testing.assert_close(found[3].cpu().double(), lse, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found[1].cpu().double(), out, atol=tolerance, rtol=tolerance)
    for row in range(ROWS):
        scores = query[row].double() @ numbers[0][0][row][2:].mT * 0.1 - lse[row][:, None]
        weights, values_of_row = scores.exp(), numbers[0][1][row][2:]
        torch.testing.assert_close(
            found[0][row].cpu().double(), weights @ values_of_row, atol=8 * tolerance, rtol=tolerance
        )
        torch.testing.assert_close(
            found[2][row].cpu().double(), weights.sum(1), atol=tolerance, rtol=tolerance
        )


def moving(dtype=torch.float32):
    """(segments of which the last two change at each step, their numbers, the steps, their counts)."""
    kinds = [("token4", "token4", (300, 7, 0), False, 0), ("plain", "plain", (50, 50, 50), False, 0)]
    kinds += [("plain", "plain", (40, 40, 40), False, 0)]
    steps = [((0, 10), (0, 33)), ((0, 42), (32, 2)), ((0, 50), (33, 7))]
    segments, numbers = made(kinds, dtype)
    counts = np.zeros((len(steps), 3, 2, ROWS), np.int64)
    for step, own in enumerate(steps):
        for i in (1, 2):
            counts[step, i] = np.array(own[i - 1])[:, None]
    segments[1:] = [replace(s, lengths=None) for s in segments[1:]]
    return kinds, segments, numbers, steps, counts


def test_tokens_of_a_step_are_read_on_the_device():
    kinds, segments, numbers, steps, counts = moving()
    _, query = draw_queries(3, (LATENT, WIDTH), torch.float32)
    kernel = triton_gpu.Segments(3, [on_device(s) for s in segments], counts)
    for step in (0, 1, 2, 2, 0):
        kernel.move(step)
        found = kernel.attend((None, query.to(DEVICE)), 0.1)
        seen = [numbers[0]]
        for (first, tokens), sides in zip(steps[step], numbers[1:], strict=True):
            seen.append([[row[first : first + tokens] for row in side] for side in sides])
        compare(
            found, attention_by_hand(kinds, seen, query[..., :0], query, 0.1, None, None), kinds, query.dtype
        )


class Noted:
    """Stands for a kernel: notes its launches."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launches.append((self.name, grid, str(constants)))


def test_every_step_makes_the_same_launches(monkeypatch):
    _, segments, _, _, counts = moving()
    launches, of_steps = [], []
    kernels = SimpleNamespace(attend=Noted("attend", launches), merge=Noted("merge", launches))
    monkeypatch.setattr(triton_gpu, "_kernel", lambda: kernels)
    kernel, query = triton_gpu.Segments(3, segments, counts), torch.randn(ROWS, 3, WIDTH)
    held = [x.data_ptr() for x in kernel.tensors()]
    for step in range(3):
        launches.clear()
        with counted_operations() as count:
            kernel.move(step)
            kernel.attend((None, query), 0.1)
        assert count.value_reads == 0 and count.operations <= 12
        of_steps.append(tuple(launches))
    assert of_steps[0] == of_steps[1] == of_steps[2]
    assert [name for name, _, _ in of_steps[0]] == ["attend"] * 3 + ["merge"]
    assert held == [x.data_ptr() for x in kernel.tensors()]


def test_kernels_compile_for_gpus_that_are_not_there(tmp_path):
    tests = Path(__file__).parents[2]
    paths = os.pathsep.join([str(tests), *(p for p in sys.path if p)])
    own = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    command = [sys.executable, str(tests / "triton_compiled.py")]
    run = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [line.split()[1] for line in run.stdout.splitlines()] == ["attend", "merge"] * len(FORMS)
