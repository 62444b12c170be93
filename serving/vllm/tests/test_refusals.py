"""What is refused at start, in one line, by the engine that was given it."""

from __future__ import annotations

import pytest
from engines import engine, forked, imported, saved_model, saved_plan

LATENT = {"keys": [(2, 30)], "values": [(1, 12)]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals")
    model = saved_model(folder / "model", "llama")
    saved_model(folder / "other", "llama", rms_norm_eps=1e-5)
    saved_plan(folder / "latent", model, **LATENT)
    saved_plan(folder / "windowed", model, **LATENT, sinks=4)
    saved_plan(folder / "of gemma", saved_model(folder / "gemma", "gemma2"), **LATENT)
    return folder


CASES = {
    "another model": ("other", {"plan": "latent"}, {}, "plan was made for model"),
    "fp8 beside exact tokens": (
        "model",
        {"plan": "windowed"},
        {"kv_cache_dtype": "fp8", "dtype": "bfloat16"},
        "windowed route",
    ),
    "fp8": ("model", {"plan": "latent"}, {"kv_cache_dtype": "fp8", "dtype": "bfloat16"}, "latent route"),
    "drafts": (
        "model",
        {"plan": "latent"},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        "speculative decoding",
    ),
    "a family": ("gemma", {"plan": "of gemma"}, {}, "'gemma2': has layers with a sliding window"),
    "a slip": ("model", {"plan": "latent", "kernal": "own"}, {}, "did you mean 'kernel'?"),
    "no plan": ("model", {"plan": "nosuch"}, {}, "nosuch"),
}


@pytest.mark.parametrize("what", CASES)
def test_what_is_refused(place, what):
    model, asked, settings, told = CASES[what]
    given = {name: str(place / value) if name == "plan" else value for name, value in asked.items()}
    imported()
    with pytest.raises(RuntimeError) as error:
        forked(lambda: bool(engine(place / model, given, **settings)))
    first = str(error.value).splitlines()[0]
    assert first.startswith("LowkeyError: ") and told in first
