"""The fast ragged backends against loops in fp64, and the decode benchmark's bookkeeping."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lowkey.backends import numba_cpu, triton_gpu
from lowkey.core.types import LowkeyError
from lowkey.evaluate import decode_bench

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (0, 1, 700, 3, 0, 64, 65, 17)  # empty rows first and within, one much longer than the rest
WIDTHS = ((16, 16), (64, 64), (80, 48), (64, 128), (128, 64), (256, 256), (37, 21), (5, 3))

needs_numba = pytest.mark.skipif(not numba_cpu.available(), reason="numba is not installed")


def draw(lengths, m, r, v, dtype=torch.float32, query=torch.float32):
    """(query, keys, values, starts) with seeded numbers."""
    generator = torch.Generator().manual_seed(0)
    n = sum(lengths)
    shapes = (len(lengths), m, r), (n, r), (n, v)
    q, k, x = (torch.randn(s, generator=generator) for s in shapes)
    return q.to(query), k.to(dtype), x.to(dtype), torch.tensor([0, *lengths]).cumsum(0)


def loops(query, keys, values, starts, scaling, softcap=None):
    """The definition, in fp64."""
    out = torch.zeros(*query.shape[:2], values.shape[1], dtype=torch.float64)
    lse = torch.full(query.shape[:2], -torch.inf, dtype=torch.float64)
    for i, (begin, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        for j in range(query.shape[1] if end > begin else 0):
            scores = keys[begin:end].double() @ query[i, j].double() * scaling
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            out[i, j], lse[i, j] = scores.softmax(-1) @ values[begin:end].double(), scores.logsumexp(-1)
    return out, lse


def agree(backend, parts, scaling=0.2, softcap=None, tolerance=1e-5):
    out, lse = backend.ragged(*parts, scaling, softcap)
    wanted_out, wanted_lse = loops(*parts, scaling, softcap)
    assert out.dtype == lse.dtype == torch.float32
    assert torch.allclose(out.double(), wanted_out, atol=tolerance)
    assert torch.allclose(lse.double(), wanted_lse, atol=tolerance)
    return out, lse


@pytest.fixture
def threads():
    """Sets torch's thread count for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def python(code, **environment):
    """Run in a fresh interpreter that finds this file; returns what it printed."""
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=here,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@needs_numba
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("r", "v"), WIDTHS)
@pytest.mark.parametrize("m", [1, 2, 4, 7])
def test_numba_is_the_loops(dtype, r, v, m):
    out, lse = agree(numba_cpu, draw(LENGTHS, m, r, v, dtype), r**-0.5)
    assert out.shape == (len(LENGTHS), m, v) and lse.shape == (len(LENGTHS), m)


@needs_numba
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("m", [1, 4])
def test_numba_caps_scores_softly(dtype, m):
    parts = draw(LENGTHS, m, 64, 64, dtype)
    capped, _ = agree(numba_cpu, parts, 0.5, 2.0)
    assert not torch.allclose(capped, numba_cpu.ragged(*parts, 0.5)[0], atol=1e-2)


@needs_numba
def test_numba_serves_a_chunk_of_queries():
    agree(numba_cpu, draw((0, 300, 5), 64, 64, 64, torch.bfloat16))


@needs_numba
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_numba_takes_queries_of_any_dtype(dtype):
    agree(numba_cpu, draw(LENGTHS, 4, 64, 64, dtype, torch.bfloat16))


@needs_numba
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_numba_without_any_token(lengths):
    out, lse = numba_cpu.ragged(*draw(lengths, 4, 64, 32), 1.0)
    assert out.shape == (len(lengths), 4, 32) and not out.any()
    assert lse.shape == (len(lengths), 4) and (lse == -torch.inf).all()


