"""`lowkey eval`: resumed work, windows from several texts, and the window of exact tokens."""

from __future__ import annotations

import json
from unittest import mock

import pico
import pytest
from commands import lowkey, printed

from lowkey.core import files
from lowkey.evaluate import likelihood
from lowkey.storage.exact import DEFAULT_WINDOW

SCORE = ("--windows", 2, "--context", 64, "--bits", 8, "--bits", 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pico.save(tmp_path_factory.mktemp("model") / "pico")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stopped_after(windows: int):
    """Ctrl-C when so many windows were scored, over all settings but the full cache."""
    score, calls = likelihood.Reference.score, []

    def stopping(*args):
        calls.append(1)
        if len(calls) > windows:
            raise KeyboardInterrupt
        return score(*args)

    return mock.patch.object(likelihood.Reference, "score", stopping)


@pytest.mark.parametrize("out", [(), ("--out", "r.json")], ids=["named by time", "named"])
def test_after_ctrl_c_the_same_command_goes_on_to_the_same_rows(model, here, out, monkeypatch):
    straight = printed("eval", model, *SCORE, "--out", "straight.json")["rows"]
    with stopped_after(3):
        status, said, err = lowkey("eval", model, *SCORE, *out)
    assert (
        (status, said) == (130, "") and "eval" in err and "resume when the same command is given again" in err
    )
    assert [p.suffix for p in here.rglob("*.json*") if p.parent != here / "straight.json" and p.is_dir()] == [
        ".partial"
    ]
    scored, score = [], likelihood.Reference.score
    monkeypatch.setattr(likelihood.Reference, "score", lambda *a: scored.append(1) or score(*a))
    assert printed("eval", model, *SCORE, *out)["rows"] == straight
    assert len(scored) == 1  # of four
    assert not list(here.rglob("*.partial"))
    (found,) = [p for p in here.rglob("*.json") if p.name != "straight.json"]
    assert files.read_json(found, "result", "result", 1)["rows"] == straight


def test_another_command_starts_a_result_of_its_own(model, here, monkeypatch):
    """Even in the same second."""
    monkeypatch.setattr("lowkey.cli.result_paths.time.strftime", lambda _: "20260101-000000")
    with stopped_after(3):
        lowkey("eval", model, *SCORE)
    (work,) = here.rglob("*.partial")
    printed("eval", model, *SCORE, "--sinks", 2)
    assert work.exists() and len(list((here / "results").iterdir())) == 2


def test_windows_come_from_several_texts_in_turn(model, here):
    for name, words in (("a.txt", "It was a dark night. "), ("b.txt", "The sun rose early. ")):
        (here / name).write_text(words * 40)
    both = printed("eval", model, *SCORE, "--data", "a.txt", "--data", "b.txt", "--out", "r.json")
    apart = [
        printed("eval", model, *SCORE, "--windows", 1, "--data", name, "--out", "r.json")
        for name in ("a.txt", "b.txt")
    ]
    for row, *own in zip(both["rows"], *(found["rows"] for found in apart), strict=True):
        assert row["per_window"]["nll"] == [r["per_window"]["nll"][0] for r in own]
    data = both["environment"]["data"]
    assert (
        data["name"] == "a.txt, b.txt" and list(data["texts"]) == ["a.txt", "b.txt"] and data["windows"] == 2
    )
    assert data["sha256"] not in [found["environment"]["data"]["sha256"] for found in apart]


def test_one_window_of_exact_tokens_for_every_row(model, here):
    made = ("--method", "pca", "--windows", 8, "--context", 32)
    printed("compress", model, "plan", *made)
    printed("compress", model, "bare", *made, "--sinks", 0, "--recent", 0)
    words = ("--plan", "plan", "--plan", "bare", *SCORE)

    def kept(*more: object) -> list[tuple]:
        rows = printed("eval", model, *words, *more, "--out", "r.json")["rows"]
        assert all(row["bytes_held"] == row["bytes_predicted"] for row in rows)
        return [
            (row["name"], row["sinks"], row["recent"])
            for row in rows
            if row["packing"] is None or row["method"] is None
        ]

    own = (DEFAULT_WINDOW.sinks, DEFAULT_WINDOW.recent)
    assert kept() == [
        ("full", None, None),
        ("pca 50% + 4 sinks + 32 recent", *own),
        ("pca 50%", 0, 0),
        ("int8", *own),
        ("int4", *own),
    ]
    assert [row[1:] for row in kept("--sinks", 2, "--recent", 7)[1:]] == [(2, 7)] * 4
    assert [row[1:] for row in kept("--recent", 7)[1:]] == [(4, 7), (0, 7), (4, 7), (4, 7)]


@pytest.mark.parametrize(
    "words, says",
    [
        (["--sinks", -1], ["sinks -1", "at least 0"]),
        (["--recent", -1], ["recent -1", "at least 0"]),
        (["--bits", 8, "--bits", "int8"], ["'int8'", "given twice"]),
        (["--data", "none.txt"], ["none.txt", "no such file"]),
    ],
    ids=str,
)
def test_bad_arguments(model, here, words, says):
    status, out, err = lowkey("eval", model, *words)
    assert (status, out) == (2, "") and all(word in err for word in says) and len(err.splitlines()) == 1
    assert not list(here.iterdir())


def test_the_table_has_intervals_over_windows(model, here):
    three = lowkey("eval", model, *SCORE, "--windows", 3, "--out", "r.json")[1]
    assert three.count("±") >= 4
    assert "±" not in lowkey("eval", model, *SCORE, "--out", "r.json")[1]


def test_a_policy_with_a_second_pass_has_only_decode_perplexity(model, here):
    words = (
        "eval",
        model,
        "--windows",
        1,
        "--context",
        64,
        "--policy",
        "kvzip",
        "--budget",
        "50%",
        "--out",
        "r.json",
    )
    status, _, err = lowkey(*words)
    assert status == 0 and "kvzip 50% has no perplexity" in err and "--task decode" in err
    _, out, err = lowkey(*words, "--task", "perplexity,decode", "--json")
    row = json.loads(out)["rows"][1]
    assert "no perplexity" not in err and row["perplexity"] is None and row["perplexity_decode"] > 1


# -- progress


def test_bits_pack_only_plans_that_have_none(model, here):
    """A plan's own integers are part of it: no second row of its latents in others, and none that is given
    twice.
    """
    for name, more in (("whole", ()), ("packed", ("--bits", "kivi4"))):
        status, _, err = lowkey(
            "compress",
            model,
            name,
            "--method",
            "pca",
            "--budget",
            "90%",
            "--windows",
            4,
            "--context",
            64,
            "--sinks",
            0,
            "--recent",
            0,
            *more,
        )
        assert status == 0, err
    found = printed(
        "eval",
        model,
        "--plan",
        "whole",
        "--plan",
        "packed",
        "--windows",
        1,
        "--context",
        64,
        "--bits",
        "kivi4",
    )
    assert [row["short"] for row in found["rows"]] == [
        "full",
        "pca 90%",
        "pca 90% kivi4",
        "pca 90% kivi4",
        "kivi4",
    ]
