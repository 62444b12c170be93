"""A step of decoding makes no decoded copy of what is stored: all its tensors are small, or are kept."""

from __future__ import annotations

import cache_kinds
import pico
import pytest
import reach
import torch
from cache_kinds import KINDS, feed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowkey
from lowkey.backends import numba_cpu, stored

CONTEXT, HEADS = 1000, 4
# The numbers of one block of tokens in all KV heads, a sixth of the context's. Merged heads have latents that
# are a little wider than the heads.
BLOCK = stored.BLOCK_TOKENS * HEADS * pico.HEAD_DIM * 5 // 4


class Large(TorchDispatchMode):
    """Keeps the floating-point tensors of more than one block of tokens that operations return."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                size = x.untyped_storage().nbytes() // x.element_size()
                if size > BLOCK:
                    self.found.append((str(func), x))
        return out


def large_tensors(cache, model, ids):
    """What a step makes beyond a block of tokens and does not keep, by operation and shape."""
    before = set(reach.storages(cache))
    with Large() as record:
        feed(model, cache, ids)
    kept = before | set(reach.storages(cache))
    return [(name, tuple(x.shape)) for name, x in record.found if x.untyped_storage().data_ptr() not in kept]


@pytest.mark.parametrize("with_numba", [True, False], ids=["numba", "blocks"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "stock"])
def test_a_step_decodes_no_more_than_a_block(kind, with_numba, monkeypatch):
    monkeypatch.setattr(cache_kinds, "BUDGET", "60%")
    model = pico.attached("llama")
    cache = KINDS[kind](model)
    ids = pico.prompt(CONTEXT + 2, batch=1)
    if cache.origin and cache.origin.policy and cache.origin.policy.needs_second_pass:
        lowkey.prefill(model, pico.tokenizer(), cache, ids[:, :CONTEXT])
    else:
        for part in ids[:, :CONTEXT].split(600, 1):
            feed(model, cache, part)
    if not with_numba:
        monkeypatch.setattr(numba_cpu, "available", lambda: False)
    # the first step: some kinds evict in the second or third, which reads all that they choose from
    assert large_tensors(cache, model, ids[:, CONTEXT : CONTEXT + 1]) == []
