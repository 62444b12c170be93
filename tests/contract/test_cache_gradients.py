"""Gradients through every cache against autograd through transformers' own attention."""

from __future__ import annotations

import pytest
import torch
from lossless_caches import KINDS, NOISE, cache_of
from pico import attached, padding, prompt
from transformers import DynamicCache

from lowkey.backends import naive, ragged
from lowkey.cache.cache import make_cache
from lowkey.ops.ragged import starts_of
from lowkey.policies import POLICIES

PADS, CONTEXT = [6, 0], 30
EXACT = [kind for kind in KINDS if kind not in NOISE]


def gradients(cache, grown, sizes, hidden=None):
    """Of what follows a context that was read with a graph (`grown`) or without one. hidden (b, tokens): what
    a stock cache is not to see of the context, once it was read; a cache of ours evicts by itself and is then
    frozen."""
    model, ids = attached("llama"), prompt(CONTEXT + sum(sizes))
    mask, positions = padding(PADS, ids.shape[1])
    seen, loss = CONTEXT, torch.zeros(())
    with torch.set_grad_enabled(grown):
        model(
            ids[:, :seen],
            attention_mask=mask[:, :seen],
            position_ids=positions[:, :seen],
            past_key_values=cache,
        )
    if hidden is None and hasattr(cache, "freeze"):
        cache.freeze()
    elif hidden is not None:
        mask = mask * ~hidden
    for size in sizes:
        new = slice(seen, seen + size)
        seen += size
        out = model(
            ids[:, new], attention_mask=mask[:, :seen], position_ids=positions[:, new], past_key_values=cache
        ).logits
        loss = loss + out.square().mean()
    names, weights = zip(*((n, w) for n, w in model.named_parameters() if "layers" in n), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


def agree(ours, theirs):
    assert len(theirs) > 20
    for name, want in theirs.items():
        assert (ours[name] - want).norm() <= 1e-4 * want.norm(), name


@pytest.mark.parametrize("grown", [True, False])
@pytest.mark.parametrize("kind", EXACT)
def test_gradients_of_a_lossless_cache_are_those_of_a_stock_one(kind, grown):
    agree(
        gradients(cache_of(kind, attached("llama")), grown, (3, 1, 1)),
        gradients(DynamicCache(), grown, (3, 1, 1)),
    )


@pytest.mark.parametrize("sizes", [(3, 2), (1, 1, 1), (70, 1)])
@pytest.mark.parametrize("grown", [True, False])
def test_gradients_of_an_evicted_cache_are_those_of_kept_tokens(grown, sizes):
    """StreamingLLM keeps the same tokens everywhere, so that the mask of a stock cache can express it."""
    cache = make_cache(attached("llama"), policy=POLICIES["streamingllm"]("12 tokens", sinks=2, recent=10))
    hidden = torch.zeros(2, CONTEXT + sum(sizes), dtype=torch.bool)
    for row, pad in enumerate(PADS):
        hidden[row, pad + 2 : CONTEXT - 10] = True
    agree(gradients(cache, grown, sizes), gradients(DynamicCache(), grown, sizes, hidden))


@pytest.mark.parametrize("which", ["query", "keys", "values"])
@pytest.mark.parametrize("m", [1, 80])
def test_ragged_attention_has_the_gradients_of_its_definition(which, m):
    """Whichever of the three asks for them; rows without a token have none to give."""
    lengths = [3, 40, 0, 7]
    draw = torch.Generator().manual_seed(0)
    shapes = {"query": (4, m, 8), "keys": (50, 8), "values": (50, 6)}
    given = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    given[which].requires_grad_()
    found = []
    for attend in (ragged.ragged, naive.ragged):
        out, lse = attend(*given.values(), starts_of(torch.tensor(lengths)), 0.3)
        loss = out.square().sum() + (0 if which == "values" else lse.nan_to_num(0, 0, 0).square().sum())
        found.append(torch.autograd.grad(loss, given[which])[0])
    assert found[1].any() and torch.allclose(*found, atol=1e-4)
