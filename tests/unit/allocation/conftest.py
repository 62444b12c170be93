"""Folders of unfinished work that calibrations share."""

from __future__ import annotations

import pytest
from calibrated_ranks import calibrate


@pytest.fixture(autouse=True, scope="session")
def folders(tmp_path_factory):
    """A folder for each basis, so that it is fitted and measured once, whatever then chooses ranks of it."""
    made = {}

    def folder(*key):
        if key not in made:
            made[key] = tmp_path_factory.mktemp("work")
        return made[key]

    calibrate.folder = folder
    yield
    del calibrate.folder
