"""Plans on every combination of axes: saved and loaded, in words, and refused where they cannot be used."""

from __future__ import annotations

import json
from dataclasses import replace

import forging
import pico
import pytest

import lowkey
from lowkey.calibration.recover import recover
from lowkey.catalog import make_policy
from lowkey.core.types import LowkeyError
from lowkey.evaluate.settings import planned
from lowkey.export import export_hf
from lowkey.plan.card import plan_card
from lowkey.plan.held_bytes import held_bytes
from lowkey.plan.plan import NO_METHOD, Plan
from lowkey.plan.reading import PLAN_JSON
from lowkey.policies import policy_from_dict, policy_to_dict

POLICY = policy_to_dict(make_policy("snapkv", "25%", {"recent": "6"}))


def made(rank, bits, tokens, sinks=0, recent=0) -> Plan:
    """A plan of the pico model on some of the axes."""
    plan = pico.plan(pico.attached("llama"), bits=bits, policy=tokens, sinks=sinks, recent=recent)
    return plan if rank else replace(plan, factors={}, method=NO_METHOD, allocator=NO_METHOD, budget="100%")


@pytest.mark.parametrize("rank", [True, False])
@pytest.mark.parametrize("bits", ["kivi4", None])
@pytest.mark.parametrize("tokens", [POLICY, None], ids=["tokens", "all"])
@pytest.mark.parametrize("window", [(4, 32), (0, 0)])
def test_a_plan_on_any_axes_comes_back(tmp_path, rank, bits, tokens, window):
    plan = made(rank, bits, tokens, *window)
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan", pico.attached("llama"))
    assert loaded.describe() == json.loads(json.dumps(plan.describe())) and loaded.digest() == plan.digest()
    if tokens:
        assert policy_from_dict(loaded.policy) == policy_from_dict(POLICY)
    card = (tmp_path / "plan" / "README.md").read_text()
    assert ("snapkv" in card) == bool(tokens) and ("kivi4" in card) == bool(bits)
    assert ("method `pca`" in card) == rank and ("4 sinks" in card) == (window == (4, 32))
    assert f"| 1024 | {held_bytes(plan, 1024, 2)} |" in card


@pytest.mark.parametrize(("bits", "window"), [("kivi4", "32 recent tokens"), ("int8", "none")])
def test_the_card_names_the_window_of_a_packing(bits, window):
    """A cache of `kivi4` keeps 32 tokens exact, whatever the plan says."""
    own = made(False, bits, None, 0, 0)
    assert f"| exact | {window} |" in plan_card(own)
    exact = lowkey.make_cache(pico.attached("llama"), own).layers[0].exact
    assert (exact.sinks, exact.recent) == (0, 32 if bits == "kivi4" else 0)


def test_the_card_names_options_and_head_scores():
    heads = {"r2": [[1.0, 2.0, 0.5, 0.25]] * 3}
    written = policy_to_dict(make_policy("headkv-r2", "30%", {"window": "16", "recent": "11"}, {"beta": "3"}))
    card = plan_card(replace(made(True, None, None), policy=written, heads=heads))
    assert "\nOptions of policy `snapkv`: " in card and "window=16" in card and "recent=11" in card
    assert "options of allocator `headkv`: kind=r2, beta=3.0" in card
    assert "\nHead scores: `r2`, of 3 layers of 4 KV heads each.\n" in card
    assert "at most" not in card and "Options" not in plan_card(made(True, None, None))
    competing = policy_to_dict(make_policy("snapkv", "30%", {"allocator": "global"}))
    assert "in bfloat16, at most (the text decides):" in plan_card(
        replace(made(True, None, None), policy=competing)
    )


def test_a_plan_of_format_3_loads(tmp_path):
    made(True, "int4", None).save(tmp_path / "plan")

    def older(meta):
        del meta["policy"], meta["token_ranks"]
        meta["format"] = 3

    forging.edit_json(tmp_path / "plan" / PLAN_JSON, older)
    loaded = Plan.load(tmp_path / "plan", pico.attached("llama"))
    assert loaded.policy is None and loaded.bits == "int4"


@pytest.mark.parametrize(
    "policy",
    [
        "snapkv",
        {},
        {**POLICY, "name": "snapkw"},
        {**POLICY, "budget": "120%"},
        {**POLICY, "parameters": {"window": -1}},
        {**POLICY, "parameters": {"windw": 8}},
        {**POLICY, "allocator": {"name": "none of ours", "parameters": {}}},
        {**POLICY, "allocator": {**POLICY["allocator"], "share": 0.5}},
        {**POLICY, "every": 8},
    ],
    ids=str,
)
def test_a_damaged_policy_is_refused(tmp_path, policy):
    made(False, None, POLICY).save(tmp_path / "plan")
    forging.edit_json(tmp_path / "plan" / PLAN_JSON, lambda meta: meta.update(policy=policy))
    with pytest.raises(LowkeyError, match="its policy is none of ours") as refusal:
        Plan.load(tmp_path / "plan")
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("layers", [[], [0], [0, 1], [0, 0, 1, 2], [0, 1, 2, 2], [2, 1, 0]], ids=str)
def test_layers_that_are_not_the_models_are_refused(tmp_path, layers):
    """Without maps, nothing but geometry says which layers are compressed."""
    made(False, "int8", None).save(tmp_path / "plan")
    forging.edit_json(
        tmp_path / "plan" / PLAN_JSON, lambda meta: meta["geometry"].update(compressible=layers)
    )
    with pytest.raises(LowkeyError, match="layers") as refusal:
        Plan.load(tmp_path / "plan", pico.attached("llama"))
    assert len(str(refusal.value).splitlines()) == 1
    if layers not in ([0], [0, 1]):  # which another model may have
        with pytest.raises(LowkeyError, match="geometry does not name its layers once each"):
            Plan.load(tmp_path / "plan")


def test_a_plan_that_compresses_nothing_is_stock():
    model, plan = pico.attached("llama"), made(False, None, None)
    cache, stock = lowkey.make_cache(model, plan), lowkey.make_cache(model)
    ids = pico.prompt(40)
    assert pico.feed(model, ids, cache).equal(pico.feed(model, ids, stock))
    assert cache.nbytes() == stock.nbytes() == len(ids) * held_bytes(plan, 40, 4)
    assert "all of it" in plan_card(plan)


def test_rows_are_named_by_what_is_in_use():
    model = pico.attached("llama")
    names = {
        "pca 50% snapkv 25% kivi4": made(True, "kivi4", POLICY),
        "pca 50%": made(True, None, None),
        "snapkv 25%": made(False, None, POLICY),
        "int8": made(False, "int8", None),
        "uncompressed": made(False, None, None),
    }
    assert [planned(model, plan, "").name for plan in names.values()] == list(names)


@pytest.mark.parametrize(
    ("plan", "says"),
    [(made(False, "int8", None), "no low-rank maps"), (made(True, None, POLICY), "drops tokens")],
    ids=["no rank", "tokens"],
)
def test_export_refuses_what_no_checkpoint_does(tmp_path, plan, says):
    with pytest.raises(LowkeyError, match=says):
        export_hf(pico.attached("llama"), pico.tokenizer(), plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recover_refuses_a_plan_without_ranks():
    pytest.importorskip("peft")
    with pytest.raises(LowkeyError, match="nothing to train through"):
        recover(pico.attached("llama"), pico.tokenizer(), made(False, "int8", POLICY))
