"""`lowkey cost`: what it prints and refuses, from a config alone."""

from __future__ import annotations

import json
import shutil

import latent_models
import pico
import pytest
from commands import done, printed, refused

from lowkey.core.gpus import GPUS

ROW = {
    *("setting", "sequence_bytes", "cache_bytes", "share_of_first", "maps_bytes", "read_bytes"),
    *("step_ms", "tokens_per_second", "sequences_that_fit"),
}


@pytest.fixture
def bare(model, here):
    """A folder with nothing but the config of a pico model."""
    (here / "bare").mkdir()
    shutil.copy(model / "config.json", here / "bare" / "config.json")
    return here / "bare"


def changed(folder, **fields):
    """Change fields of the config."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_config_is_enough(bare):
    told = printed("cost", bare, "--context", 256, "--batch", 4, "--gpu", "h200", "--settings", "full,int4")
    assert (told["format"], told["context"], told["batch"], told["dtype"]) == (1, 256, 4, "float32")
    assert told["gpu"] == {"name": "h200", "count": 1, "memory_bytes": 141 * 2**30, "gbs": 4800}
    assert told["parameters"] == sum(p.numel() for p in pico.build("llama").parameters())
    full, packed = told["rows"]
    assert set(full) == ROW and [full["setting"], packed["setting"]] == ["full", "int4"]
    assert (
        full["cache_bytes"] == 4 * full["sequence_bytes"] == 4 * 256 * pico.LAYERS * 2 * 4 * pico.HEAD_DIM * 4
    )
    assert full["step_ms"] == pytest.approx(full["read_bytes"] / 4.8e12 * 1e3)
    assert packed["share_of_first"] < 0.5


def test_all_that_has_a_usual_value_may_be_left_out(bare):
    told = printed("cost", bare)
    assert told["gpu"] is None and told["context"] == 512 and len(told["rows"]) > 4
    assert all(row["step_ms"] is row["sequences_that_fit"] is None for row in told["rows"])
    assert printed("cost", "tiny")["rows"][0]["setting"] == "full"


def test_the_table(bare):
    ran = done("cost", bare, "--gpu", "l4", "--settings", "full,snapkv:10%+int8")
    assert "snapkv:10%+int8" in ran.out and "1 x l4: 24 GiB, 300 GB/s" in ran.out and "floor ms" in ran.out
    assert "floor ms" not in done("cost", bare).out


def test_dtype_and_bits_of_weights(bare):
    wide = printed("cost", bare, "--settings", "full")
    narrow = printed("cost", bare, "--settings", "full", "--dtype", "bfloat16", "--weight-bits", 4.5)
    assert 2 * narrow["rows"][0]["sequence_bytes"] == wide["rows"][0]["sequence_bytes"]
    assert narrow["weights_bytes"] == pytest.approx(wide["weights_bytes"] * 4.5 / 32, abs=1)


def test_quantised_weights_are_pointed_out(bare):
    changed(bare, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert "quantised" in done("cost", bare).err
    assert done("cost", bare, "--weight-bits", 8).err == ""


def test_a_plan_folder(model, made):
    folder, _ = made
    rows = printed("cost", model, "--settings", f"full,plan:{folder},plan:{folder}+int4")["rows"]
    sizes = [row["sequence_bytes"] for row in rows]
    assert sizes == sorted(sizes, reverse=True) and rows[1]["maps_bytes"] > 0


def test_a_model_that_stores_latents(here):
    latent_models.build("deepseek_v3").config.save_pretrained("latents")
    full, expanded = printed("cost", "latents", "--context", 100)["rows"]
    assert (full["setting"], expanded["setting"]) == ("full", "expanded")
    assert expanded["sequence_bytes"] == 5 * full["sequence_bytes"]
    assert "MLA" in refused("cost", "latents", "--settings", "int8")


def test_sequences_that_do_not_fit(bare):
    # room for 20 sequences of the full cache beside the weights
    weights = printed("cost", bare)["weights_bytes"]
    sequence = 512 * pico.LAYERS * 2 * 4 * pico.HEAD_DIM * 4
    room = ("--memory", weights + 20 * sequence + 1, "--bandwidth", 100)
    full, packed = printed("cost", bare, *room, "--batch", 21, "--settings", "full,int4")["rows"]
    assert full["sequences_that_fit"] == 20 < packed["sequences_that_fit"]
    ran = done("cost", bare, *room, "--batch", 21, "--settings", "full,int4")
    assert "batch 21 does not fit in every setting; so many do: full 20" in ran.err
    assert done("cost", bare, *room, "--batch", 20, "--settings", "full,int4").err == ""
    said = refused("cost", bare, *room, "--batch", 21, "--settings", "full")
    assert "batch 21 of 512 tokens" in said and "20 do with full" in said
    none = ("--memory", weights + sequence - 1, "--bandwidth", 100)
    assert "not even one does" in refused("cost", bare, *none, "--settings", "full")


def test_weights_that_do_not_fit(bare):
    card = ("--memory", "256KiB", "--bandwidth", 1, "--settings", "full")
    said = refused("cost", bare, *card)
    needed = int(said.split("--gpus ")[1].split()[0])
    assert "weights alone" in refused("cost", bare, *card, "--gpus", needed - 1)
    assert "weights alone" not in refused("cost", bare, *card, "--gpus", needed)


def test_several_gpus_share_everything(bare):
    one, four = (printed("cost", bare, "--gpu", "h100", "--gpus", n) for n in (1, 4))
    assert four["gpu"]["memory_bytes"] == 4 * one["gpu"]["memory_bytes"] == 4 * GPUS["h100"].nbytes
    assert one["rows"][0]["step_ms"] == pytest.approx(4 * four["rows"][0]["step_ms"])


def test_refusals_that_need_the_config(bare):
    assert "the model has 512 positions" in refused("cost", bare, "--context", 513)
    changed(bare, model_type="gpt2")
    assert "not supported" in refused("cost", bare, "--context", 100)
