"""`lowkey eval`: the rows and the result file that it writes, and the arguments it refuses."""

from __future__ import annotations

import json

import pico
import pytest
from commands import EVERYTHING, ROW, SCORE, SMALL, done, printed, refused, tree

from lowkey.cache.cache import make_cache
from lowkey.core import files
from lowkey.models.attention_interface import attach
from lowkey.plan.plan import Plan

# -- bad arguments


@pytest.mark.parametrize(
    "words, says",
    [
        (["--task", "perplexitty"], ["task 'perplexitty'", "perplexity"]),
        (["--task", "perplexity,"], ["task ''", "perplexity"]),
        (["--context", 0], ["context 0", "8", "512"]),
        (["--context", -1], ["context -1", "8", "512"]),
        (["--context", 513], ["context 513", "512"]),
        (["--context", 16, "--task", "recall"], ["context 16", "longer context"]),
        (["--windows", 0], ["windows 0", "at least 1"]),
        (["--cases", 0], ["cases 0", "at least 1"]),
        (["--bits", 5], ["bits '5'", "int8", "kivi4"]),
        (["--bits", "few"], ["bits 'few'", "hadamard4"]),
        (["--bits", "none"], ["bits 'none'", "--plan"]),
        (["--policy", "none"], ["policy 'none'", "--plan"]),
        (["--policy", "none", "--budget", "25%"], ["budget '25%'", "leave it out"]),
        (["--plan", "missing"], ["missing", "does not exist", "lowkey compress"]),
        (["--out", "."], ["output '.'", "folder"]),
        (["--out", "notes.txt/r.json", "--task", "speed"], ["notes.txt/r.json", "another place"]),
    ],
    ids=str,
)
def test_bad_arguments_of_eval(model, here, words, says):
    before = tree(here)
    line = refused("eval", model, *words)
    assert [s for s in says if s not in line] == []
    assert tree(here) == before


# -- eval


def test_eval_prints_one_result_and_writes_it(scored):
    out, ran = scored
    result = json.loads(ran.out)
    assert list(result) == ["format", "model", "environment", "rows"]
    assert result["format"] == 1
    assert files.read_json(out, "result", "result", 1) == result
    assert f"result written to {out}" in ran.err


def test_rows_of_a_result(scored, made):
    rows = json.loads(scored[1].out)["rows"]
    assert [row["name"] for row in rows] == ["full", "pca 50%", "int8", "int4"]
    assert [key for row in rows for key in ROW if key not in row] == []
    assert (rows[1]["method"], rows[1]["plan"], rows[1]["budget"]) == ("pca", str(made[0]), "50%")


def test_the_full_row_is_the_reference(scored):
    full = json.loads(scored[1].out)["rows"][0]
    assert abs(full["kl"]) < 1e-6
    assert (full["top1_agreement"], full["layer_error"]) == (1.0, 0.0)
    assert full["bytes_held"] == full["bytes_full"]


def test_bytes_are_held_as_predicted(scored):
    rows = json.loads(scored[1].out)["rows"]
    assert [row["bytes_held"] for row in rows] == [row["bytes_predicted"] for row in rows]
    assert len({row["bytes_held"] for row in rows}) == len(rows)


def test_everything_that_was_asked_for_is_measured(scored):
    unmeasured = {key for row in json.loads(scored[1].out)["rows"] for key in ROW[6:] if row[key] is None}
    assert unmeasured == set()
    assert json.loads(scored[1].out)["rows"][0]["task"] == EVERYTHING[1]


def test_without_a_task_perplexity_and_bytes_are_measured(model, here):
    for row in printed("eval", model, *SCORE, "--out", "r.json")["rows"]:
        assert row["task"] == "perplexity" and row["bytes_held"] and row["kl"] is not None
        assert {
            row[key] for key in ("layer_error", "exact_match", "perplexity_decode", "prefill_ms", "step_ms")
        } == {None}


@pytest.mark.parametrize(
    "words",
    [["--task", "layers"], ["--task", "layers,speed"], ["--task", "layers", "--task", "speed"]],
    ids=str,
)
def test_measures_that_were_not_asked_for_are_null(model, here, words):
    for row in printed("eval", model, *SCORE, *words, "--out", "r.json")["rows"]:
        assert row["layer_error"] is not None and row["bytes_held"] is not None
        assert {row[key] for key in ("perplexity", "kl", "top1_agreement", "exact_match")} == {None}


