"""Schemes and forms of packed storage, over which its tests run."""

from __future__ import annotations

import pytest
from packing_by_hand import FORMS

from lowkey.storage.packing import SCHEMES


@pytest.fixture(params=SCHEMES)
def name(request):
    return request.param


@pytest.fixture(params=FORMS)
def form(request):
    return request.param
