"""Plans that can be exported, their plain checkpoints, and the comparison with the cache of the plan."""

from __future__ import annotations

from dataclasses import asdict, replace

import pico
import pytest
import torch
from pico import HEAD_DIM, feed, generate, prompt
from transformers import AutoModelForCausalLM

import lowkey
from lowkey.calibration.calibrate import fit_layers, name_and_parameters
from lowkey.core.types import LowkeyError
from lowkey.export import export_hf
from lowkey.methods import CalibrationContext, KVHeadSVD
from lowkey.models import families
from lowkey.models.fingerprint import model_fingerprint
from lowkey.plan.plan import Plan, versions

COMMUTING = KVHeadSVD(keys="commuting")
ROWS = prompt(24, batch=8, seed=1)
PADS = [7, 0]
FULL = {"gemma2": {"layer_types": ["full_attention"] * 3}}


def build(name, **overrides):
    """Attached, with biases that are not zero, as training leaves them."""
    model = pico.build(name, **FULL.get(name, {}), **overrides)
    generator = torch.Generator().manual_seed(7)
    for parameter, values in model.named_parameters():
        if parameter.endswith("bias"):
            values.data.normal_(generator=generator)
    return lowkey.attach(model)


def make(model, method=COMMUTING, ranks=(8, 8), layout="post_rope", **fields):
    """A plan of these ranks in all layers."""
    bases, _ = fit_layers(method, CalibrationContext(model, ROWS, 2, layout, sorted({*ranks, HEAD_DIM}), 0))
    about = {
        "model": "pico",
        "model_sha256": model_fingerprint(model),
        "data_sha256": "0",
        "tokens": 1,
        "seed": 0,
        "versions": versions(),
    }
    plan = Plan(
        {i: b.at(*ranks) for i, b in bases.items()},
        layout,
        name_and_parameters(method),
        {"name": "uniform", "parameters": {}},
        "50%",
        geometry=asdict(families.geometry(model)),
        provenance=about,
    )
    return replace(plan, **fields)


def exported(model, plan, folder, **options):
    """What stock transformers reads; eager attention, because SDPA drops the soft cap of Gemma 2."""
    assert export_hf(model, pico.tokenizer(), plan, folder / "model", **options) == folder / "model"
    return AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")


def same(plain, model, plan, tolerance=1e-4):
    """Logits and greedy tokens of padded prompts, and by one token at a time."""
    ids = prompt(40)
    ours, stock = (
        feed(m, ids, past, PADS) for m, past in ((model, lowkey.make_cache(model, plan)), (plain, None))
    )
    for row, pad in enumerate(PADS):
        assert torch.allclose(ours[row, pad:], stock[row, pad:], atol=tolerance)
    assert torch.equal(
        generate(plain, ids, 20, pads=PADS), generate(model, ids, 20, lowkey.make_cache(model, plan), PADS)
    )


def refused(model, plan, folder, match):
    """Assert that exporting the plan is refused in one line and leaves nothing behind."""
    with pytest.raises(LowkeyError, match=match) as refusal:
        export_hf(model, pico.tokenizer(), plan, folder / "model")
    assert len(str(refusal.value).splitlines()) == 1
    assert not list(folder.iterdir()), "nothing is left behind"
