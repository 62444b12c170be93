"""Training of what `lowkey convert` writes, and of the attention kinds with thin factors."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pico
import pytest
import torch
from trainings import MODEL, command, corpus, recipe
from transformers import AutoModel, AutoModelForCausalLM

from lowkey.core.types import LowkeyError
from lowkey.models.loading import load
from lowkey.pretraining import Recipe, models, pretrain
from lowkey.pretraining.corpus import prepare


def test_a_converted_model_is_trained_further(tmp_path):
    """`lowkey convert`, then `lowkey pretrain`, by its own tokenizer: the first validation loss is the
    conversion's.
    """
    texts = corpus(tmp_path)
    status, _, err = command(
        "convert",
        pico.save(tmp_path / "m"),
        tmp_path / "c",
        "--attention",
        "lrkv",
        "-O",
        "lrkv_rank=4",
        "--windows",
        2,
    )
    assert status == 0, err
    (tmp_path / "r.toml").write_text(
        f'[model]\npath = "{tmp_path / "c"}"\n'
        f'[data]\npath = "{texts}"\nheld_out = 0.1\n[training]\nwarmup = 1'
    )
    small = [
        x
        for s in ("tokens=640", "batch_tokens=128", "length=32", "lr=1e-3")
        for x in ("--set", f"training.{s}")
    ]
    status, printed, err = command(
        "pretrain", tmp_path / "r.toml", "--out", tmp_path / "o", *small, "--device", "cpu", "--json"
    )
    assert status == 0, err
    start, converted = json.loads(printed)["initial_loss"], load(str(tmp_path / "c"))[0]
    held = prepare(Recipe.read(tmp_path / "o" / "recipe.toml").data, tmp_path / "o" / "tokens").held_out
    batch = held.batch(np.arange(held.rows(32) + 1), 32)
    with torch.no_grad():
        logits = converted(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    assert start == pytest.approx(float(loss), abs=1e-4)
    trained = load(str(tmp_path / "o"))[0]
    assert trained.config.attention == "lrkv" and not torch.equal(
        trained.lm_head.weight, converted.lm_head.weight
    )


HALF = {"attention_layers": "half", "attention": "mea", "mea_num_component_heads": 2}


@pytest.mark.parametrize(
    "attention",
    [{"attention": "lrkv", "lrkv_rank": 2}, {"attention": "mea", "mea_num_component_heads": 2}, HALF],
)
def test_thin_factors_are_trained_with_either_optimizer(tmp_path, attention):
    for optimizer in ("adamw", "muon"):
        wanted = replace(
            recipe(tmp_path, tokens=20 * 128, optimizer=optimizer),
            model={**MODEL, "num_key_value_heads": 4, **attention},
        )
        found = pretrain(wanted, tmp_path / optimizer, device="cpu")
        fresh = models.build(wanted.model, found.tokenizer, wanted.training.length)
        before = dict(fresh.named_parameters())
        assert found.losses[-1] < found.losses[0]
        assert all(
            not torch.equal(p, before[name])
            for name, p in found.model.named_parameters()
            if "up" in name or "mix" in name
        )


def test_what_was_trained_loads_by_both_auto_classes(tmp_path):
    """With its code beside it, also when the model was given as an object."""
    wanted = replace(recipe(tmp_path, tokens=2 * 128), model={**MODEL, "attention": "mla", "kv_lora_rank": 8})
    first = pretrain(wanted, tmp_path / "one", device="cpu")
    pretrain(wanted, tmp_path / "two", model=first.model, device="cpu")
    for folder in ("one", "two"):
        known = json.loads((tmp_path / folder / "config.json").read_text())["auto_map"]
        assert (
            known["AutoModel"] == "modeling_lowkey.LowkeyModel"
            and (tmp_path / folder / "modeling_lowkey.py").exists()
        )
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / folder, trust_remote_code=True)
        inner, ids = (
            AutoModel.from_pretrained(tmp_path / folder, trust_remote_code=True),
            torch.arange(3, 9)[None],
        )
        with torch.no_grad():
            assert torch.equal(
                inner(ids).last_hidden_state, whole(ids, output_hidden_states=True).hidden_states[-1]
            )


def test_a_model_of_a_folder_takes_no_other_fields(tmp_path):
    with pytest.raises(LowkeyError, match=r"model.hidden_size: a model from model.path has it already"):
        pretrain(Recipe.of({"model": {"path": "x", "hidden_size": 3}}), tmp_path / "o", device="cpu")
