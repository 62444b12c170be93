"""At 100 % the adapter finds what stock lm-eval finds, task by task and document by document."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from harness_tasks import FIVE, stock, write_tasks

from lowkey.evaluate.settings import full
from lowkey.harness.run import measure_tasks
from lowkey.harness.task_settings import TaskMeasuring
from lowkey.harness.tasks import load_tasks
from lowkey.models import loading


@cache
def loaded(name, dtype):
    model, tokenizer = loading.load(name)
    return model.to(dtype), tokenizer


def compare(name, files, batch, dtype, protocol, relative, **more):
    """Compare all metrics of all tasks, and every metric of every document, with those of stock lm-eval.

    Shares of documents must be the same numbers; sums of logarithms within `relative`, since a context that
    is read before its continuation adds up in another order.
    """
    model, tokenizer = loaded(name, dtype)
    oracle = stock(name, files, batch, dtype, **more)
    how = TaskMeasuring(protocol=protocol, batch_size=batch, **more)
    row = measure_tasks(model, tokenizer, [full(model)], load_tasks(files), how)["rows"][0]["harness"]
    assert row.keys() == oracle["results"].keys()
    for task, found in row.items():
        wanted = oracle["results"][task]
        assert found["metrics"], task
        for metric, score in found["metrics"].items():
            key = metric if "," in metric else f"{metric},none"
            measure, kind = key.split(",")
            if "perplexity" in metric or "bits" in metric:
                assert math.isclose(score["value"], wanted[key], rel_tol=relative), (task, metric)
            else:
                assert score["value"] == wanted[key], (task, metric)
                samples = [s for s in oracle["samples"][task] if s["filter"] == kind]
                assert score["values"] == [s[measure] for s in samples], (task, metric)


@pytest.mark.parametrize("batch", [1, 8])
def test_five_tasks_equal_stock(task_files, batch):
    files = [task_files[name] for name in FIVE]
    compare("tiny", files, batch, torch.float32, "ask-after", 1e-5)


def test_ask_with_equals_stock_in_double(task_files):
    files = [task_files[name] for name in (*FIVE, "recall")]
    compare("tiny", files, 8, torch.float64, "ask-with", 1e-12)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8])
def test_five_tasks_equal_stock_on_real_model(tmp_path_factory, batch):
    files = write_tasks(tmp_path_factory.mktemp("real"), 8)
    compare("smollm2", [files[name] for name in FIVE], batch, torch.float32, "ask-after", 1e-4)


def test_over_length_prompts_equal_stock(tmp_path):
    files = write_tasks(Path(tmp_path), 3)
    model, tokenizer = loaded("tiny", torch.float32)
    how = TaskMeasuring(max_length=40, batch_size=2)
    chosen = [files["letters"], files["texts"]]
    row = measure_tasks(model, tokenizer, [full(model)], load_tasks(chosen), how)["rows"][0]["harness"]
    oracle = stock("tiny", chosen, 2, torch.float32, max_length=40)
    assert row["local_letters"]["over_length"] == 1.0
    assert row["local_letters"]["metrics"]["acc"]["value"] == oracle["results"]["local_letters"]["acc,none"]
    ours = row["local_texts"]["metrics"]["word_perplexity"]["value"]
    assert math.isclose(ours, oracle["results"]["local_texts"]["word_perplexity,none"], rel_tol=1e-5)
