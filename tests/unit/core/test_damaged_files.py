"""Outputs are checked before the work, full disks are survived, and damaged files are refused."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import forging
import pico
import pytest
from saved_files import entries, plan

import lowkey
from lowkey.cli import app
from lowkey.core import files
from lowkey.core.files import outputs
from lowkey.core.types import LowkeyError
from lowkey.plan.plan import Plan
from lowkey.pretraining import Recipe, pretrain

# -- before the work


@pytest.mark.parametrize("out", ["file/under", "x" * 300, "a\0b", "/proc/nothing", "/dev/null/x"])
def test_an_output_that_cannot_be_is_told_before_the_work(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    for check in (
        lambda p: files.check_folder(p, True),
        files.check_file,
        lambda p: files.check_output(p, False),
    ):
        with pytest.raises(LowkeyError, match="output") as error:
            check(Path(out))
        assert "\n" not in str(error.value)
    assert entries(tmp_path) == {"file"}


COMMANDS = {
    "compress": ["M", "OUT", "--windows", "4", "--context", "16"],
    "dynamic": ["M", "OUT"],
    "recover": ["M", "P", "OUT"],
    "convert": ["M", "OUT", "--attention", "mqa"],
    "export": ["M", "P", "OUT"],
    "profile": ["M", "-o", "OUT"],
    "heads": ["M", "-o", "OUT"],
    "diversity": ["M", "-o", "OUT"],
    "eval": ["M", "--out", "OUT"],
    "pretrain": ["R", "-o", "OUT"],
    "report": ["RESULT", "-o", "OUT"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_looks_at_its_output_first(tmp_path, monkeypatch, capsys, command):
    """Neither a place that cannot be written nor a file of the user's costs any work: no model is loaded."""
    (tmp_path / "full").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    (tmp_path / "r.toml").write_text("[model]\nhidden_size = 32\nnum_hidden_layers = 1\n")
    words = {"M": "tiny", "P": str(tmp_path / "plan"), "R": str(tmp_path / "r.toml"), "RESULT": str(tmp_path)}
    monkeypatch.setattr("lowkey.models.loading.load", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr("lowkey.pretraining.loop.prepare", lambda *a, **k: pytest.fail("text was read"))
    for out in (tmp_path / "full" / "under", tmp_path / "mine", tmp_path / "full"):
        if out.name == "full" and command == "pretrain":
            continue
        monkeypatch.setattr(
            sys,
            "argv",
            ["lowkey", command, *(words.get(w, w) if w != "OUT" else str(out) for w in COMMANDS[command])],
        )
        with pytest.raises(SystemExit) as status:
            app.main()
        told = capsys.readouterr().err
        assert status.value.code == 2 and str(out) in told and len(told.splitlines()) == 1
    assert (tmp_path / "full").read_text() == "mine" and entries(tmp_path / "mine") == {"thesis.tex"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_told_before_the_work(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(LowkeyError, match="cannot be written"):
        files.check_folder(tmp_path / "out", force=False)


# -- the disk is full


@pytest.mark.parametrize("at", ["tokens", "tokenizer", "checkpoint", "log", "model"])
def test_pretraining_resumes_after_a_full_disk(tmp_path, monkeypatch, at):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 60)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    training = {"tokens": 64, "batch_tokens": 32, "length": 16, "save_every": 1, "precision": "fp32"}
    wanted = Recipe.of(
        {
            "model": sizes,
            "data": {"path": str(tmp_path / "text.txt"), "vocab_size": 260},
            "training": training,
        }
    )
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*args, **kwargs):
        # as the tokenizers library has it
        raise Exception("No space left on device (os error 28)") if at == "tokenizer" else full

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    spots = {
        "tokens": ("lowkey.pretraining.corpus.np.save", fail),
        "tokenizer": (f"{PreTrainedTokenizerFast.__module__}.PreTrainedTokenizerFast.save_pretrained", fail),
        "checkpoint": ("safetensors.torch.save_file", fail),
        "log": ("lowkey.pretraining.log.Path.open", fail),
        "model": (f"{PreTrainedModel.__module__}.PreTrainedModel.save_pretrained", fail),
    }
    with monkeypatch.context() as here:
        here.setattr(*spots[at])
        with pytest.raises(LowkeyError, match=r"[Nn]o space left") as error:
            pretrain(wanted, tmp_path / "out", device="cpu")
        assert "\n" not in str(error.value)
    assert len(pretrain(wanted, tmp_path / "out", device="cpu").losses) == 2


# -- what is read


@pytest.mark.parametrize(
    "harm", ["pipe", "zeros", "folder", "sparse", "loop", "text", "deep", "twice", "digits", "nan"]
)
def test_what_is_no_json_of_ours_is_refused_at_once(tmp_path, harm):
    file = tmp_path / "r.json"
    written = {
        "text": b"\xff\xfe",
        "deep": b'{"a":' * 10**5,
        "twice": b'{"format": 1, "format": 1}',
        "digits": b'{"format": 1' + b"0" * 400 + b"}",
        "nan": b'{"format": NaN}',
    }
    act = {
        "pipe": os.mkfifo,
        "zeros": lambda p: p.symlink_to("/dev/zero"),
        "folder": Path.mkdir,
        "sparse": lambda p: [p.touch(), os.truncate(p, 2**42)],
        "loop": lambda p: p.symlink_to(p),
    }
    act.get(harm, lambda p: p.write_bytes(written[harm]))(file)
    start = time.perf_counter()
    with pytest.raises(LowkeyError) as error:
        files.read_json(file, "result", "result", 1)
    assert "\n" not in str(error.value) and time.perf_counter() - start < 2


@pytest.mark.parametrize("number", [10**8, 10**30, -1, 1.5, "4", None, True])
@pytest.mark.parametrize("name", ["sinks", "recent"])
def test_counts_of_a_plan_are_bounded(tmp_path, name, number):
    plan().save(tmp_path / "plan")
    forging.edit_json(tmp_path / "plan" / "plan.json", **{name: number})
    with pytest.raises(LowkeyError):
        Plan.load(tmp_path / "plan")


def test_a_file_of_another_size_is_not_read_to_its_end(tmp_path):
    """A sparse file of 4 TiB would take an hour to read: its size alone says that it is damaged."""
    (tmp_path / "whole").write_bytes(b"tokens")
    known = [files.file_checksum(tmp_path / "whole")]
    assert known == [f"6:{hashlib.sha256(b'tokens').hexdigest()}"]
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**42)
    began = time.monotonic()
    assert outputs.unchanged(tmp_path / "whole", known) and not outputs.unchanged(tmp_path / "sparse", known)
    assert time.monotonic() - began < 5


