"""Plans and settings that the tests of evaluation share."""

from __future__ import annotations

import pico
import pytest
from evaluations import by_name, calibrated, integers, run

from lowkey.evaluate.settings import full, planned


@pytest.fixture(scope="session")
def half():
    return calibrated("50%")


@pytest.fixture(scope="session")
def settings(half):
    model = pico.attached("llama")
    whole = calibrated("100%")
    assert set(whole.ranks.values()) == {(pico.HEAD_DIM, pico.HEAD_DIM)}
    return [
        full(model),
        planned(model, whole, "whole"),
        planned(model, half, "half"),
        integers(model, 8),
        integers(model, 4),
    ]


@pytest.fixture(scope="session")
def rows(settings):
    """Rows by name, with likelihoods, layer errors and bytes."""
    return by_name(run(settings, ("perplexity", "decode", "layers")))
