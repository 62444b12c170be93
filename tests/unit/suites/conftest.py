"""Fixtures of the tests of suites."""

from __future__ import annotations

import pico
import pytest
from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return pico.tokenizer()
