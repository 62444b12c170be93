"""Suites are found by name, and their samples come from the user's folder."""

from __future__ import annotations

import json

import pytest

from lowkey.core.errors import LowkeyError
from lowkey.suites import SUITES, Source, load_samples


def test_gsm8k_gives_the_number_behind_the_mark(tmp_path, tokenizer):
    record = {"question": "What is 40 plus 2?", "answer": "40 + 2 = <<40+2=42>>42\n#### 42"}
    (tmp_path / "test.jsonl").write_text(json.dumps(record) + "\n")
    (sample,) = load_samples("gsm8k", Source(tokenizer, folder=tmp_path))
    assert (sample.answers, sample.metric, sample.context) == (("42",), "number", "")
    assert sample.question.startswith("What is 40 plus 2?")


@pytest.mark.parametrize(
    ("name", "tasks", "message"),
    [
        ("gsmk8", (), "suite 'gsmk8' is unknown; did you mean 'gsm8k'"),
        ("gsm8k", ("gsm",), "task 'gsm' is not one of gsm8k; did you mean 'gsm8k'"),
    ],
)
def test_the_nearest_name_is_told(tokenizer, name, tasks, message):
    with pytest.raises(LowkeyError, match=message):
        load_samples(name, Source(tokenizer), tasks)


def test_suites_have_tasks_and_one_line_each():
    for suite in SUITES.values():
        assert suite.tasks and "\n" not in suite.summary + suite.files
