"""What a checkpoint of `lowkey.attention` can be used for in lowkey, and what it cannot."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pico
import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

import lowkey
from lowkey.attention import LowkeyConfig, LowkeyForCausalLM, register
from lowkey.calibration.calibrate import Sample
from lowkey.cli.app import app
from lowkey.core.types import LowkeyError
from lowkey.methods import METHODS

SHAPE = {
    "vocab_size": pico.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
IDS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.15,
    "max_position_embeddings": 512,
}
OWN = {
    "lrkv": {"attention": "lrkv", "lrkv_rank": 2},
    "mla": {"attention": "mla", "kv_lora_rank": 8, "qk_rope_head_dim": 4},
    "mea": {"attention": "mea", "mea_num_component_heads": 4},
}
PLAIN = {
    "gqa": {"attention": "gqa", "num_key_value_heads": 4},
    "mha-qk-norm": {"attention": "mha", "qk_norm": True},
}


@cache
def model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return lowkey.attach(LowkeyForCausalLM(LowkeyConfig(**SHAPE, **IDS, **(OWN | PLAIN)[name])).eval())


def saved(folder: Path, name: str) -> Path:
    register()
    for part in (model(name), pico.tokenizer()):
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", OWN)
def test_full_cache_counts_what_it_holds_and_reloads(name: str, tmp_path: Path) -> None:
    ids = torch.arange(2, 42).view(2, 20)
    store = lowkey.make_cache(model(name))
    model(name)(ids, past_key_values=store)
    per_token = lowkey.attention.costs(model(name).config).bytes_per_token(4)
    assert store.nbytes() == store.predicted_nbytes() == 2 * 20 * len(store.layers) * per_token
    store.save(tmp_path / "cache")
    again = lowkey.load_cache(tmp_path / "cache", model(name))
    step = torch.tensor([[5], [6]])
    assert torch.equal(
        model(name)(step, past_key_values=again).logits, model(name)(step, past_key_values=store).logits
    )


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("wanted", [{"bits": 8}, {"exact": lowkey.Exact(recent=4)}])
def test_own_form_takes_the_full_cache_only(name: str, wanted: dict) -> None:
    with pytest.raises(LowkeyError, match="already stores a small form of its own"):
        lowkey.make_cache(model(name), **wanted)


def test_own_form_is_not_calibrated() -> None:
    with pytest.raises(LowkeyError, match="already stores a small form of its own"):
        lowkey.calibrate(model("lrkv"), pico.tokenizer(), "some text " * 100)


@pytest.mark.parametrize("name", PLAIN)
def test_full_rank_plan_gives_stock_logits(name: str) -> None:
    words = "the quick brown fox jumps over the lazy dog. " * 60
    plan = lowkey.calibrate(
        model(name), pico.tokenizer(), words, method=METHODS["pca"](), budget="100%", sample=Sample(8, 64)
    )
    ids = torch.arange(2, 42).view(2, 20)
    found = model(name)(ids, past_key_values=lowkey.make_cache(model(name), plan)).logits
    torch.testing.assert_close(found, model(name)(ids).logits, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", [*OWN, *PLAIN])
def test_commands_take_the_checkpoint(name: str, tmp_path: Path) -> None:
    place = str(saved(tmp_path / "model", name))
    asked = [
        "--windows",
        "1",
        "--context",
        "64",
        "--task",
        "perplexity",
        "--task",
        "layers",
        "--out",
        str(tmp_path / "r.json"),
    ]
    run = CliRunner().invoke(app, ["eval", place, *asked])
    assert run.exit_code == 0, run.output
    assert ("int8" in run.output) == (name in PLAIN)
    run = CliRunner().invoke(app, ["generate", place, "--prompt", "Once", "--tokens", "3"])
    assert run.exit_code == 0, run.output
