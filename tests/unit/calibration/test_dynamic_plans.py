"""Dynamic plans: made from text, saved, loaded, and refused when damaged."""

from __future__ import annotations

import math
from dataclasses import replace

import forging
import pico
import pytest
import torch
from dynamic_plans import LENGTH, LEVELS, TEXT, make_plan
from pico import attached, feed, prompt

import lowkey
from lowkey.calibration.calibrate import Sample
from lowkey.calibration.dynamic import (
    DYNAMIC_PLAN_JSON,
    DYNAMIC_PLAN_TENSORS,
    DynamicPlan,
    make_dynamic_cache,
    make_dynamic_plan,
)
from lowkey.core.types import LowkeyError
from lowkey.methods.dynakv import GateTraining


def small_plan(layout="post_rope") -> DynamicPlan:
    training = GateTraining(target=0.4, steps=2, hidden=8)
    return make_dynamic_plan(
        attached("llama"), pico.tokenizer(), TEXT, layout=layout, sample=Sample(8, 24), training=training
    )


def test_a_plan_is_made_saved_and_loaded(tmp_path, layout):
    model, ids = attached("llama"), prompt(LENGTH)
    plan = small_plan(layout)
    assert plan.share <= 0.4 + 1e-6 and plan.levels == LEVELS and plan.training["target"] == 0.4
    plan.save(tmp_path / "plan")
    again = DynamicPlan.load(tmp_path / "plan", model)
    assert torch.equal(
        feed(model, ids, make_dynamic_cache(model, plan)), feed(model, ids, make_dynamic_cache(model, again))
    )
    for field in ("layout", "levels", "share", "divergence", "training", "provenance"):
        assert getattr(again, field) == getattr(plan, field)
    plan.save(tmp_path / "plan")


def test_bytes_per_token_are_those_of_a_cache(layout):
    """Were all tokens like the held-out ones: here, at one level."""
    model = attached("llama")
    plan = replace(make_plan("llama", layout, level=1), share=0.5)
    sizes = []
    for length in (12, 24):
        past = make_dynamic_cache(model, plan)
        feed(model, prompt(length), past)
        sizes.append(past.nbytes())
    assert (sizes[1] - sizes[0]) / (2 * 12) == plan.bytes_per_token(4)


def test_another_models_plan_is_refused(tmp_path):
    small_plan().save(tmp_path / "plan")
    with pytest.raises(LowkeyError, match="made for model"):
        DynamicPlan.load(tmp_path / "plan", lowkey.attach(pico.build("llama-mha")))


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(LowkeyError, match="other files"):
        small_plan().save(tmp_path)


DAMAGE = {
    "newer": lambda about, tensors: about.update(format=99),
    "levels": lambda about, tensors: about.update(levels=[8, 16]),
    "layout": lambda about, tensors: about.update(layout="sideways"),
    "missing": lambda about, tensors: about.pop("share"),
    "numbers": lambda about, tensors: about.update(divergence="little"),
    "huge": lambda about, tensors: about.update(share=10**400),
    "target": lambda about, tensors: about["training"].pop("target"),
    "geometry": lambda about, tensors: about["geometry"].update(head_dim="16"),
    "layers": lambda about, tensors: about.update(layers=[0, 7]),
    "nan": lambda about, tensors: tensors["1.gate.hidden"].fill_(math.nan),
    "shape": lambda about, tensors: tensors.update({"0.gate.out": torch.zeros(3, 3)}),
    "skewed": lambda about, tensors: tensors["2.v_down"].mul_(2),
    "lacking": lambda about, tensors: tensors.pop("2.k_down"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_plan_is_refused_in_one_line(tmp_path, kind):
    small_plan().save(tmp_path / "plan")
    about, tensors = (tmp_path / "plan" / name for name in (DYNAMIC_PLAN_JSON, DYNAMIC_PLAN_TENSORS))
    if kind in ("nan", "shape", "skewed", "lacking"):
        forging.edit_tensors(tensors, lambda found: DAMAGE[kind]({}, found), about)
    else:
        forging.edit_json(about, lambda found: DAMAGE[kind](found, {}))
    with pytest.raises(LowkeyError, match="newer" if kind == "newer" else "damaged") as error:
        DynamicPlan.load(tmp_path / "plan")
    assert "\n" not in str(error.value)


def test_tensors_of_another_plan_are_refused(tmp_path):
    small_plan().save(tmp_path / "plan")
    with (tmp_path / "plan" / DYNAMIC_PLAN_TENSORS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(LowkeyError, match="damaged"):
        DynamicPlan.load(tmp_path / "plan")


def test_a_layout_that_does_not_exist_is_refused():
    with pytest.raises(LowkeyError, match="layout"):
        make_dynamic_plan(attached("llama"), pico.tokenizer(), TEXT, layout="sideways")