def test_a_finished_run_without_a_weight_is_damaged(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 60)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    training = {"tokens": 32, "batch_tokens": 32, "length": 16, "precision": "fp32"}
    wanted = Recipe.of(
        {
            "model": sizes,
            "data": {"path": str(tmp_path / "text.txt"), "vocab_size": 260},
            "training": training,
        }
    )
    out = tmp_path / "out"
    pretrain(wanted, out, device="cpu")
    from safetensors.torch import load_file, save_file

    weights = load_file(out / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LowkeyError, match="changed since"):
        pretrain(wanted, out, device="cpu")
    forging.edit_json(
        out / files.MANIFEST,
        lambda m: m["files"].update({"model.safetensors": [files.file_checksum(out / "model.safetensors")]}),
    )
    with pytest.raises(LowkeyError, match=r"damaged .*lacks model\.layers\.0\.mlp\.up_proj\.weight"):
        pretrain(wanted, out, device="cpu")


def test_a_damaged_model_written_by_lowkey_is_refused(tmp_path):
    with files.replacing_folder(tmp_path / "model") as folder:
        pico.save(folder)
    loaded, _ = lowkey.models.loading.load(str(tmp_path / "model"), device="cpu")
    assert loaded.config.hidden_size == pico.HIDDEN
    data = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "model" / "model.safetensors").write_bytes(data)
    with pytest.raises(LowkeyError, match=r"model\.safetensors is not what lowkey wrote"):
        lowkey.models.loading.load(str(tmp_path / "model"), device="cpu")
    (tmp_path / "model" / files.MANIFEST).unlink()
    lowkey.models.loading.load(str(tmp_path / "model"), device="cpu")


def test_a_plan_inside_a_cache_is_the_one_it_was_made_with(tmp_path):
    model = pico.attached("llama")
    cache = lowkey.make_cache(model, plan=pico.plan(model, 6, 6))
    pico.feed(model, pico.prompt(8), cache)
    cache.save(tmp_path / "c")
    other = pico.plan(model, 6, 6)
    replace(other, factors={i: pico.factors(4, 6, 6, seed=9) for i in range(3)}).save(tmp_path / "c" / "plan")
    with pytest.raises(LowkeyError, match="another one than it was made with"):
        lowkey.load_cache(tmp_path / "c", model)


@pytest.mark.slow
def test_the_lock_of_a_killed_process_is_gone(tmp_path):
    """Its leftovers are swept, whoever is killed and how."""
    script = "import os, signal, sys; from pathlib import Path; from lowkey.core.files import atomic\n"
    script += "atomic._locked(Path(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=False)
    assert len(entries(tmp_path)) == 1
    files.write_text(tmp_path / "a", "x")
    assert entries(tmp_path) == {"a"}
