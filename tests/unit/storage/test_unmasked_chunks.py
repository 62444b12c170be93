"""Long chunks without padding, answered in parts without masks, against the definition in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import attached, plan, prompt
from torch.utils._python_dispatch import TorchDispatchMode

import lowkey
from lowkey.backends.segment import Segment
from lowkey.policies import SnapKV
from lowkey.storage.exact import Exact
from lowkey.storage.unmasked import attend_by_age, attend_to_repetition


def attended(query, keys, values, visible, scaling):
    """Attention of each query over the tokens that it sees, by the definition.

    Args:
        query: (b, h, g, t, d).
        keys: (b, h, t, s, d), as each query sees them.
        values: the same.
        visible: (t, s).
    """
    scores = torch.einsum("bhgtd,bhtsd->bhgts", query.double(), keys.double()) * scaling
    scores = scores.masked_fill(~visible, -torch.inf)
    return torch.einsum("bhgts,bhtsd->bhgtd", scores.softmax(-1), values.double()), scores.logsumexp(-1)


def agree(part, wanted):
    for found, right in zip(part, wanted, strict=True):
        torch.testing.assert_close(found.double(), right, atol=2e-6, rtol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    old=st.integers(0, 150),
    new=st.integers(16, 150),
    recent=st.integers(0, 90),
    block=st.sampled_from([1, 1, 8, 32]),
    shape=st.tuples(*[st.integers(1, 3)] * 3),
    seed=st.integers(0, 10**6),
)
def test_each_query_sees_the_form_that_age_gives(*, old, new, recent, block, shape, seed):
    """Token j is stored for query i if its block was full and i + 1 - j > recent; else it is exact."""
    (b, h, g), d, tokens = shape, 8, old + new
    generator = torch.Generator().manual_seed(seed)
    query, exact, stored = (
        torch.randn(*sizes, generator=generator)
        for sizes in ((b, h, g, new, d), (2, b, h, tokens, d), (2, b, h, tokens, d))
    )
    first_exact = [max(0, i + 1 - recent) // block * block for i in range(old, tokens)]
    is_stored = torch.arange(tokens) < torch.tensor(first_exact).unsqueeze(1)
    as_seen = (
        torch.where(is_stored.unsqueeze(-1), x.unsqueeze(2), y.unsqueeze(2))
        for x, y in zip(stored, exact, strict=True)
    )
    causal = torch.arange(tokens) <= torch.arange(old, tokens).unsqueeze(1)
    held = max(0, old - recent) // block * block  # stored before the chunk came, so that they are not exact
    part = attend_by_age(
        Segment(query, *stored[:, :, :, : first_exact[-1]]),
        query,
        tuple(exact[:, :, :, held:]),
        tokens,
        recent,
        block,
        0.4,
    )
    agree(part, attended(query, *as_seen, causal, 0.4))


@pytest.mark.parametrize("span", [(0, 40), (40, 80), (60, 100), (60, 130), (0, 100)])
def test_repetitions_see_all_and_sum_the_span(span):
    generator, t, s = torch.Generator().manual_seed(0), 33, 133
    query = torch.randn(2, 2, 3, t, 8, generator=generator)
    keys, values = torch.randn(2, 2, 2, s, 8, generator=generator)
    part, lse = attend_to_repetition(query, keys, values, span, 0.4)
    token = torch.arange(s)
    causal = token <= torch.arange(s - t, s).unsqueeze(1)
    inside = ((token >= span[0]) & (token < span[1])) | (token >= s - t)
    everything = [x.unsqueeze(2).expand(-1, -1, t, -1, -1) for x in (keys, values)]
    agree(part, attended(query, *everything, causal, 0.4))
    agree((lse,), attended(query, *everything, causal & inside, 0.4)[1:])


class LargestMask(TorchDispatchMode):
    """Notes the most booleans of one tensor."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.dtype == torch.bool:
                self.numbers = max(self.numbers, x.numel())
        return out


def settings_without_masks(model):
    near = Exact(3, 20)
    return {
        "int4": {"bits": "int4"},
        "kivi4": {"bits": "kivi4"},
        "post-RoPE": {"plan": plan(model), "exact": near},
        "pre-RoPE, kivi4": {"plan": plan(model, layout="pre_rope"), "bits": "kivi4", "exact": near},
        "snapkv": {"policy": SnapKV("64 tokens")},
        "snapkv, int4": {"policy": SnapKV("64 tokens", recent=20), "bits": "int4", "exact": Exact(4, 20)},
    }


@pytest.mark.parametrize("name", settings_without_masks(attached("llama")))
def test_prompts_form_no_mask_of_queries_by_tokens(name):
    """With masks, a prompt of 4096 tokens took 1.2 to 1.4 times as long as over the full cache."""
    model, t = attached("llama"), 512
    cache = lowkey.make_cache(model, **settings_without_masks(model)[name])
    with torch.no_grad(), LargestMask() as largest:
        model(prompt(t, batch=1), past_key_values=cache)
    assert largest.numbers < t * t / 2
