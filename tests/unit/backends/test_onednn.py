"""Attention by oneDNN's products against the definition in double precision."""

from __future__ import annotations

import pytest
import torch

from lowkey.backends import onednn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("t", "s", "causal"),
    [
        *((n, n, causal) for n in (1, 7, 300, 2500) for causal in (True, False)),
        (30, 4500, False),
        (700, 1, False),
    ],
)
def test_attention_is_the_definition(t, s, causal, dtype):
    generator = torch.Generator().manual_seed(t + s)
    query, keys, values = (
        torch.randn(1, heads, n, width, generator=generator).to(dtype)
        for heads, n, width in ((4, t, 16), (2, s, 16), (2, s, 24))
    )
    out, lse = onednn.attend(query, keys, values, 0.3, causal)
    k, v = (x.double().repeat_interleave(2, 1) for x in (keys, values))
    scores = query.double() @ k.mT * 0.3
    if causal:
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ v, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=3e-6, rtol=3e-6)


def test_rows_that_are_strided_have_the_same_products():
    left, right = torch.randn(33, 40)[:, ::2], torch.randn(20, 17).mT
    torch.testing.assert_close(onednn.row_products(left, right), left @ right.mT)


def test_what_asks_for_gradients_is_left_to_torch():
    left = torch.randn(3, 4, requires_grad=True)
    assert not onednn.multiplies_faster(left, torch.randn(2, 4))
    onednn.row_products(left, torch.randn(2, 4)).sum().backward()
    assert left.grad is not None
