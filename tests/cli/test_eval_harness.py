"""`lowkey eval --harness`, and lm-eval's own command line with the model `lowkey`."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from commands import done, printed, refused
from harness_tasks import write_tasks

from lowkey.harness import __main__ as launcher


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"), 4)


def test_a_result_has_a_row_for_each_setting(tasks, tmp_path):
    out = tmp_path / "found.json"
    words = ("--harness", f"{tasks['letters']},{tasks['recall']}", "--policy", "snapkv", "--budget", "50%")
    told = printed("eval", "tiny", *words, "--batch-size", 2, "--out", out)
    assert told.items() <= json.loads(out.read_text()).items()
    assert [row["name"] for row in told["rows"]] == ["full", "snapkv 50%"]
    assert set(told["rows"][1]["harness"]) == {"local_letters", "local_recall"}
    assert told["environment"]["data"]["tasks"] == ["local_letters", "local_recall"]
    page = tmp_path / "page.html"
    done("report", out, "-o", page)
    assert page.read_text().count("local_recall") >= 2


def test_scores_are_shown_as_a_table(tasks, tmp_path):
    ran = done("eval", "tiny", "--harness", tasks["endings"], "--limit", 1, "--out", tmp_path / "a.json")
    assert "local_endings" in ran.out
    assert "acc_norm" in ran.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--harness", "suite:rulr"), "ruler"),
        (("--harness", "no/such.yaml"), "is no file"),
        (("--harness", "x", "--task", "recall"), "--harness measures other tasks"),
        (("--protocol", "ask-with"), "is for tasks of lm-eval"),
        (("--limit", 3), "is for tasks of lm-eval"),
        (("--harness", "x", "--protocol", "ask-witj"), "ask-with"),
        (("--harness", "x", "--batch-size", 0), "batch_size"),
        (("--harness", "x", "--data-dir", "/no/such"), "is no folder"),
    ],
)
def test_bad_words_are_one_line(words, said):
    assert said in refused("eval", "tiny", *words)


def test_an_unknown_task_names_the_nearest():
    assert "hellaswag" in refused("eval", "tiny", "--harness", "helaswag")


def test_a_missing_extra_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("lowkey.harness.task_settings.find_spec", lambda name: None)
    assert "pip install 'lowkey[eval]'" in refused("eval", "tiny", "--harness", "hellaswag")


def test_data_that_cannot_be_read_is_one_line(tasks, tmp_path):
    place = tmp_path / "lost.yaml"
    place.write_text(Path(tasks["letters"]).read_text().replace("letters.jsonl", "gone.jsonl"))
    said = refused("eval", "tiny", "--harness", place, "--out", tmp_path / "a.json")
    assert "cannot be read" in said
    assert "correct the file, or the data that it names" in said


@pytest.mark.parametrize(
    ("words", "other", "told"),
    [
        ("exact_match", "nometric", "metric 'nometric' is unknown to lm-eval"),
        ("generate_until", "recite", "correct the file"),
        ("task: ", "text: ", "correct the file"),
    ],
)
def test_a_faulty_file_is_one_line_before_anything_runs(words, other, told, tasks, tmp_path):
    place = tmp_path / "faulty.yaml"
    place.write_text(Path(tasks["sums"]).read_text().replace(words, other))
    assert told in refused("eval", "tiny", "--harness", place, "--out", tmp_path / "a.json")


def test_a_file_without_documents_is_one_line(tasks, tmp_path):
    source = Path(tasks["sums"])
    place = tmp_path / "empty.yaml"
    place.write_text(
        source.read_text().replace(str(source.with_suffix(".jsonl")), str(tmp_path / "no.jsonl"))
    )
    (tmp_path / "no.jsonl").write_text("")
    assert "holds no documents" in refused("eval", "tiny", "--harness", place, "--out", tmp_path / "a.json")


def test_a_hub_task_offline_is_one_line(tmp_path):
    assert "cannot be read" in refused("eval", "tiny", "--harness", "piqa", "--out", tmp_path / "a.json")


def test_a_task_without_a_splitter_is_one_line(tasks, tmp_path):
    place = tmp_path / "odd.yaml"
    words = (
        Path(tasks["sums"])
        .read_text()
        .replace("{{question}}", "{{answer}} is what")
        .replace("num_fewshot: 2", "num_fewshot: 0")
    )
    rows = [{"puzzle": "Write a word.", "answer": "oak"}] * 2
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = words.replace(str(Path(tasks["sums"]).with_suffix(".jsonl")), str(tmp_path / "odd.jsonl"))
    place.write_text(words.replace("local_sums", "local_odd"))
    said = refused("eval", "tiny", "--harness", place, "--out", tmp_path / "a.json")
    assert "task 'local_odd': where its context ends" in said
    done("eval", "tiny", "--harness", place, "--protocol", "ask-with", "--out", tmp_path / "a.json")


def lm_eval(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["lm_eval", *map(str, words)])
    launcher.run_lm_eval()


def test_lm_eval_knows_the_model(tasks, tmp_path, monkeypatch):
    own = "pretrained=tiny,policy=snapkv,budget=50%,option.window=12,protocol=ask-with"
    words = ("--model", "lowkey", "--model_args", own, "--tasks", tasks["recall"], "--batch_size", 2)
    lm_eval(monkeypatch, *words, "--output_path", tmp_path / "out")
    (found,) = (tmp_path / "out").rglob("results_*.json")
    told = json.loads(found.read_text())["config"]["lowkey"]
    assert told["protocol"] == "ask-with"
    assert told["setting"]["policy"]["parameters"]["window"] == 12
    assert told["tasks"]["local_recall"]["requests"] == 4


def test_lm_eval_refuses_in_one_line(tasks, monkeypatch, capsys):
    words = ("--model", "lowkey", "--tasks", tasks["recall"], "--model_args")
    with pytest.raises(SystemExit) as exit:
        lm_eval(monkeypatch, *words, "pretrained=tiny,protcol=ask-with")
    assert exit.value.code == 2
    assert "did you mean 'protocol'" in capsys.readouterr().err
