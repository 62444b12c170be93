"""Tasks of lm-eval in a report."""

from __future__ import annotations

import copy

import pytest
from report_pages import ENVIRONMENT, FULL, HALF

from lowkey.report.harness import harness_table, task_scores
from lowkey.report.task_shapes import harness_fits

TASK = {
    "metrics": {
        "acc": {
            "value": 0.75,
            "half_95": 0.2,
            "values": [1.0, 1.0, 0.0, 1.0],
            "higher_is_better": True,
            "difference": [0.0, 0.0, 0.0],
        }
    },
    "protocol": "ask-after",
    "context_tokens": 120.0,
    "question_tokens": 8.0,
    "output_tokens": 1.0,
    "kept_bytes": 4096.0,
    "kept_bytes_per_token": 34.1,
    "over_length": 0.25,
    "requests": 4,
    "documents": 4,
    "version": "1",
    "shots": 0,
}


def rows():
    other = copy.deepcopy(TASK)
    other["metrics"]["acc"] |= {
        "value": 0.5,
        "values": [0.0, 1.0, 1.0, 0.0],
        "difference": [-0.25, -0.75, 0.5],
    }
    return [FULL | {"harness": {"mmlu": copy.deepcopy(TASK)}}, HALF | {"harness": {"mmlu": other}}]


def test_documents_are_counted_against_the_full_cache():
    whole, half = task_scores(rows())
    assert (whole.row, whole.difference, whole.better) == ("full", None, None)
    assert half.difference == (-0.25, -0.75, 0.5)
    assert half.better == (1, 2)


def test_fewer_is_better_where_the_task_says_so():
    made = rows()
    for row in made:
        row["harness"]["mmlu"]["metrics"]["acc"]["higher_is_better"] = False
    assert task_scores(made)[1].better == (2, 1)


def test_a_table_says_value_difference_bytes_and_protocol():
    page = harness_table(rows())
    for words in ("mmlu", "0.75 ± 0.2", "-0.25 [-0.75, +0.5]", "1 / 2", "4 KiB", "25.0%", "ask-after"):
        assert words in page
    assert harness_table([FULL, HALF]) == ""


@pytest.mark.parametrize(
    "tasks",
    [
        3,
        {"a": 1},
        {"a": {"metrics": {"acc": 1}}},
        {"a": {"metrics": {"acc": {"value": "x"}}}},
        {"a": {"metrics": {"acc": {"value": 1, "difference": [1, 2]}}}},
        {"a": {"metrics": {"acc": {"value": 1, "values": [None]}}}},
        {"a": {"metrics": {}, "over_length": "all"}},
    ],
)
def test_other_shapes_are_refused(tasks):
    assert not harness_fits(tasks)
    assert harness_fits({"mmlu": TASK})
    assert harness_fits(None)


def test_names_are_escaped():
    made = [FULL | {"harness": {"<b>": TASK}}]
    assert "<b>" not in harness_table(made)
    assert ENVIRONMENT["cpu"] not in harness_table(made)
