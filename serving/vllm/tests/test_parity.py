"""Every route answers as lowkey's own cache does, and takes the pages that the formula gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import MEMORY, check_same, of_our_cache, prompts, saved_model, saved_plan, served

BLOCK = 128
LENGTHS = (7, 21, 600)
FULL = 2 * 4 * 32 * 4 * 3  # bytes of a token of the models here: 3 layers of 4 KV heads of 32, in fp32
# Name: the model's family, its keys and values as (heads that share a latent, width), other settings of the
# plan, and the bytes of a token in each of its three layers by hand.
PLANS: dict[str, tuple[str, list, list, dict[str, Any], list[int]]] = {
    "projected": ("llama", [(4, 64)], [(4, 64)], {}, [2 * 64 * 4] * 3),
    "projected, means and order": (
        "llama",
        [(2, 32)],
        [(2, 32)],
        {"means": True, "order": True},
        [2 * 2 * 32 * 4] * 3,
    ),
    "projected, side by side": ("qwen3", [(1, 16)], [(2, 32)], {"order": True}, [2 * 2 * 32 * 4] * 3),
    "projected, ranks per layer": (
        "llama",
        [(4, 64), (4, 96), (4, 48)],
        [(4, 64), (4, 96), (4, 48)],
        {},
        [2 * 64 * 4, 2 * 96 * 4, 2 * 48 * 4],
    ),
    "latent beside projected": (
        "llama",
        [(4, 64), (4, 50), (1, 9)],
        [(4, 64), (2, 40), (1, 11)],
        {"means": True},
        [2 * 64 * 4, (50 + 80) * 4, 4 * 20 * 4],
    ),
    "before rotation": (
        "llama",
        [(1, 20), (2, 30), (4, 50)],
        [(1, 12)],
        {"layout": "pre_rope"},
        [512, 432, 392],
    ),
    "another family": ("phi3", [(2, 30)], [(1, 12)], {"layout": "pre_rope"}, [432] * 3),
    "yet another": ("granite", [(4, 64)], [(4, 64)], {}, [512] * 3),
    "before rotation, means and order": (
        "qwen3",
        [(2, 24)],
        [(4, 40)],
        {"layout": "pre_rope", "means": True, "order": True},
        [(48 + 40) * 4] * 3,
    ),
}


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("parity")


def model_of(place: Path, kind: str) -> Path:
    folder = place / kind
    # of this family, the engine takes the width of heads from that of the model
    shape = {"hidden_size": 8 * 32} if kind == "qwen2" else {}
    return folder if folder.exists() else saved_model(folder, kind, **shape)


def plan_of(place: Path, name: str) -> tuple[Path, Path]:
    kind, keys, values, fields, _ = PLANS[name]
    model, folder = model_of(place, kind), place / name.replace(" ", "-")
    return model, folder if folder.exists() else saved_plan(folder, model, keys, values, **fields)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_without_a_plan_the_engine_is_its_own(place, kind):
    model = model_of(place, kind)
    answers = served(model, prompts(*LENGTHS))
    check_same(answers, of_our_cache(model, prompts(*LENGTHS)))
    assert answers.blocks == MEMORY // (BLOCK * FULL)


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_served(place, name):
    model, plan = plan_of(place, name)
    answers = served(model, prompts(*LENGTHS), {"plan": str(plan)})
    check_same(answers, of_our_cache(model, prompts(*LENGTHS), plan))
    assert answers.blocks == MEMORY // (BLOCK * sum(PLANS[name][4]))