@pytest.mark.parametrize("bits", [8, 4])
def test_bits_choose_the_packed_rows(model, here, bits):
    rows = printed("eval", model, *SCORE, "--task", "speed", "--bits", bits, "--out", "r.json")["rows"]
    assert [row["name"] for row in rows] == ["full", f"int{bits}"]


def test_plans_of_the_same_name_keep_rows_of_their_own(model, made, here):
    done("compress", model, "wide", *SMALL, "--ranks", "2,16")
    words = ("--plan", made[0], "--plan", "wide", "--bits", 8, "--task", "layers", "--out", "r.json")
    rows = printed("eval", model, *SCORE, *words)["rows"]
    assert [row["name"] for row in rows] == [
        "full",
        "pca 50% pca",
        "pca 50% wide",
        "pca 50% int8 pca",
        "pca 50% int8 wide",
        "int8",
    ]
    assert [row["plan"] for row in rows] == [None, *[str(made[0]), "wide"] * 2, None]
    assert rows[1]["layer_error"] != rows[2]["layer_error"]
    assert rows[3]["bytes_held"] < rows[1]["bytes_held"] and (rows[3]["bits"], rows[3]["packing"]) == (
        8,
        "int8",
    )


def test_a_plan_in_other_integers_and_without_its_policy(model, here, full_plan):
    words = ("--plan", full_plan, "--bits", "int8", "--bits", "kivi4", "--bits", "none", "--policy", "none")
    rows = printed("eval", model, *SCORE, *words, "--task", "decode", "--out", "r.json")["rows"]
    assert [(row["plan"] and row["packing"], row["policy"] is not None) for row in rows[:5]] == [
        (None, False),
        ("kivi4", True),
        ("kivi4", False),
        ("int8", True),
        (None, True),
    ]
    assert [row["name"] for row in rows[5:]] == ["int8", "kivi4"]
    held = [row["bytes_held"] for row in rows[:5]]
    full, own, all_tokens, eight, unpacked = held
    assert own < min(all_tokens, eight) and eight < unpacked and max(held[1:]) < full
    loaded = attach(pico.build("llama", pad_token_id=None))
    for row, options in (
        (rows[2], {"policy": "none"}),
        (rows[3], {"bits": "int8"}),
        (rows[4], {"bits": "none"}),
    ):
        cache = make_cache(loaded, Plan.load(full_plan, loaded), **options)
        pico.feed(loaded, pico.prompt(192, batch=1), cache)
        assert cache.nbytes() == row["bytes_held"]


def test_without_a_name_the_result_goes_to_results(model, here):
    err = done("eval", model, *SCORE, "--task", "speed").err
    (found,) = (here / "results").iterdir()
    assert found.name.startswith("eval-pico-") and f"results/{found.name}" in err


def test_brackets_in_a_path_are_printed_as_they_are(model, here):
    ran = done("eval", model, *SCORE, "--task", "speed", "--out", "r[bold][1].json")
    assert "r[bold][1].json" in ran.err and (here / "r[bold][1].json").exists()


def test_eval_without_json_prints_a_table(model, made, here):
    ran = done("eval", model, "--plan", made[0], *SCORE, "--task", "layers", "--out", "r.json")
    assert "pca 50%" in ran.out and "layer error" in ran.out and "100.0%" in ran.out
    assert "recall" not in ran.out


def test_the_text_and_the_command_are_recorded(model, here):
    (here / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    environment = printed("eval", model, *SCORE, "--task", "speed", "--data", "text.txt", "--out", "r.json")[
        "environment"
    ]
    assert environment["data"]["name"] == "text.txt" and environment["data"]["context"] == 192
    assert environment["command"].startswith("lowkey eval") and "--data text.txt" in environment["command"]
    assert (environment["dtype"], environment["device"]) == ("float32", "cpu")


def test_another_dtype(model, here):
    result = printed(
        "eval", model, *SCORE, "--task", "speed", "--bits", 8, "--dtype", "bfloat16", "--out", "r.json"
    )
    assert result["environment"]["dtype"] == "bfloat16"
    assert result["rows"][0]["bytes_per_token"] == pico.LAYERS * 2 * 4 * pico.HEAD_DIM * 2
