"""Random models whose every answer counts as right, for tests of head scores."""

from __future__ import annotations

import pytest

from lowkey.heads import retrieval


@pytest.fixture
def accepting(monkeypatch):
    """Random models know nothing, so here every answer counts as right."""
    monkeypatch.setattr(retrieval._Job, "_is_right", lambda self, written, case: True)
    monkeypatch.setattr(retrieval._Job, "_is_over", lambda self, written, case: False)
