"""Attention over rows as packings hold them: the definition by blocks and the kernels, against fp64 loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from stored_rows import PACKINGS, check

from lowkey.backends import numba_cpu, stored

needs_numba = pytest.mark.skipif(not numba_cpu.available(), reason="numba is not installed")
LENGTHS = (0, 1, 700, 3, 0, 64, 65, 17, 33)
BACKENDS = {"blocks": stored, "numba": numba_cpu} if numba_cpu.available() else {"blocks": stored}
PAIRS = list(itertools.product(PACKINGS, PACKINGS))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, (64, 64)), (3, (32, 80)), (9, (128, 48)), (4, (37, 23)), (2, (96, 256))]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("how", "shape", "dtype"),
    [(pair, *more) for pair, more in zip(PAIRS, itertools.cycle(itertools.product(SHAPES, DTYPES)))],
    ids=str,
)
def test_it_is_attention_over_what_the_packing_holds(name, how, shape, dtype):
    check(BACKENDS[name], how, LENGTHS, *shape, dtype)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("how", [("plain", "plain"), ("token4", "token2"), ("channel2", "token2")], ids=str)
@pytest.mark.parametrize("m", [1, 3, 8, 12])
def test_soft_caps_and_masks(name, how, m):
    generator = torch.Generator().manual_seed(3)
    lengths = (700, 0, 33, 700)
    capped = check(BACKENDS[name], how, lengths, m, (64, 32), torch.float32, 2.0)
    mask = torch.rand(2, m // 3 * 3 and 3 if m % 3 == 0 else 1, 700, generator=generator) > 0.3
    mask[0, 0, :650] = False
    mask[1, 0, :] = False  # a query that sees nothing
    masked = check(BACKENDS[name], how, lengths, m, (64, 32), torch.float32, 2.0, mask)
    assert not masked[3, 0].any() and not torch.allclose(masked[0], capped[0], atol=1e-3)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("how", [("token4", "token4"), ("channel2", "token2")], ids=str)
def test_nothing_at_all(name, how):
    check(BACKENDS[name], how, (0, 0), 3, (32, 32), torch.float32)


@needs_numba
def test_threads_change_no_bit_of_a_packed_row():
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(
                check(numba_cpu, ("channel2", "token2"), (3000, 5, 900), 3, (64, 64), torch.bfloat16)
            )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@needs_numba
@pytest.mark.parametrize("widths", [(8, 3), (1, 15)], ids=str)
@pytest.mark.parametrize(
    ("how", "dtype"), [(pair, dtype) for pair, dtype in zip(PAIRS, itertools.cycle(DTYPES))], ids=str
)
def test_narrow_groups_are_read_in_part(how, dtype, widths):
    """Fewer channels than a vector has: what lies behind them in memory is not read."""
    check(numba_cpu, how, LENGTHS, 3, widths, dtype)


@needs_numba
def test_narrow_numbers_do_not_meet_their_neighbours():
    keys, values = (torch.full((1, 40, 16), torch.nan) for _ in range(2))
    keys[..., :5] = values[..., :5] = 1.0
    lane, first = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    rows = [stored.StoredRows(x[..., :5], None, None, 0, 5, lane, first) for x in (keys, values)]
    out, _ = numba_cpu.stored_rows(torch.ones(1, 1, 5), *rows, torch.tensor([40]), 1.0)
    assert torch.equal(out, torch.ones(1, 1, 5))
