"""Short trainings through a compressed cache."""

from __future__ import annotations

import importlib
from dataclasses import fields, replace

import pico
import torch
from torch import Tensor

from lowkey.cache.cache import cache_of
from lowkey.calibration.recover import Recovered, Recovery, recover
from lowkey.models import families
from lowkey.plan.plan import Plan
from lowkey.probes.layer_probe import LowRankReconstruction
from lowkey.storage.reconstruction import ReconstructionLayer

module = importlib.import_module("lowkey.calibration.recover")
TEXT = "the cat sat on the mat. " * 40
SMALL = Recovery(stages=(("ce", 4),), rank=4, alpha=8, batch=2, length=24, lr=3e-3, save_every=2)


def run(model=None, plan=None, texts=TEXT, work=None, progress=None, **changes) -> Recovered:
    """Train a plan on a short text, with changed settings."""
    model = model or pico.attached("llama")
    extra = {"progress": progress} if progress else {}
    return recover(
        model,
        pico.tokenizer(),
        plan or pico.plan(model),
        texts,
        settings=replace(SMALL, **changes),
        work=work,
        **extra,
    )


def losses(found: Recovered) -> list[float]:
    """The loss of every step."""
    return [record["loss"] for record in found.losses]


def maps(plan: Plan) -> dict[str, Tensor]:
    """Copies of all tensors of a plan, by layer and name."""
    return {
        f"{i}.{x.name}": t.clone()
        for i, f in plan.factors.items()
        for x in fields(f)
        if isinstance(t := getattr(f, x.name), Tensor)
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal."""
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def through(model, plan: Plan, ids: Tensor) -> Tensor:
    """Logits as in training."""
    cache = cache_of(
        model,
        lambda i: ReconstructionLayer(
            LowRankReconstruction(plan.factors[i], plan.layout, families.rope(model, i))
        ),
    )
    return model(ids, past_key_values=cache, use_cache=True).logits


def stop_before(step: int):
    """A progress at which the user loses patience."""

    def progress(items, label, total=None):
        for i, item in enumerate(items):
            if i == step:
                raise KeyboardInterrupt
            yield item

    return progress
