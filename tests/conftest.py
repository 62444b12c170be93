"""Settings and fixtures of all tests.

Shapes in signatures are enforced while the tests run; transformers is kept quiet; tests on a real model are
skipped without it.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may touch the network
# before torch is imported, and for commands that tests start: see lowkey_start
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also there
os.environ.setdefault("TQDM_DISABLE", "1")  # before tqdm is imported: as the command does for lm-eval

import pytest
import torch
from jaxtyping import install_import_hook

# a failed assertion in a helper module then shows its values, as in a test
HELPERS = [path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "conftest"]
pytest.register_assert_rewrite(*HELPERS)

install_import_hook("lowkey.ops", "beartype.beartype")

import transformers  # noqa: E402

transformers.logging.set_verbosity_error()
if not torch.cuda.is_available():
    # before triton is imported: without a GPU, its interpreter runs the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # pico tensors: more threads only wait for each other


from lowkey.models import loading, packaged  # noqa: E402

REAL = "smollm2"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not packaged.is_present(REAL):
        skip = pytest.mark.skip(
            reason=f"{REAL} is not on this machine; get it with: lowkey download {REAL} (or make models)"
        )
        for item in items:
            if item.get_closest_marker("real"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def smollm2() -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The real model, for tests that are marked `real`."""
    return loading.load(REAL)


@pytest.fixture(params=["post_rope", "pre_rope"])
def layout(request: pytest.FixtureRequest) -> str:
    return request.param
