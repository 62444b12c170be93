"""`lowkey plan`: what it prints, writes and refuses, and what the other commands do with its plans."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pico
import pytest
import torch
from commands import done, lowkey, printed, refused, tree

from lowkey.cache.cache import make_cache
from lowkey.evaluate.result import evaluate
from lowkey.models.attention_interface import attach
from lowkey.plan.plan import Plan
from lowkey.planner.plan_for import search_plans

CONTEXT, SEQUENCES, MEMORY = 512, 2, 900 * 1024
KEYS = {"rank", "bits", "tokens", "bytes_per_token", "kl", "recall"}
ROOM = ("--memory", "900KiB", "--context", CONTEXT, "--sequences", SEQUENCES)
FAST = ("--windows", 4, "--compare-windows", 1, "--held-out-windows", 1, "--window-tokens", 64, "--no-recall")


@pytest.fixture(scope="module")
def planned(model, tmp_path_factory):
    """(plan folder, what `plan --json` printed)."""
    out = tmp_path_factory.mktemp("planned") / "out"
    return out, printed("plan", model, out, *ROOM, *FAST)


def weights_by_hand(model) -> int:
    found = {p.data_ptr(): p.numel() * 4 for p in pico.build("llama", pad_token_id=None).parameters()}
    buffers = dict(pico.build("llama", pad_token_id=None).named_buffers()).values()
    return sum(found.values()) + sum({b.data_ptr(): b.numel() * 4 for b in buffers}.values())


def test_it_prints_what_the_contract_says(model, planned):
    _, told = planned
    assert told["format"] == 1
    assert set(told["choice"]) >= KEYS and told["choice"] in told["frontier"]
    assert all(set(row) == KEYS | {"axes"} for row in told["frontier"])
    assert told["weights_bytes"] == weights_by_hand(model)
    rate = pico.LAYERS * 2 * 4 * pico.HEAD_DIM * 4
    assert told["full_cache_bytes"] == SEQUENCES * CONTEXT * rate
    held = told["cache_bytes"] / SEQUENCES
    assert held == pytest.approx(told["choice"]["bytes_per_token"] * CONTEXT, abs=1)
    assert told["sequences_that_fit"] == (MEMORY - told["weights_bytes"]) // held >= SEQUENCES


def test_every_candidate_fits_and_the_choice_uses_the_memory(planned):
    _, told = planned
    limit = (MEMORY - told["weights_bytes"]) / SEQUENCES / CONTEXT
    assert all(row["bytes_per_token"] <= limit * 1.002 for row in told["frontier"])
    assert {tuple(row["axes"]) for row in told["frontier"]} > {("rank",), ("tokens",)}
    assert any(len(row["axes"]) > 1 for row in told["frontier"])


def test_the_cache_holds_what_was_said(model, planned):
    out, told = planned
    loaded = attach(pico.build("llama", pad_token_id=None))
    cache = make_cache(loaded, Plan.load(out, loaded))
    with torch.no_grad():
        pico.feed(loaded, pico.prompt(CONTEXT, batch=SEQUENCES), cache)
    assert cache.nbytes() <= told["cache_bytes"]
    assert cache.nbytes() >= 0.95 * told["cache_bytes"]


def test_the_plan_says_how_it_was_chosen(planned):
    out, told = planned
    profile = Plan.load(out).profile
    assert (profile["at"], profile["choice"], profile["frontier"]) == (
        CONTEXT,
        told["choice"],
        told["frontier"],
    )


def test_the_comparison_is_a_result_that_report_draws(planned, here):
    out, told = planned
    result = json.loads(out.with_name("out-frontier.json").read_text())
    assert told["result"] == str(out.with_name("out-frontier.json"))
    rows = result["rows"]
    assert rows[0]["name"] == "full" and len(rows) == 1 + len(told["frontier"])
    assert sorted(row["bytes_planned"] for row in rows[1:]) == [
        row["bytes_per_token"] for row in told["frontier"]
    ]
    done("report", told["result"], "--out", "page.html")
    page = (here / "page.html").read_text()
    assert "KL, decode" in page and all(str(row["name"]) in page for row in rows)
    assert "What lowkey plan compared" in page and "The plan, " in page
    (chosen,) = [row for row in rows if row.get("chosen")]
    assert chosen["bytes_planned"] == told["choice"]["bytes_per_token"]
    assert f"The plan, {chosen['name']}" in page


def test_no_work_is_left(planned):
    out, _ = planned
    assert sorted(p.name for p in out.parent.iterdir()) == ["out", "out-frontier.json"]


def test_other_commands_use_the_plan(model, planned, here):
    out, told = planned
    words = ("--task", "decode", "--windows", 1, "--context", 64, "--out", "r.json")
    row = next(r for r in printed("eval", model, "--plan", out, *words)["rows"] if r["plan"])
    assert row["kl_decode"] is not None and row["bytes_held"] == row["bytes_predicted"]
    assert printed("generate", model, "--plan", out, "--prompt", "It was", "--tokens", 2)["new_tokens"] == 2
    assert printed("inspect", out)["profile"]["choice"] == told["choice"]


def test_a_table_for_people(model, here):
    ran = done("plan", model, "out", "--keep", "30%", "--axes", "bits", *FAST)
    assert "choice" in ran.out and "weights:" in ran.out and "sequences fit" not in ran.out
    assert "plan written to out" in ran.err
    card = Path("out", "README.md").read_text()
    assert Plan.load("out").factors == {} and "budget 30%" in card and "budget 100%" not in card


def test_a_memory_that_holds_everything(model, here):
    told = printed("plan", model, "out", "--memory", "2GiB", "--context", 512, *FAST)
    assert told["choice"]["axes"] == [] and told["result"] is None
    assert told["cache_bytes"] == told["full_cache_bytes"]
    plan = Plan.load("out")
    assert (plan.factors, plan.bits, plan.policy) == ({}, None, None)
    assert "compresses nothing" in lowkey("plan", model, "again", "--keep", "100%", *FAST).err
    row = next(r for r in printed("eval", model, "--plan", "out", "--windows", 1)["rows"] if r["plan"])
    assert row["name"] == "uncompressed" and row["bytes_held"] == row["bytes_full"] and row["kl"] == 0


def test_a_comparison_does_not_outlive_its_plan(model, here):
    """A new plan of which nothing was measured takes the old comparison away, if it is ours to take."""
    words, place = ("plan", model, "out", "--force", *FAST), here / "out-frontier.json"
    done(*words, "--keep", "45%", "--axes", "bits")
    measured = place.read_bytes()
    done(*words, "--keep", "100%")
    assert not place.exists() and (here / "out").exists()
    place.write_bytes(measured.replace(b"0", b"1", 1))
    before = tree(here)
    with mock.patch.dict(search_plans.__globals__, {"search_plans": None}):
        assert "out-frontier.json" in refused(*words, "--keep", "100%")
    assert tree(here) == before


@pytest.mark.parametrize(("stage", "axes"), [("costs", "rank"), ("held-out", "bits")])
def test_interrupted_work_resumes(model, here, stage, axes):
    words = ("plan", model, "out", "--keep", "30%", "--axes", axes, *FAST)
    measured = "lowkey.evaluate.likelihood._decoded_logits"

    def stopping(*given):
        if given[-1].name != stage:
            return evaluate(*given)
        with mock.patch("lowkey.evaluate.footprint.measure_footprint", side_effect=KeyboardInterrupt):
            return evaluate(*given)

    with mock.patch.dict(search_plans.__globals__, {"evaluate": stopping}):
        assert "plan, recover" in refused(*words, status=130)
    assert not (here / "out").exists() and any((here / "out.partial" / stage).iterdir())
    if stage == "held-out":
        with mock.patch(measured, side_effect=AssertionError("measured again")):
            done(*words)
    else:
        done(*words)
    assert not (here / "out.partial").exists() and (here / "out" / "plan.json").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--memory", "100KiB", "--context", 64], ["memory 100 KiB", "weights", "alone take 554.32 KiB"]),
        (
            ["--memory", "600KiB", "--context", 512, "--sequences", 5, "--axes", "bits"],
            ["memory 600 KiB", "5 x 512 tokens", "at least", "context of"],
        ),
        (["--memory", "2GiB", "--context", 513], ["context 513", "512 positions"]),
        (["--keep", "0.5%", "--axes", "bits"], ["keep 0.5%", "at least", "more axes"]),
        (["--keep", "20%", "--policy", "headkv-r2"], ["head", "lowkey heads"]),
        (["--keep", "20%", "--policy", "think"], ["policy 'think'", "axis tokens alone"]),
    ],
    ids=str,
)
def test_what_cannot_be_met_is_refused_with_what_can(model, here, words, says):
    before = tree(here)
    line = refused("plan", model, "out", *words, *FAST)
    assert [s for s in says if s not in line] == [], line
    assert tree(here) == before


def test_the_memory_that_is_named_is_enough(model, here):
    words = ("--context", 512, "--sequences", 5, "--axes", "bits", *FAST)
    line = refused("plan", model, "out", "--memory", "600KiB", *words)
    named = line.split("give at least ")[1].split(",")[0].replace(" ", "")
    told = printed("plan", model, "out", "--memory", named, *words)
    assert told["weights_bytes"] + told["cache_bytes"] <= float(named.removesuffix("MiB")) * 2**20
