"""Statistics of every model and layout, gathered once for the tests of merged heads."""

from __future__ import annotations

import pytest
from merged_heads import data
from pico import attached


@pytest.fixture(scope="session")
def prepared():
    made = {}

    def prepare(name="llama", layout="post_rope"):
        if (name, layout) not in made:
            made[name, layout] = data(attached(name), layout)
        return made[name, layout]

    return prepare
