"""A saved plan."""

from __future__ import annotations

import pytest
from plan_folders import make


@pytest.fixture
def folder(tmp_path):
    """A saved plan."""
    make().save(tmp_path / "plan")
    return tmp_path / "plan"
