"""Kinds of storage and of exact tokens, over which the contract of caches is tested."""

from __future__ import annotations

import pytest
from storage_kinds import EXACTS, KINDS


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(params=EXACTS)
def exact(request):
    return EXACTS[request.param]
