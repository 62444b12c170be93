"""Tasks and a model that the tests of the harness share."""

from __future__ import annotations

import pytest
from harness_tasks import write_tasks


@pytest.fixture(scope="session")
def task_files(tmp_path_factory):
    """The yaml file of each task, by its short name."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))
