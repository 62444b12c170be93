"""Plans with a rank for every token: made from text, saved, loaded, and refused when damaged."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import forging
import pico
import pytest
import torch
from dynamic_plans import LENGTH, LEVELS, TEXT, former_folder, make_plan
from pico import attached, feed, prompt

import lowkey
from lowkey.calibration.calibrate import Sample
from lowkey.calibration.dynamic import make_dynamic_plan
from lowkey.calibration.recover import recover
from lowkey.core.types import LowkeyError
from lowkey.export import export_hf
from lowkey.methods.dynakv import GateTraining
from lowkey.plan.card import plan_card
from lowkey.plan.held_bytes import held_bytes
from lowkey.plan.plan import Plan
from lowkey.plan.reading import PLAN_JSON, PLAN_TENSORS
from lowkey.policies import SnapKV, policy_to_dict
from lowkey.storage.exact import Exact


def small_plan(layout="post_rope") -> Plan:
    training = GateTraining(target=0.4, steps=2, hidden=8)
    return make_dynamic_plan(
        attached("llama"), pico.tokenizer(), TEXT, layout=layout, sample=Sample(8, 24), training=training
    )


def test_a_plan_is_made_saved_and_loaded(tmp_path, layout):
    model, ids = attached("llama"), prompt(LENGTH)
    plan = small_plan(layout)
    ranks = plan.token_ranks
    assert ranks.share <= 0.4 + 1e-6 and ranks.levels == LEVELS and ranks.training["target"] == 0.4
    plan.save(tmp_path / "plan")
    again = Plan.load(tmp_path / "plan", model)
    assert torch.equal(
        feed(model, ids, lowkey.make_cache(model, plan)), feed(model, ids, lowkey.make_cache(model, again))
    )
    for field in ("levels", "share", "divergence", "training"):
        assert getattr(again.token_ranks, field) == getattr(ranks, field)
    for field in ("layout", "provenance", "method", "budget"):
        assert getattr(again, field) == getattr(plan, field)
    assert again.digest() == plan.digest() and again.describe() == json.loads(json.dumps(plan.describe()))
    plan.save(tmp_path / "plan")


def test_a_folder_of_the_former_kind_loads_and_is_renewed(tmp_path, layout):
    """The next save writes the form of today in its place."""
    model, plan, ids = attached("llama"), make_plan("llama", layout), prompt(LENGTH)
    folder = former_folder(tmp_path / "plan", plan)
    loaded = Plan.load(folder, model)
    assert loaded.digest() == plan.digest() and loaded.token_ranks.describe() == plan.token_ranks.describe()
    assert (loaded.layout, loaded.budget, loaded.method["name"]) == (layout, "50%", "dynakv")
    expected = feed(model, ids, lowkey.make_cache(model, plan))
    assert torch.equal(feed(model, ids, lowkey.make_cache(model, loaded)), expected)
    loaded.save(folder)
    assert {p.name for p in folder.iterdir()} == {PLAN_JSON, PLAN_TENSORS, "README.md", ".lowkey.json"}
    assert torch.equal(feed(model, ids, lowkey.make_cache(model, Plan.load(folder, model))), expected)


def test_a_folder_of_both_kinds_is_todays(tmp_path):
    folder = former_folder(tmp_path / "plan", make_plan("llama", "pre_rope"))
    small_plan("post_rope").save(tmp_path / "new")
    for name in (PLAN_JSON, PLAN_TENSORS):
        (tmp_path / "new" / name).rename(folder / name)
    assert Plan.load(folder).layout == "post_rope"


def test_bytes_per_token_are_those_of_a_cache(layout):
    """Were all tokens like the held-out ones: here, at one level."""
    model, plan = attached("llama"), make_plan("llama", layout, level=1)
    plan = replace(plan, token_ranks=replace(plan.token_ranks, share=0.5))
    sizes = []
    for length in (12, 24):
        past = lowkey.make_cache(model, plan)
        feed(model, prompt(length), past)
        sizes.append(past.nbytes())
    assert (sizes[1] - sizes[0]) / (2 * 12) == plan.bytes_per_token(4)
    past = lowkey.make_cache(model, plan)
    feed(model, prompt(24, batch=1), past)
    assert past.nbytes() == held_bytes(plan, 24, 4)


def test_the_card_says_what_a_token_keeps(layout):
    plan = make_plan("llama", layout)
    card = plan_card(plan)
    assert "16, 8, 4 or 2 of 16 coordinates" in card and "50.0% in the mean" in card and "`dynakv`" in card
    assert f"| 1024 | {held_bytes(plan, 1024, 2)} |" in card and "key rank" not in card


def test_another_models_plan_is_refused(tmp_path):
    small_plan().save(tmp_path / "plan")
    with pytest.raises(LowkeyError, match="made for model"):
        Plan.load(tmp_path / "plan", lowkey.attach(pico.build("llama-mha")))


def test_gates_for_other_layers_are_refused():
    """A Plan need not come from a file."""
    plan = make_plan("llama", "post_rope")
    gates = {i: gate for i, gate in plan.token_ranks.gates.items() if i}
    with pytest.raises(LowkeyError, match="layers"):
        lowkey.make_cache(
            attached("llama"), replace(plan, token_ranks=replace(plan.token_ranks, gates=gates))
        )


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(LowkeyError, match="other files"):
        small_plan().save(tmp_path)


# -- what needs ranks that all tokens share

SNAPKV = SnapKV("50%")
COMBINED = {
    "policy": ({"policy": SNAPKV}, {"policy": policy_to_dict(SNAPKV)}),
    "bits": ({"bits": "int4"}, {"bits": "int4"}),
    "exact tokens": ({"exact": Exact(2, 0)}, {"recent": 3}),
}


@pytest.mark.parametrize("what", COMBINED)
def test_other_axes_are_refused(what, layout):
    """As options of the cache, and as parts of the plan."""
    model, plan = attached("llama"), make_plan("llama", layout)
    options, fields = COMBINED[what]
    says = f"^{what} with plan of method 'dynakv': it gives every token a rank of its own"
    with pytest.raises(LowkeyError, match=says) as error:
        lowkey.make_cache(model, plan, **options)
    assert "\n" not in str(error.value)
    with pytest.raises(LowkeyError, match=says):
        lowkey.make_cache(model, replace(plan, **fields))


def test_options_that_ask_for_nothing_are_none(layout):
    model, plan, ids = attached("llama"), make_plan("llama", layout), prompt(LENGTH)
    past = lowkey.make_cache(model, plan, "none", bits="none", exact=Exact(prefill="exact"))
    other = lowkey.make_cache(model, plan)
    other.exact_prefill(True)
    assert torch.equal(feed(model, ids, past), feed(model, ids, other))


def test_export_and_recovery_are_refused(tmp_path):
    plan = make_plan("llama", "post_rope")
    with pytest.raises(LowkeyError, match=r"^export with .* a rank of its own"):
        export_hf(attached("llama"), pico.tokenizer(), plan, tmp_path / "out")
    with pytest.raises(LowkeyError, match=r"^recover with .* a rank of its own"):
        recover(attached("llama"), pico.tokenizer(), plan)
    assert list(tmp_path.iterdir()) == []


# -- damage, in folders of today and of the former kind

DAMAGE = {
    "newer": lambda about, ranks: about.update(format=99),
    "levels": lambda about, ranks: ranks.update(levels=[8, 16]),
    "unordered": lambda about, ranks: ranks.update(levels=[16, 4, 8, 2]),
    "level twice": lambda about, ranks: ranks.update(levels=[16, 8, 8, 2]),
    "not whole": lambda about, ranks: ranks.update(levels=[15, 8, 4, 2]),
    "halves": lambda about, ranks: ranks.update(levels=[16, 8, 4.5, 2]),
    "zero": lambda about, ranks: ranks.update(levels=[16, 8, 4, 0]),
    "no levels": lambda about, ranks: ranks.update(levels=[]),
    "layout": lambda about, ranks: about.update(layout="sideways"),
    "missing": lambda about, ranks: ranks.pop("share"),
    "numbers": lambda about, ranks: ranks.update(divergence="little"),
    "huge": lambda about, ranks: ranks.update(share=10**400),
    "share": lambda about, ranks: ranks.update(share=1.5),
    "target": lambda about, ranks: ranks["training"].pop("target"),
    "no target": lambda about, ranks: ranks["training"].update(target=0),
    "geometry": lambda about, ranks: about["geometry"].update(head_dim="16"),
    "model": lambda about, ranks: about["provenance"].pop("model_sha256"),
    "checksum": lambda about, ranks: about.update(tensors_sha256=None),
    "sealed": lambda about, ranks: about.update(tensors_sha256="0" * 64),
}
DAMAGED_TENSORS = {
    "nan": lambda tensors: tensors["1.gate.hidden"].fill_(math.nan),
    "shape": lambda tensors: tensors.update({"0.gate.out": torch.zeros(3, 3)}),
    "scale": lambda tensors: tensors.update({"0.gate.scale": torch.ones(4, 16)}),
    "half": lambda tensors: tensors.update({"0.gate.scale": tensors["0.gate.scale"].half()}),
    "half maps": lambda tensors: tensors.update({"0.k_down": tensors["0.k_down"].half()}),
    "skewed": lambda tensors: tensors["2.v_down"].mul_(2),
    "narrow": lambda tensors: tensors.update({"2.v_down": tensors["2.v_down"][..., :8].contiguous()}),
    "lacking": lambda tensors: tensors.pop("2.k_down"),
    "no gate": lambda tensors: tensors.pop("2.gate.out_bias"),
    "more": lambda tensors: tensors.update({"7.gate.out": torch.zeros(6, 4)}),
    "mean": lambda tensors: tensors.update({"0.k_mean": torch.zeros(4, 16)}),
}
# what only one of the two has
OF_TODAY = {
    "no object": lambda about, ranks: about.update(token_ranks=[1]),
    "bits": lambda about, ranks: about.update(bits="int4"),
    "sinks": lambda about, ranks: about.update(sinks=2),
    "policy": lambda about, ranks: about.update(policy=policy_to_dict(SNAPKV)),
    "ranks": lambda about, ranks: about["ranks"].update({"1": [16, 8]}),
    "no ranks": lambda about, ranks: about.update(ranks={}),
    "order": lambda about, ranks: about.update(order={"0": [3, 2, 1, 0]}),
    "skew maps": lambda about, ranks: about.update(orthonormal=False),
}
OF_FORMER = {
    "layers": lambda about, ranks: about.update(layers=[0, 7]),
    "twice": lambda about, ranks: about.update(layers=[0, 1, 1, 2]),
    "few": lambda about, ranks: about.update(layers=[0, 1]),
    "no layers": lambda about, ranks: about.pop("layers"),
    "method": lambda about, ranks: about.update(method=["dynakv"]),
}


def refused(folder, newer=False):
    """Loading gives one line that says why."""
    with pytest.raises(LowkeyError, match="newer" if newer else "damaged") as error:
        Plan.load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("kind", [*DAMAGE, *OF_TODAY, *DAMAGED_TENSORS])
def test_a_damaged_plan_is_refused_in_one_line(tmp_path, kind):
    make_plan("llama", "post_rope").save(tmp_path / "plan")
    about, tensors = (tmp_path / "plan" / name for name in (PLAN_JSON, PLAN_TENSORS))
    if kind in DAMAGED_TENSORS:
        forging.edit_tensors(tensors, DAMAGED_TENSORS[kind], about)
    else:
        forging.edit_json(about, lambda found: (DAMAGE | OF_TODAY)[kind](found, found["token_ranks"]))
    refused(tmp_path / "plan", kind == "newer")


@pytest.mark.parametrize("kind", [*DAMAGE, *OF_FORMER, *DAMAGED_TENSORS])
def test_a_damaged_former_plan_is_refused_in_one_line(tmp_path, kind):
    folder = former_folder(tmp_path / "plan", make_plan("llama", "post_rope"))
    about, tensors = folder / "dynaplan.json", folder / "dynaplan.safetensors"
    if kind in DAMAGED_TENSORS:
        forging.edit_tensors(tensors, DAMAGED_TENSORS[kind], about)
    else:
        forging.edit_json(about, lambda found: (DAMAGE | OF_FORMER)[kind](found, found))
    refused(folder, kind == "newer")


def test_tensors_of_another_plan_are_refused(tmp_path):
    small_plan().save(tmp_path / "plan")
    with (tmp_path / "plan" / PLAN_TENSORS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    refused(tmp_path / "plan")


def test_a_layout_that_does_not_exist_is_refused():
    with pytest.raises(LowkeyError, match="layout"):
        make_dynamic_plan(attached("llama"), pico.tokenizer(), TEXT, layout="sideways")
