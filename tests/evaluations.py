"""Evaluations of a pico model on short windows, and the slow references that they are compared with."""

from __future__ import annotations

import string

import pico
import torch

import lowkey
from lowkey import Sample
from lowkey.evaluate.result import Task, evaluate
from lowkey.evaluate.settings import Setting, packed
from lowkey.methods import PCA
from lowkey.storage.exact import Exact

TEXT = "".join(string.printable[(i * i + 7 * i) % 95] for i in range(1000))
OTHER = "".join(string.printable[(i * i * 3 + 11 * i) % 95] for i in range(300))
LENGTH, COUNT, BATCH = 25, 5, 2  # an odd length
TIMES = ("prefill_ms", "step_ms")


def windows() -> torch.Tensor:
    """The scored windows, cut by hand."""
    ids = pico.tokenizer()(OTHER).input_ids
    return torch.tensor([[0, *ids[i * (LENGTH - 1) : (i + 1) * (LENGTH - 1)]] for i in range(COUNT)])


def calibrated(budget: str, **kwargs: object) -> lowkey.Plan:
    """Without a window of exact tokens, which would be all of these short texts."""
    sample, words = Sample(windows=8, length=24, batch=4), kwargs.pop("seed_text", TEXT)
    given = {"method": PCA(), "budget": budget, "sample": sample, "sinks": 0, "recent": 0, **kwargs}
    return lowkey.calibrate(pico.attached("llama"), pico.tokenizer(), words, **given)


def integers(model, bits: int) -> Setting:
    """Alone, again without a window."""
    return packed(model, bits, Exact())


def run(settings, names=("perplexity",), work=None, **task: object) -> dict:
    """Evaluate the settings on short windows."""
    what = Task({"other": OTHER}, **{"context": LENGTH, "windows": COUNT, "batch": BATCH, "cases": 1, **task})
    return evaluate(pico.attached("llama"), pico.tokenizer(), settings, what, names, work=work)


def by_name(result: dict) -> dict[str, dict]:
    """Rows of a result by name."""
    return {row["name"]: row for row in result["rows"]}


class Counted:
    """How many tokens a model reads."""

    def __init__(self, model, monkeypatch):
        self.tokens, forward = 0, model.forward

        def counting(input_ids, **kwargs):
            self.tokens += input_ids.numel()
            return forward(input_ids, **kwargs)

        monkeypatch.setattr(model, "forward", counting)
