"""Settings that must be made before torch and vLLM are loaded."""

from __future__ import annotations

import os

import pytest

os.environ |= {
    "OMP_NUM_THREADS": "1",  # a process with threads must not be forked
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that run kernels in this process come last: vLLM cannot start in a fork beside llvmlite."""
    items.sort(key=lambda item: item.path.name == "test_pages.py")
