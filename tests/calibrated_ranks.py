"""Plans of a pico model with one folder of unfinished work for each basis, and errors measured slowly."""

from __future__ import annotations

import string

import pico
import pytest
from pico import HEAD_DIM, LAYERS

import lowkey
from lowkey import Sample
from lowkey.allocation.allocators import RANK_ALLOCATORS
from lowkey.methods import MEA, METHODS, PCA, MatryoshkaKV, StiefAttention, StiefJoint

TEXT = "".join(string.printable[(i * i + 7 * i) % 95] for i in range(1000))
SMALL = Sample(windows=8, length=24, batch=4)
FULL = 2 * HEAD_DIM * 4 * 4 * LAYERS  # bytes per token of the pico llama: keys and values of 4 heads in fp32
UNIT = 4 * 4  # of one more rank
by_allocator = pytest.mark.parametrize("allocator", RANK_ALLOCATORS)


def calibrate(method=None, **kwargs):
    """Without a window of exact tokens, so that a budget in bytes is that of the ranks."""
    method = method or PCA()
    measuring = "pairs" if "error_budget" in kwargs else str(kwargs.get("allocator"))
    work = calibrate.folder(
        repr(method),
        measuring,
        *(str(kwargs.get(name)) for name in ("layout", "ranks", "rank_multiple", "judge")),
    )
    options = {"method": method, "sample": SMALL, "work": work, "sinks": 0, "recent": 0, **kwargs}
    return lowkey.calibrate(pico.attached("llama"), pico.tokenizer(), TEXT, **options)


def chosen(plan):
    """The (rank of keys, rank of values) of every layer."""
    return [tuple(pair) for pair in plan.profile["chosen"]]


CHEAP = {
    name: kind()
    for name, kind in METHODS.items()
    if name not in ("stiefattention", "stiefattention-joint", "matryoshka")
}
CHEAP |= {
    "stiefattention": StiefAttention(epochs=1),
    "matryoshka": MatryoshkaKV(steps=1),
    "mea": MEA("activations"),
}
CHEAP |= {"stiefattention-joint": StiefJoint(steps=1)}
