"""Every ragged backend gives what the definition gives; the dispatcher takes one that can."""

from __future__ import annotations

import pytest
import torch

from lowkey.backends import fused, grouped, naive, numba_cpu, ragged
from lowkey.backends.segment import Segment
from lowkey.core.types import LowkeyError
from lowkey.evaluate.decode_bench import decode_bench
from lowkey.ops.ragged import starts_of

BACKENDS = {"grouped": grouped.ragged, "dispatched": ragged.ragged} | (
    {"numba": numba_cpu.ragged} if numba_cpu.available() else {}
)
LENGTHS = {"unequal": [3, 700, 0, 41, 1], "empty": [0, 0], "equal": [64] * 4}


def rows(lengths, width, width_v, m, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    n = sum(lengths)
    query = torch.randn(len(lengths), m, width, generator=generator) * scale
    keys, values = torch.randn(n, width, generator=generator), torch.randn(n, width_v, generator=generator)
    return *(x.to(dtype) for x in (query, keys, values)), starts_of(torch.tensor(lengths))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(
    ("width", "width_v", "m"), [(16, 16, 1), (64, 64, 4), (80, 24, 3), (128, 128, 8), (256, 40, 5), (6, 9, 2)]
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_ragged_backends_equal_the_definition(name, lengths, width, width_v, m, dtype, tolerance):
    case = rows(lengths, width, width_v, m, dtype)
    out, lse = BACKENDS[name](*case, width**-0.5)
    expected, total = naive.ragged(*(x.double() if x.is_floating_point() else x for x in case), width**-0.5)
    assert out.shape == expected.shape and (out - expected).abs().max() <= tolerance * max(
        1.0, float(expected.abs().max())
    )
    assert torch.equal(lse.isinf(), total.isinf()) and torch.allclose(
        lse[~lse.isinf()], total[~total.isinf()], atol=10 * tolerance
    )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("scale", "softcap"), [(200.0, None), (20.0, 5.0)])
def test_large_scores_and_soft_caps(name, scale, softcap):
    case = rows([300, 5], 32, 32, 4, scale=scale)
    out, lse = BACKENDS[name](*case, 1.0, softcap)
    expected, total = naive.ragged(*case, 1.0, softcap)
    assert (
        out.isfinite().all()
        and torch.allclose(out, expected, atol=1e-3)
        and torch.allclose(lse, total, rtol=1e-4)
    )


@pytest.mark.skipif(not numba_cpu.available(), reason="numba is not installed")
def test_threads_change_nothing():
    case, before = rows([1000, 3, 77, 5000], 64, 64, 4), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(numba_cpu.ragged(*case, 0.125))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["grouped", "dispatched", "fused"])
@pytest.mark.parametrize(("width", "width_v"), [(16, 16), (6, 9), (24, 10)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_many_queries_are_answered_the_same(name, width, width_v, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(grouped, "SCORES_AT_ONCE", 2000)  # queries in several blocks
    case = rows([300, 0, 41, 7], width, width_v, 70, dtype)
    out, lse = {**BACKENDS, "fused": fused.ragged}[name](*case, width**-0.5)
    expected, total = naive.ragged(*(x.double() if x.is_floating_point() else x for x in case), width**-0.5)
    assert out.dtype == torch.float32 and (out - expected).abs().max() <= tolerance * max(
        1.0, float(expected.abs().max())
    )
    assert torch.equal(lse.isinf(), total.isinf()) and torch.allclose(
        lse[~lse.isinf()], total[~total.isinf()].float(), atol=10 * tolerance
    )


def test_a_chunk_alone_is_causal_attention_with_log_sum_exp():
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(2, 3, *s, generator=generator).double() for s in ((2, 20, 8), (20, 8), (20, 8))
    )
    out, lse = fused.causal(*(x.float() for x in (query, keys, values)), 0.3)
    mask = torch.ones(1, 20, 20, dtype=torch.bool).tril()
    logits = (query @ keys.mT.unsqueeze(2) * 0.3).masked_fill(~mask, -torch.inf)
    assert torch.allclose(lse.double(), logits.logsumexp(-1), atol=1e-5)
    assert torch.allclose(out.double(), naive.attend([Segment(query, keys, values, mask)], 0.3), atol=1e-5)


def test_a_kernel_without_gradients_is_not_taken_for_training():
    query, keys, values, starts = rows([30, 20], 8, 8, 70)
    found = []
    for taken in (ragged.ragged, grouped.ragged):
        q, k, v = (x.clone().requires_grad_() for x in (query, keys, values))
        out, lse = taken(q, k, v, starts, 0.3)
        found.append(torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_without_numba_plain_torch_is_used(monkeypatch):
    monkeypatch.setattr(numba_cpu, "available", lambda: False)
    case = rows([3, 70], 16, 16, 2)
    out, _ = ragged.ragged(*case, 0.25)
    assert torch.equal(out, grouped.ragged(*case, 0.25)[0])


def test_the_bench_prints_its_fields():
    found = decode_bench(
        context=64, head_dim=16, heads=4, kv_heads=2, dtype="float32", budget="25%", repeats=1
    )
    assert found["read_bandwidth_gbs"] > 0 and sum(found["kept"]) == 32 and len(set(found["kept"])) == 2
    assert {"sdpa", "grouped"} <= set(found["backends"])
    for name, row in found["backends"].items():
        assert row["ms"] > 0 and row["gbs"] > 0 and row["ratio_to_sdpa_full"] > 0
        assert (row["budget_to_full"] is None) == (name == "sdpa")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"heads": 5, "kv_heads": 2}, "heads 5"),
        ({"context": 0}, "context 0"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"budget": "2 GiB"}, "2 GiB"),
        ({"budget": "9999 tokens", "context": 64}, "more than the context"),
    ],
)
def test_an_impossible_bench_is_refused(words, says):
    with pytest.raises(LowkeyError, match=says):
        decode_bench(**words)
