"""Eviction policies in `lowkey eval` and `lowkey generate`, alone and on top of a plan."""

from __future__ import annotations

import pytest
from commands import ROW, done, printed, refused, tree


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Head scores of `tiny`."""
    place = tmp_path_factory.mktemp("heads") / "r2.json"
    done("heads", "tiny", "-o", place, "--task", "facts", "--cases", 12, "--context", 400)
    return place


def test_eval_has_a_row_for_each_policy_and_budget(here, scores):
    words = (
        "--policy",
        "ada-kv,headkv-r2",
        "--budget",
        "6%,40 tokens",
        "--heads",
        scores,
        "-O",
        "sinks=1",
        "-O",
        "recent=4",
    )
    told = printed("eval", "tiny", *words, "--task", "recall", "--cases", 6, "--context", 256, "--bits", 4)
    rows = told["rows"]
    assert [r["name"] for r in rows] == [
        "full",
        "ada-kv 6%",
        "ada-kv 40 tokens",
        "headkv-r2 6%",
        "headkv-r2 40 tokens",
        "int4",
    ]
    assert (
        set(ROW) <= set(rows[1])
        and rows[1]["policy"]["allocator"]["name"] == "ada"
        and rows[1]["budget"] == "6%"
    )
    for row in rows[1:5]:
        assert (
            row["bytes_held"] == row["bytes_predicted"] < 0.2 * row["bytes_full"]
            and row["layer_error"] is None
        )
        tokens = 0.06 * 256 if row["budget"] == "6%" else 40
        assert sum(map(sum, row["kept_per_head"])) == round(24 * tokens)
    assert len({tuple(map(tuple, r["kept_per_head"])) for r in rows[1:5]}) == 4
    assert rows[2]["exact_match"] >= 0.5
    assert told["environment"]["data"]["refeed"] is True


def test_policies_go_on_top_of_a_plan(model, plan, here):
    told = printed(
        "eval",
        model,
        "--plan",
        plan,
        "--policy",
        "snapkv,kvzip",
        "--budget",
        "50%",
        "--task",
        "perplexity",
        "--windows",
        2,
        "--context",
        64,
    )
    full, low, *both = [r for r in told["rows"] if r["bits"] is None]
    for row in both:
        assert row["plan"] == str(plan) and row["policy"] and " on " in row["name"]
        assert row["bytes_held"] == row["bytes_predicted"] < low["bytes_held"] < full["bytes_held"]


def test_generate_over_a_policy_says_what_is_held(here):
    told = printed(
        "generate",
        "tiny",
        "--prompt",
        "It was a dark night. " * 20,
        "--policy",
        "kvzip",
        "--budget",
        "30%",
        "--tokens",
        8,
    )
    assert told["new_tokens"] == 8 and told["bytes_held"] < 0.5 * told["bytes_full"]


def test_fastgen_needs_no_budget(here):
    told = printed(
        "generate",
        "tiny",
        "--prompt",
        "It was a dark night. " * 10,
        "--policy",
        "fastgen",
        "-O",
        "recovery=0.5",
        "--tokens",
        2,
    )
    assert 0 < told["bytes_held"] < told["bytes_full"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--policy", "snapvk", "--budget", "5%"), "did you mean 'snapkv'"),
        (("--policy", "snapkv"), "needs a budget"),
        (("--policy", "fastgen,snapkv"), "needs a budget"),
        (("--budget", "5%"), "give --policy too"),
        (("--policy", "snapkv", "--budget", "1%"), "do not hold the 4 sinks and 8 recent"),
        (("--policy", "snapkv", "--budget", "150%"), "150%"),
        (("--policy", "snapkv", "--budget", "banana"), "banana"),
        (
            ("--policy", "headkv-r2", "--budget", "10%"),
            "lowkey heads MODEL --kind r2 --out r2.json`, then pass --heads r2.json",
        ),
        (
            ("--policy", "razor", "--budget", "10%"),
            "--kind induction --out induction.json` and `lowkey heads MODEL --kind echo",
        ),
        (("--policy", "headkv-r2", "--budget", "10%", "--heads", "notes.txt"), "notes.txt"),
        (("--policy", "headkv-r2", "--budget", "10%", "--heads", "none.json"), "none.json"),
        (("--policy", "snapkv", "--budget", "10%", "-O", "windw=3"), "windw"),
        (("--policy", "snapkv", "--budget", "10%", "-O", "window=x"), "window"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(here, words, says):
    before = tree(here)
    assert says in refused("eval", "tiny", *words, "--task", "recall", "--out", "r.json")
    assert tree(here) == before


def test_another_models_head_scores_are_refused(model, scores, here):
    assert "made for" in refused(
        "eval", model, "--policy", "headkv-r2", "--budget", "50%", "--heads", scores, "--out", "r.json"
    )
