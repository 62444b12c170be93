"""Steps of whole models over the kernels for GPUs, run by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pico
import pytest
import torch
from cache_kinds import KINDS, agree, feed

from lowkey.backends import ragged, triton_gpu
from lowkey.storage import stepping

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT, STEPS = 80, 5  # a room of two steps, and the first of four
SAMPLED = [
    ("exact", "llama"),
    ("exact", "gemma2"),
    ("bits-kivi4", "llama"),
    ("plan-pre", "llama"),
    ("snapkv-kivi2", "llama"),
    ("merged-pre-kivi2", "llama"),
    ("think", "llama"),
    # what these add to those above is held by the kernels' own tests, too
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("bits-8", "llama"),
            ("plan-exact", "llama"),
            ("plan-exact", "gemma2"),
            ("plan-h2o-4", "llama"),
            ("merged-pre-global-8", "llama"),
            ("razor-4", "llama"),
            ("dynamic", "llama"),
            ("dynamic-pre", "llama"),
        )
    ),
]


@pytest.fixture
def on_triton(monkeypatch):
    monkeypatch.setattr(triton_gpu, "available", lambda: True)
    monkeypatch.setattr(ragged, "KERNELS", ((DEVICE, triton_gpu),))


def logits(kind, family):
    """Of a prompt and of steps, with the bytes checked at each; and the cache."""
    model = pico.attached(family).to(DEVICE)
    cache, ids = KINDS[kind](model), pico.prompt(PROMPT + STEPS, batch=2).to(DEVICE)
    out = [feed(model, cache, ids[:, :PROMPT])]
    for step, one in enumerate(ids[:, PROMPT:].split(1, 1)):
        out.append(feed(model, cache, one))
        agree(cache, step)
    return torch.cat(out, 1).cpu(), cache


def kernels(cache):
    """What is prepared for the steps of each compressed layer."""
    layers = [layer for layer in cache.layers if isinstance(layer, stepping.SteppingLayer)]
    return [layer.prepared and layer.prepared.kernel for layer in layers]


@pytest.mark.parametrize(("kind", "family"), SAMPLED)
def test_a_step_on_triton_gives_what_torch_gives(kind, family, on_triton, monkeypatch):
    found, cache = logits(kind, family)
    assert kernels(cache) and all(isinstance(x, triton_gpu.Segments) for x in kernels(cache))
    assert cache.predicted_nbytes() > 0
    monkeypatch.setattr(ragged, "KERNELS", ())
    wanted, without = logits(kind, family)
    assert not any(kernels(without))
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)
    held = [x for kernel in kernels(cache) for x in kernel.tensors()]
    assert cache.nbytes() > without.nbytes() and held


def test_an_interrupted_step_gives_its_bytes_back(on_triton, monkeypatch):
    model = pico.attached("llama").to(DEVICE)
    cache, ids = KINDS["bits-8"](model), pico.prompt(PROMPT + 2, batch=2).to(DEVICE)
    feed(model, cache, ids[:, :PROMPT])
    feed(model, cache, ids[:, :1])
    before = agree(cache, "before")

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(triton_gpu.Segments, "attend", fail)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, ids[:, -1:])
    assert agree(cache, "after") == before
    cache.reset()
    agree(cache, "reset")
