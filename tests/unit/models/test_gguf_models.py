"""Models in GGUF files: their weights, their tokenizer, and one line for files that are none."""

from __future__ import annotations

import shutil

import gguf_files
import pico
import pytest
import torch

from lowkey.cache.cache import make_cache
from lowkey.calibration.calibrate import Sample, calibrate
from lowkey.core.types import LowkeyError
from lowkey.methods import PCA
from lowkey.models import gguf, loading, names
from lowkey.models.fingerprint import model_fingerprint

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}  # as wide as the model, as GGUF's llama has them
IDS = pico.prompt(24, 1)


@pytest.fixture(scope="module")
def written():
    return pico.build("llama", **HEADS)


@pytest.fixture(scope="module")
def file(written, tmp_path_factory):
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "pico.gguf", written)


@pytest.fixture(scope="module")
def loaded(file):
    return loading.load(str(file))


def refused(act, *words):
    with pytest.raises(LowkeyError) as caught:
        act()
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(
        caught.value
    )


# -- what is read


def test_floats_are_the_model_that_was_written(written, loaded):
    model, _ = loaded
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, written(IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_0"])
def test_quantised_weights_are_unpacked(written, tmp_path, kind):
    model, _ = loading.load(str(gguf_files.write(tmp_path / "m.gguf", written, kind)), "float32")
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(model.state_dict()[name], gguf_files.rounded(written.state_dict()[name], kind))
    assert not torch.equal(model.state_dict()[name], written.state_dict()[name])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.bfloat16)],
)
def test_gguf_weights_keep_their_dtype(written, tmp_path, kind, dtype):
    model, _ = loading.load(str(gguf_files.write(tmp_path / "m.gguf", written, kind)))
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_it_is_a_plain_model(loaded, tmp_path):
    model, tokenizer = loaded
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = loading.load(str(tmp_path))
    assert model_fingerprint(again) == model_fingerprint(model)


def test_the_same_file_is_the_same_model(file, loaded):
    assert model_fingerprint(loading.load(str(file), "bfloat16")[0]) == model_fingerprint(loaded[0])


def test_a_plan_for_it_is_used_with_it(loaded, file):
    model, tokenizer = loaded
    plan = calibrate(model, tokenizer, "the quick brown fox " * 40, method=PCA(), sample=Sample(4, 16))
    again, _ = loading.load(str(file))
    assert make_cache(again, plan=plan).nbytes() == 0  # made, so that it is taken for the same model


def test_the_gguf_tokenizer_is_read(file, loaded):
    _, tokenizer = loaded
    assert tokenizer.decode(tokenizer("a word").input_ids) == "a word"
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.is_fast
    told = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(told, tokenize=False) == "user: a<|im_end|>"
    assert loading.load_tokenizer(str(file)).get_vocab() == tokenizer.get_vocab()


def test_text_is_cut_as_for_its_vocabulary(loaded, written, tmp_path):
    """Every digit is a word of its own, so that the blanks before it stay together; by GPT-2's rule one of
    them goes with the digits.
    """
    assert loaded[1].tokenize("a  75") == ["a", "ĠĠ", "7", "5"]
    _, other = loading.load(str(gguf_files.write(tmp_path / "m.gguf", written, splits="gpt-2")))
    assert other.tokenize("a  75") == ["a", "Ġ", "Ġ", "7", "5"]


def test_it_is_known_by_its_first_bytes(file, tmp_path):
    other = shutil.copy(file, tmp_path / "blob")
    assert names.is_gguf(other) and loading.load(str(other))[0].config.model_type == "llama"
    assert not names.is_gguf(tmp_path) and not names.is_gguf("org/name")


# -- what is none


def test_a_missing_gguf_file_is_refused(tmp_path):
    refused(
        lambda: loading.load(str(tmp_path / "none.gguf")),
        "none.gguf",
        "does not exist",
        "give a model folder or a GGUF file",
    )


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_text("words")
    refused(lambda: loading.load(str(tmp_path / "m.gguf")), "m.gguf", "is no GGUF file", "give another")
    (tmp_path / "folder.gguf").mkdir()
    refused(lambda: loading.load(str(tmp_path / "folder.gguf")), "folder.gguf", "is a folder")


@pytest.mark.parametrize("keep", [5, 40, 300, 0.05, 0.5, 0.999])
def test_a_truncated_gguf_file_is_refused(file, tmp_path, keep):
    whole = file.read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[: keep if keep > 1 else int(keep * len(whole))])
    refused(lambda: loading.load(str(tmp_path / "m.gguf")), "m.gguf", "cut off", "download it again")


@pytest.mark.parametrize("place", range(8, 700, 23))
def test_a_gguf_file_with_damaged_metadata_is_refused(file, tmp_path, place):
    """It is refused in a line, or what was hit does not matter."""
    found = bytearray(file.read_bytes())
    found[place : place + 4] = b"\xff\xff\xff\x7f"
    (tmp_path / "m.gguf").write_bytes(found)
    try:
        loading.load(str(tmp_path / "m.gguf"))
    except LowkeyError as error:
        assert "m.gguf" in str(error) and "\n" not in str(error)


def test_an_unknown_gguf_architecture_is_refused(written, tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", written, architecture="rwkv7")
    refused(lambda: loading.load(str(path)), "m.gguf", "architecture rwkv7")


def test_without_the_gguf_package_the_remedy_is_named(file, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    refused(lambda: loading.load(str(file)), "package gguf", "pip install 'lowkey[gguf]'")
