"""Fixtures of the tests of suites: a tokenizer of subwords, and a folder with a file of every format."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import lowkey
from lowkey.suites.examples import write_examples

TINY = Path(lowkey.__file__).parent / "data" / "tiny" / "tokenizer.json"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_file=str(TINY))


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suites")
    write_examples(folder)
    return folder