@needs_numba
@pytest.mark.parametrize(
    "lengths", [(9000, *[1, 2, 3] * 9), [40] * 64, (3, 20000)], ids=["one long", "equal", "two"]
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_numba_is_the_same_for_any_number_of_threads(threads, lengths, dtype):
    parts = draw(lengths, 4, 32, 48, dtype)
    threads(1)
    alone = agree(numba_cpu, parts)
    threads(2)
    together = numba_cpu.ragged(*parts, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@needs_numba
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_numba_survives_large_scores(dtype, size):
    """Scores up to 3e4 and 3e8: the largest takes all the weight, whichever piece it lies in."""
    keys = torch.randn(1500, 32, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    keys[[7, 1300]] = torch.stack([torch.full((32,), 2.0), torch.full((32,), -2.0)])
    query = torch.stack([torch.ones(1, 32), -torch.ones(1, 32)]) * size * 16
    values, starts = (
        torch.randn(1500, 32, generator=torch.Generator().manual_seed(2)).to(dtype),
        torch.tensor([0, 1500, 1500]),
    )
    out, lse = numba_cpu.ragged(query, (keys * size**0.5).to(dtype), values, starts, size**-0.5)
    assert torch.allclose(out[0, 0], values[7].float(), atol=1e-6) and math.isclose(
        lse[0, 0], size * 16 * 64, rel_tol=1e-2
    )
    out, lse = numba_cpu.ragged(query.flip(0), (keys * size**0.5).to(dtype), values, starts, size**-0.5)
    assert torch.allclose(out[0, 0], values[1300].float(), atol=1e-6) and torch.isfinite(lse[0]).all()


@needs_numba
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_numba_very_small_scores_are_not_lost(dtype):
    """All scores of a row far below 0: what counts is their differences."""
    query, keys, values, starts = draw((200, 30), 4, 32, 32, dtype)
    keys[:, 0], query[..., 0] = -512.0, 16.0
    agree(numba_cpu, (query, keys, values, starts), tolerance=2e-3)


@needs_numba
def test_numba_reads_rows_where_they_lie():
    """Columns of a wider tensor, every other row, and a transposed one, which is copied."""
    query, keys, values, starts = draw((30, 0, 70), 4, 24, 24)
    wide, spaced = torch.full((100, 40), torch.nan), torch.full((200, 24), torch.nan)
    wide[:, 8:32], spaced[::2] = keys, values
    agree(numba_cpu, (query, wide[:, 8:32], spaced[::2], starts))
    agree(numba_cpu, (query, keys.T.contiguous().T, values, starts))


@needs_numba
def test_numba_reads_nothing_beyond_a_row():
    """What other rows hold, not even numbers, must not show."""
    query, keys, values, starts = draw((5, 40, 7), 4, 37, 21)
    wanted, _ = loops(query, keys, values, starts, 0.2)
    for x in (keys, values):
        x[:5], x[45:] = torch.nan, torch.inf
    assert torch.allclose(
        numba_cpu.ragged(query, keys, values, starts, 0.2)[0][1].double(), wanted[1], atol=1e-5
    )


@needs_numba
def test_numba_may_be_called_from_several_threads():
    parts = [draw((100 * i, 7, 300), 4, 32, 32) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda p: numba_cpu.ragged(*p, 0.2), parts))
    assert all(
        torch.allclose(out.double(), loops(*p, 0.2)[0], atol=1e-5)
        for (out, _), p in zip(found, parts, strict=True)
    )


@needs_numba
def test_numba_does_not_touch_gradients():
    query, keys, values, starts = draw((9, 3), 1, 16, 16)
    out, _ = numba_cpu.ragged(query.requires_grad_(), keys.requires_grad_(), values, starts, 1.0)
    assert not out.requires_grad


def first_use():
    """Runs in a process of its own: which compilers an import of lowkey brings along, and torch's threads
    after a call.
    """
    torch.set_num_threads(1)
    # torch itself imports triton, of which only kernels take long
    print({"numba", "lowkey.backends.triton_kernel"} & set(sys.modules))
    if numba_cpu.available():
        numba_cpu.ragged(*draw((9,), 1, 16, 16), 1.0)
    print(torch.get_num_threads())


def test_compilers_are_imported_on_first_use_and_keep_threads():
    assert python("import test_ragged_backends as t; t.first_use()").split("\n") == ["set()", "1"]


def test_numba_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    assert not numba_cpu.available.__wrapped__()


def test_dtypes_that_are_served():
    for backend in (numba_cpu, triton_gpu):
        assert all(map(backend.supports, DTYPES)) and not backend.supports(torch.float64)


def test_triton_needs_a_gpu():
    assert triton_gpu.available() == (torch.cuda.is_available() and find_spec("triton") is not None)


@pytest.mark.parametrize("lengths", [(), (0, 0), LENGTHS, (4096, 1, 5000)])
@pytest.mark.parametrize("size", [128, 1000])
def test_triton_pieces_cover_every_row_once(lengths, size):
    rows = torch.tensor(lengths, dtype=torch.long)
    first, row_of = triton_gpu._pieces(rows, size, sum(lengths) // size + len(lengths))
    wanted = [row for row, n in enumerate(lengths) for _ in range(-(-n // size))]
    assert row_of.tolist() == wanted + [-1] * (len(row_of) - len(wanted))
    assert first.tolist() == [
        wanted.index(row) if row in wanted else sum(w < row for w in wanted) for row in range(len(lengths))
    ] + [len(wanted)]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("dtype", "m", "r", "v"),
    [(torch.float32, 1, 64, 80), (torch.bfloat16, 20, 37, 21), (torch.float16, 5, 128, 64)],
)
def test_triton_is_the_loops(dtype, m, r, v, softcap, monkeypatch):
    monkeypatch.setattr(triton_gpu, "SMALLEST_SPLIT", 64)  # several pieces per row
    parts = draw((0, 1, 200, 64, 0, 65), m, r, v, dtype, dtype)
    agree(triton_gpu, parts, 0.3, softcap, 2e-5 if dtype != torch.float16 else 2e-3)


def test_triton_without_any_token():
    out, lse = triton_gpu.ragged(*draw((0, 0), 3, 16, 16), 1.0)
    assert not out.any() and (lse == -torch.inf).all()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(decode_bench, "POOL", 2**16)
    monkeypatch.setattr(decode_bench, "READ", 2**20)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bench_reports_what_it_promises(small, dtype):
    found = decode_bench.decode_bench(64, 16, 4, 2, dtype, "25%", repeats=2, seed=3)
    assert {
        k: found[k]
        for k in ("context", "head_dim", "heads", "kv_heads", "dtype", "budget", "repeats", "seed")
    } == {
        **{"context": 64, "head_dim": 16, "heads": 4, "kv_heads": 2},
        **{"dtype": dtype, "budget": "25%", "repeats": 2, "seed": 3},
    }
    assert found["read_bandwidth_gbs"] > 0 and found["environment"]["torch"] == torch.__version__
    assert set(found["backends"]) >= {"sdpa", "grouped"} | ({"numba"} if numba_cpu.available() else set())
    for name, row in found["backends"].items():
        assert row["ms"] > 0 and row["share_of_read_bandwidth"] > 0
        assert math.isclose(row["gbs"], 2 * 64 * 2 * 16 * (4 if dtype == "float32" else 2) / row["ms"] / 1e6)
        assert (row["budget_ms"] is None) == (row["budget_to_full"] is None) == (name == "sdpa")
    assert found["backends"]["sdpa"]["ratio_to_sdpa_full"] == 1.0


def test_bench_contestants_compute_the_same(small):
    """What is timed as attention is attention, in full and over what is kept."""
    shape = decode_bench.DecodeShape(64, 16, 4, 2, "float32")
    steps = decode_bench._contestants(shape, torch.tensor([7, 30]), "cpu", 0)
    wanted = steps["sdpa"]().view(2, 2, 16)
    backends = [name for name in steps if f"{name} budget" in steps]
    assert all(torch.allclose(steps[name]()[0], wanted, atol=1e-5) for name in backends)
    kept = [steps[f"{name} budget"]()[0] for name in backends]
    assert all(torch.allclose(k, kept[0], atol=1e-5) for k in kept) and not torch.allclose(
        kept[0], wanted, atol=1e-2
    )


@pytest.mark.parametrize(
    ("budget", "total"), [("10%", 819 * 8 + 2), ("512 tokens", 4096), ("100%", 8 * 8192), ("0.001%", 8)]
)
def test_bench_heads_keep_unequal_lengths(budget, total):
    shape = decode_bench.DecodeShape(8192, 64, 32, 8, "float32")
    lengths = decode_bench._lengths(shape, decode_bench.Budget.parse(budget), 0)
    assert total - 2 <= int(lengths.sum()) <= total and int(lengths.min()) >= 1 and int(lengths.max()) <= 8192
    if 8 < total < 8 * 8192:
        assert lengths.max() > 2 * lengths.min()
        assert not torch.equal(lengths, decode_bench._lengths(shape, decode_bench.Budget.parse(budget), 1))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"context": 0}, "context 0: must be at least 1"),
        ({"head_dim": -1}, "head_dim -1"),
        ({"repeats": 0}, "repeats 0"),
        ({"kv_heads": 0}, "kv_heads 0"),
        ({"heads": 6, "kv_heads": 4}, "heads 6: must be a multiple of kv_heads 4; try 8"),
        ({"dtype": "int8"}, "dtype 'int8': must be one of float32"),
        ({"budget": "64 KiB/token"}, "budget 64 KiB/token: this step keeps whole tokens"),
        ({"budget": "9000 tokens"}, "budget 9000 tokens: is more than the context of 64"),
        ({"budget": "0.5"}, "budget '0.5': say what is kept"),
    ],
)
def test_bench_refuses_with_one_line(wrong, words):
    with pytest.raises(LowkeyError, match="^" + words.replace("(", r"\(")) as error:
        decode_bench.decode_bench(**{"context": 64, "head_dim": 16, "heads": 4, "kv_heads": 2, **wrong})
    assert "\n" not in str(error.value)


def test_bench_makes_nothing_that_the_machine_cannot_hold(monkeypatch):
    """An error and no tensor: what it would take is far more than a machine has."""
    monkeypatch.setattr(decode_bench, "_contestants", lambda *given: pytest.fail("made"))
    with pytest.raises(
        LowkeyError,
        match=r"context 16777216, head_dim 16384 and kv_heads 8: need [\d,.]+ GiB, and [\d,.]+ GiB are free",
    ):
        decode_bench.decode_bench(context=2**24, head_dim=2**14)
    with pytest.raises(LowkeyError, match="context 999999999999: must be at least 1 and at most 16777216"):
        decode_bench.decode_bench(context=999_999_999_999)
