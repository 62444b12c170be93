"""A run that is killed goes on where it was."""

from __future__ import annotations

import os
import signal

import pytest

from lowkey.core.files import measured
from lowkey.evaluate.settings import full
from lowkey.harness.run import measure_tasks
from lowkey.harness.task_settings import TaskMeasuring
from lowkey.harness.tasks import load_tasks
from lowkey.models import loading

# what forks may say in a process with threads
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def test_a_killed_run_asks_only_what_is_missing(task_files, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "SECONDS_BETWEEN_WRITES", 0.0)
    model, tokenizer = loading.load("tiny")
    tasks, how = load_tasks([task_files["recall"]]), TaskMeasuring()
    asked = []

    def counting(items, label, total=None):
        for item in items:
            asked.append(item)
            yield item

    def dying(items, label, total=None):
        for i, item in enumerate(items):
            if i == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

    def run(progress, work):
        return measure_tasks(model, tokenizer, [full(model)], tasks, how, progress, work)["rows"]

    whole = run(counting, None)
    assert len(asked) == 6
    child = os.fork()
    if not child:
        run(dying, tmp_path / "work")
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    asked.clear()
    assert run(counting, tmp_path / "work") == whole
    assert len(asked) == 3
