"""Shapes in signatures are enforced while the tests run; transformers is kept quiet."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may touch the network

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("lowkey.ops", "beartype.beartype")

import transformers  # noqa: E402

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # pico tensors: more threads only wait for each other


@pytest.fixture(params=["post_rope", "pre_rope"])
def layout(request: pytest.FixtureRequest) -> str:
    return request.param
