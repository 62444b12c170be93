"""Models whose answers count as right whatever they are, for tests of head scores."""

from __future__ import annotations

import pytest
from head_recording import let_chains_count

from lowkey.heads import retrieval


@pytest.fixture
def accepting(monkeypatch):
    """Random models know nothing, so here every answer counts as right."""
    monkeypatch.setattr(retrieval._Job, "_is_right", lambda self, written, case: True)
    monkeypatch.setattr(retrieval._Job, "_is_over", lambda self, written, case: False)


@pytest.fixture
def willing(monkeypatch):
    """`tiny` follows no chains, so here it solves all of them; see `let_chains_count`."""
    let_chains_count(monkeypatch)
