"""The command line: what each command prints, and one line and an untouched disk for everything it cannot do."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import forging
import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from lowkey import catalog
from lowkey.allocation.allocators import RANK_ALLOCATORS
from lowkey.calibration import dynamic
from lowkey.calibration.dynamic import DynamicPlan, make_dynamic_cache
from lowkey.cli import app
from lowkey.core import files, text
from lowkey.core.types import LowkeyError
from lowkey.methods import METHODS, PCA, StiefAttention
from lowkey.models import loading
from lowkey.plan.plan import PLAN_JSON, PLAN_TENSORS, Plan

SMALL = ("--method", "pca", "--windows", 8, "--context", 32)
STIEF = ("--method", "stiefattention")
BARE = ("--sinks", 0, "--recent", 0)
SCORE = ("--windows", 2, "--context", 192, "--cases", 1)
EVERYTHING = ("--task", "perplexity,layers,recall,speed")
ALL = (
    "compress",
    "dynamic",
    "eval",
    "generate",
    "profile",
    "methods",
    "policies",
    "heads",
    "inspect",
    "report",
)
ROW = (
    *(
        "name",
        "method",
        "plan",
        "policy",
        "budget",
        "task",
        "perplexity",
        "kl",
        "top1_agreement",
        "layer_error",
        "exact_match",
    ),
    *("bytes_per_token", "bytes_held", "bytes_predicted", "bytes_full", "prefill_ms", "step_ms"),
)


class Ran(NamedTuple):
    status: int
    out: str
    err: str


def lowkey(*words: object) -> Ran:
    """The command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv = mock.patch.object(sys, "argv", ["lowkey", *map(str, words)])
    with argv, redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit:
        app.main()
    return Ran(exit.value.code, out.getvalue(), err.getvalue())


def done(*words: object) -> Ran:
    ran = lowkey(*words)
    assert ran.status == 0, ran.err
    return ran


def printed(*words: object) -> dict:
    """The one JSON object on stdout."""
    return json.loads(done(*words, "--json").out)


def refused(*words: object, status: int = 2) -> str:
    """The one line on stderr; nothing is printed on stdout."""
    ran = lowkey(*words)
    assert (ran.status, ran.out) == (status, "")
    assert ran.err.startswith("lowkey: ") and ran.err.endswith("\n") and len(ran.err.splitlines()) == 1, (
        ran.err
    )
    return ran.err


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved pico model."""
    return pico.save(tmp_path_factory.mktemp("model") / "pico", pad_token_id=None)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A saved model of the same shape with other weights."""
    return pico.save(tmp_path_factory.mktemp("other") / "pico", initializer_range=0.1)


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """(plan folder, what `compress --json` printed)."""
    out = tmp_path_factory.mktemp("plans") / "pca"
    return out, printed("compress", model, out, *SMALL)


@pytest.fixture(scope="module")
def scored(model, made, tmp_path_factory):
    """(result file, what `eval --json` did)."""
    out = tmp_path_factory.mktemp("results") / "pico.json"
    return out, done("eval", model, "--plan", made[0], *SCORE, *EVERYTHING, "--out", out, "--json")


@pytest.fixture
def plan(made, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(made[0], tmp_path / "plan"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An own working folder, with a file of the user's."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    monkeypatch.chdir(folder)
    return folder


# -- bad arguments


@pytest.mark.parametrize(
    "words, says",
    [
        (["--method", "stiefatention"], ["method 'stiefatention'", "did you mean 'stiefattention'?"]),
        (
            ["--method", "zzz"],
            ["method 'zzz'", "pca, eigenattention, stiefattention", "package.module:Class"],
        ),
        (["--method", "no.such.module:Class"], ["method 'no.such.module:Class'", "package.module:Class"]),
        (["--method", "json:Class"], ["method 'json:Class'", "package.module:Class"]),
        (["--method", ":Class"], ["method ':Class'", "package.module:Class"]),
        (["--method", "os:path"], ["method 'os:path'", "dataclass", "fit"]),
        (["--allocator", "best"], ["allocator 'best'", "greedy"]),
        (["--layout", "rope"], ["layout 'rope'", "did you mean 'pre_rope'?"]),
        ([*STIEF, "-O", "epoch=5"], ["'epoch'", "'stiefattention'", "epochs"]),
        ([*STIEF, "-O", "epochs=many"], ["epochs='many'", "whole number"]),
        ([*STIEF, "-O", "parametrisation=lucky"], ["parametrisation='lucky'", "mlp, free"]),
        ([*STIEF, "-O", "key_bases=none"], ["key_bases='none'", "shared, per_head"]),
        (["-O", "epochs"], ["'epochs'", "name=value"]),
        (["--budget", "150%"], ["budget '150%'", "100%", "50%"]),
        (["--budget", "0%"], ["budget '0%'", "50%"]),
        (["--budget", "banana"], ["budget 'banana'", "50%"]),
        (["--budget", "0.5"], ["budget '0.5'", "50%"]),
        (["--budget", ""], ["budget ''", "50%"]),
        (["--budget", "512 tokens"], ["budget 512 tokens", "50%"]),
        (["--budget", "50%", "--error-budget", 0.03], ["budget 50%", "error budget 0.03", "one of them"]),
        (["--error-budget", 0], ["error budget 0", "above 0"]),
        (["--error-budget", 1.5], ["error budget 1.5", "up to 1"]),
        (["--error-budget", "nan"], ["error budget nan", "up to 1"]),
        (["--error-budget", "small"], ["--error-budget", "'small'", "--help"]),
        (["--context", 0], ["context 0", "at least 8"]),
        (["--context", -5], ["context -5", "at least 8"]),
        (["--context", "banana"], ["--context", "'banana'", "--help"]),
        (["--windows", 3], ["windows 3", "at least 4"]),
        (["--rank-multiple", 17], ["rank multiple 17", "between 1 and the head dim 16"]),
        (["--rank-multiple", 0], ["rank multiple 0", "at least 1"]),
        (["--ranks", "banana"], ["ranks 'banana'", "16,32,64"]),
        (["--ranks", "8,17"], ["ranks '8,17'", "17 is not one of"]),
        (["--ranks", "8,12", "--rank-multiple", 8], ["ranks '8,12'", "12 is not one of 8, 16"]),
        ([*STIEF, *BARE, "--budget", "49%"], ["49.0%", "50.0%", "--ranks"]),
        (["--budget", "64 KiB/token"], ["64 KiB/token", "of the full cache", "100%"]),
        (["--budget", "1 KiB"], ["budget 1 KiB of a cache of 512 tokens", "alone take 7%", "--at"]),
        (["--judge", "loss", "--error-budget", 0], ["error budget 0", "nats"]),
        (["--sinks", -1], ["sinks -1", "at least 0"]),
        (["--recent", -1], ["recent -1", "at least 0"]),
        (["--seed", -1], ["seed -1", "at least 0"]),
        (["--dtype", "banana"], ["dtype 'banana'", "bfloat16"]),
        (["--device", "banana"], ["device 'banana'", "cpu"]),
        (["--device", "cuda"], ["device 'cuda'", "--device cpu"]),
        (["--bogus"], ["--bogus", "--help"]),
    ],
    ids=str,
)
def test_bad_arguments_of_compress(model, here, monkeypatch, words, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = tree(here)
    line = refused("compress", model, "out", *words)
    assert [s for s in says if s not in line] == []
    assert tree(here) == before


@pytest.mark.parametrize(
    "words, says",
    [
        (["--task", "perplexitty"], ["task 'perplexitty'", "perplexity"]),
        (["--task", "perplexity,"], ["task ''", "perplexity"]),
        (["--context", 0], ["context 0", "8", "512"]),
        (["--context", -1], ["context -1", "8", "512"]),
        (["--context", 513], ["context 513", "512"]),
        (["--context", 16, "--task", "recall"], ["context 16", "longer context"]),
        (["--windows", 0], ["windows 0", "at least 1"]),
        (["--cases", 0], ["cases 0", "at least 1"]),
        (["--bits", 5], ["bits '5'", "int8", "kivi4"]),
        (["--bits", "few"], ["bits 'few'", "hadamard4"]),
        (["--plan", "missing"], ["missing", "does not exist", "lowkey compress"]),
        (["--out", "."], ["output '.'", "folder"]),
        (["--out", "notes.txt/r.json", "--task", "speed"], ["notes.txt/r.json", "another place"]),
    ],
    ids=str,
)
def test_bad_arguments_of_eval(model, here, words, says):
    before = tree(here)
    line = refused("eval", model, *words)
    assert [s for s in says if s not in line] == []
    assert tree(here) == before


@pytest.mark.parametrize(
    "words, says",
    [
        (["--prompt", ""], ["prompt ''", "empty"]),
        (["--prompt", "a", "--tokens", 0], ["tokens 0", "at least 1"]),
        (["--prompt", "a", "--bits", 3], ["bits '3'", "int8"]),
        (["--prompt", "a", "--plan", "missing"], ["missing", "does not exist"]),
        ([], ["--prompt", "--help"]),
    ],
    ids=str,
)
def test_bad_arguments_of_generate(model, here, words, says):
    line = refused("generate", model, *words)
    assert [s for s in says if s not in line] == []


def test_a_policy_together_with_bits_is_refused(model):
    assert "one of them" in refused(
        "generate", model, "--prompt", "a", "--policy", "snapkv", "--budget", "50%", "--bits", 8
    )


@pytest.mark.parametrize("words", [["compres"], ["compress"], ["methods", "--jsn"], ["inspect"]], ids=str)
def test_a_command_line_that_does_not_parse(words):
    assert "--help" in refused(*words)


def test_arguments_are_judged_before_the_model_is_loaded(here, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("loaded"))
    for words in (
        ["--layout", "rope"],
        ["--budget", "150%"],
        ["--method", "zzz"],
        ["--calibration", "none.txt"],
    ):
        refused("compress", "tiny", "out", *words)


def test_a_budget_that_no_rank_can_reach(model, here):
    line = refused("compress", model, "out", *SMALL, "--budget", "1%")
    assert "budget 1%" in line and "512 tokens" in line and "4 sinks and 32 recent" in line and "--at" in line
    line = refused("compress", model, "out", *SMALL, *BARE, "--budget", "1%")
    assert "1.0%" in line and "give a budget of 12.5% or more" in line
    assert not (here / "out").exists()


# -- bad text

TEXTS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "no such file"),
    "empty": (b"", "is empty"),
    "blank": (b" \n\t ", "is empty"),
    "latin-1": ("é".encode("latin-1") * 99, "not UTF-8"),
    "binary": (bytes(range(256)) * 9, "not UTF-8"),
    "nul": (b"a\0b" * 99, "NUL"),
    "short": (b"Too few words.", "too few"),
}


@pytest.mark.parametrize(
    "command", [("compress", "out", "--calibration"), ("eval", "--data")], ids=lambda c: c[0]
)
@pytest.mark.parametrize("kind", TEXTS)
def test_bad_text(model, here, command, kind):
    content, says = TEXTS[kind]
    path = here / "text.txt"
    if content is not None:
        path.write_bytes(content)
    before = tree(here)
    line = refused(command[0], model, *command[1:], path)
    assert says in line and (str(path) in line or (kind == "short" and "calibration" in line))
    assert tree(here) == before


@pytest.mark.parametrize(
    "command", [("compress", "out", "--calibration"), ("eval", "--data")], ids=lambda c: c[0]
)
def test_a_folder_is_no_text(model, here, command):
    assert "is a folder" in refused(command[0], model, *command[1:], here)


# -- bad models


@pytest.mark.parametrize("name", ["./none", "/no/such/folder", "no-such-model", "no-such/model"])
def test_a_model_that_is_nowhere(here, name):
    line = refused("compress", name, "out", *SMALL)
    assert f"model {name!r}" in line and "'tiny'" in line


@pytest.mark.parametrize("name", [".", "notes.txt"])
def test_a_place_that_is_no_model(here, name):
    assert "no config.json" in refused("compress", name, "out", *SMALL)


@pytest.mark.parametrize(
    "kind, says",
    [
        ("gpt2", "supported families: llama"),
        ("deepseek_v3", "MLA"),
        ("mistral", "only sliding-window layers"),
    ],
)
def test_a_family_that_is_not_supported(model, here, kind, says):
    folder = Path(shutil.copytree(model, here / "model"))
    if kind == "mistral":
        pico.save(folder, kind, sliding_window=pico.WINDOW)
    else:
        AutoConfig.for_model(kind).save_pretrained(folder)
    line = refused("compress", folder, "out", *SMALL)
    assert kind in line and says in line


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_weight(path: Path) -> None:
    weights = load_file(path)
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    "file, damage",
    [
        ("config.json", lambda p: p.write_text("{")),
        ("config.json", lambda p: p.write_text("[]")),
        ("config.json", lambda p: p.write_text("{}")),
        ("config.json", lambda p: p.write_bytes(bytes(range(256)))),
        ("config.json", lambda p: p.write_text('{"model_type": "mystery"}')),
        (
            "config.json",
            lambda p: p.write_text(p.read_text().replace('"hidden_size": 64', '"hidden_size": 128')),
        ),
        ("model.safetensors", truncate),
        ("model.safetensors", lambda p: p.write_bytes(b"")),
        ("model.safetensors", lambda p: p.unlink()),
        ("model.safetensors", lose_a_weight),
        ("tokenizer.json", lambda p: p.write_text("{")),
    ],
)
def test_a_damaged_model(model, here, file, damage):
    folder = Path(shutil.copytree(model, here / "model"))
    damage(folder / file)
    before = tree(here)
    assert f"model {str(folder)!r}" in refused("compress", folder, "out", *SMALL)
    assert tree(here) == before


def test_a_model_that_brings_code_is_neither_run_nor_asked_about(model, here, monkeypatch):
    folder = Path(shutil.copytree(model, here / "model"))
    (folder / "config.json").write_text(
        '{"model_type": "mystery", "auto_map": {"AutoConfig": "evil.Config"}}'
    )
    (folder / "evil.py").write_text(f"open({str(here / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    assert f"model {str(folder)!r}" in refused("compress", folder, "out", *SMALL)
    assert not (here / "ran").exists()


# -- bad plans


def change(plan: Path, **fields: object) -> None:
    forging.edit_json(plan / PLAN_JSON, **fields)


def fill_with_nan(plan: Path) -> None:
    forging.edit_tensors(
        plan / PLAN_TENSORS, lambda tensors: [t.fill_(torch.nan) for t in tensors.values()], plan / PLAN_JSON
    )


BAD_PLANS: dict[str, tuple[Callable[[Path], object], str]] = {
    "newer": (lambda p: change(p, format=99), "upgrade lowkey"),
    "no json": (lambda p: (p / PLAN_JSON).write_text("{"), "damaged"),
    "deep json": (lambda p: (p / PLAN_JSON).write_text("[" * 100_000), "damaged"),
    "list": (lambda p: (p / PLAN_JSON).write_text("[]"), "damaged"),
    "truncated": (lambda p: truncate(p / PLAN_TENSORS), "damaged"),
    "other tensors": (lambda p: save_file({"a": torch.zeros(1)}, p / PLAN_TENSORS), "damaged"),
    "huge header": (lambda p: (p / PLAN_TENSORS).write_bytes(b"\xff" * 64), "damaged"),
    "nan": (fill_with_nan, "NaN"),
    "huge ranks": (lambda p: change(p, ranks={"0": [10**9, 1]}), "head dim"),
    "layout": (lambda p: change(p, layout="__import__('os')"), "post_rope"),
    "gone": (lambda p: (p / PLAN_TENSORS).unlink(), "does not exist"),
}


@pytest.mark.parametrize("command", ["inspect", "eval", "generate"])
@pytest.mark.parametrize("kind", BAD_PLANS)
def test_a_bad_plan(model, here, plan, command, kind):
    damage, says = BAD_PLANS[kind]
    damage(plan)
    before = tree(here)
    words = {
        "inspect": [plan],
        "eval": [model, "--plan", plan],
        "generate": [model, "--prompt", "a", "--plan", plan],
    }[command]
    line = refused(command, *words)
    assert str(plan) in line and says in line
    assert tree(here) == before


@pytest.mark.parametrize("fields", [{"ranks": {}}, {"geometry": {"kv_heads": "4", "head_dim": 16}}], ids=str)
def test_inspect_of_an_impossible_plan(plan, fields):
    change(plan, **fields)
    assert str(plan) in refused("inspect", plan)


@pytest.mark.parametrize("words", [["eval"], ["generate", "--prompt", "a"]], ids=lambda w: w[0])
def test_a_plan_of_another_model(other, made, here, words):
    line = refused(words[0], other, *words[1:], "--plan", made[0])
    assert "was made for model" in line and "compress this model" in line


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 9}'])
def test_a_bad_result_makes_no_report(here, content):
    if content is not None:
        (here / "r.json").write_text(content)
    assert "r.json" in refused("report", "r.json", "-o", "page.html")
    assert not (here / "page.html").exists()


# -- the output folder


def test_a_folder_that_holds_files_is_kept(model, here):
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("mine")
    before = tree(here)
    for more in ([], ["--force"]):
        assert "did not write 'thesis.tex'" in refused("compress", model, "out", *SMALL, *more)
        assert tree(here) == before


def test_force_replaces_a_folder(model, here):
    done("compress", model, "out", *SMALL)
    before = tree(here / "out")
    assert "--force" in refused("compress", model, "out", *SMALL, "--seed", 1)
    assert tree(here / "out") == before
    done("compress", model, "out", *SMALL, "--force", "--seed", 1)
    assert {p.name for p in (here / "out").iterdir()} == {
        PLAN_JSON,
        PLAN_TENSORS,
        "README.md",
        files.MANIFEST,
    } and tree(here / "out") != before
    assert {p.name for p in here.iterdir()} == {"out", "notes.txt"}


@pytest.mark.parametrize("out", [".", "..", "/", "notes.txt"])
def test_an_output_that_cannot_be_a_plan_folder(model, here, out):
    before = tree(here)
    assert f"output {out!r}" in refused("compress", model, out, *SMALL, "--force")
    assert tree(here) == before


@pytest.mark.parametrize("name", ["layer-x.safetensors", "model.safetensors", "thesis.tex"])
def test_a_partial_folder_of_the_users_is_kept(model, here, name):
    (here / "out.partial").mkdir()
    (here / "out.partial" / name).write_text("mine")
    before = tree(here)
    assert "out.partial" in refused("compress", model, "out", *SMALL)
    assert tree(here) == before


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The write of the file of this name finds the disk full."""
    write = Path.write_text
    monkeypatch.setattr(
        Path, "write_text", lambda self, *a, **k: full_disk() if name in self.name else write(self, *a, **k)
    )


@pytest.mark.parametrize("at", [PLAN_JSON, "README.md", "job.json"])
def test_a_full_disk_keeps_the_old_plan(model, plan, monkeypatch, at):
    before = tree(plan)
    fail_at(monkeypatch, at)
    assert "No space left" in refused("compress", model, plan, *SMALL, "--force", "--seed", 1)
    assert tree(plan) == before
    Plan.load(plan)


def test_a_full_disk_for_tensors_keeps_the_old_plan(model, plan, monkeypatch):
    before = tree(plan)
    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    assert "No space left" in refused("compress", model, plan, *SMALL, "--force")
    assert tree(plan) == before


def test_the_old_plan_comes_back_when_the_new_one_cannot_take_its_place(model, plan, monkeypatch):
    """Where names cannot be exchanged in one step."""
    before, rename = tree(plan), os.rename
    monkeypatch.setattr("lowkey.core.files.atomic.exchange", lambda a, b: False)
    monkeypatch.setattr(
        os, "rename", lambda a, b: full_disk() if Path(a).name == "new" and b == plan else rename(a, b)
    )
    assert "No space left" in refused("compress", model, plan, *SMALL, "--force")
    assert tree(plan) == before


def test_a_full_disk_leaves_no_result(model, here, monkeypatch):
    before = tree(here)
    fail_at(monkeypatch, "r.json")
    assert "No space left" in refused("eval", model, "--task", "speed", *SCORE, "--out", "r.json")
    assert {
        name: held for name, held in tree(here).items() if not str(name).startswith("r.json.partial")
    } == before
    monkeypatch.undo()
    monkeypatch.chdir(here)
    # goes on with what was measured
    assert done("eval", model, "--task", "speed", *SCORE, "--out", "r.json").status == 0
    assert {str(name) for name in tree(here)} == {"r.json", *map(str, before)}


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_system_cuts_short(model, here):
    with files_end_at(4096):
        line = refused("compress", model, "out", *SMALL)
    assert "cannot write" in line and "another place" in line
    assert not (here / "out").exists()


# -- Ctrl-C


@contextmanager
def stopped_at(layer: int) -> Iterator[None]:
    """Ctrl-C while this layer is fitted."""
    fit, calls = PCA.fit, []

    def stopping(*args: object) -> object:
        calls.append(1)
        if len(calls) > layer:
            raise KeyboardInterrupt
        return fit(*args)

    with mock.patch.object(PCA, "fit", stopping):
        yield


def test_ctrl_c_leaves_no_plan_but_its_work(model, here):
    with stopped_at(1):
        line = refused("compress", model, "out", *SMALL, status=130)
        assert "compress, dynamic, eval, heads, recover and pretrain resume when given again" in line
    assert not (here / "out").exists()
    assert {p.name for p in (here / "out.partial").glob("*/*")} == {"job.json", "layer-0.safetensors"}


def test_after_ctrl_c_the_same_command_goes_on_to_the_same_plan(model, here, monkeypatch):
    done("compress", model, "straight", *SMALL)
    with stopped_at(1):
        lowkey("compress", model, "out", *SMALL)
    fitted, fit = [], PCA.fit
    monkeypatch.setattr(PCA, "fit", lambda *a: fitted.append(1) or fit(*a))
    done("compress", model, "out", *SMALL)
    assert len(fitted) == pico.LAYERS - 1
    assert tree(here / "out") == tree(here / "straight")
    assert not (here / "out.partial").exists()


def test_ctrl_c_keeps_the_old_plan(model, plan):
    before = tree(plan)
    with stopped_at(2):
        refused("compress", model, plan, *SMALL, "--force", status=130)
    assert tree(plan) == before


@pytest.mark.slow
def test_a_real_ctrl_c(model, here):
    command = [
        Path(sys.executable).with_name("lowkey"),
        "compress",
        model,
        "out",
        "--windows",
        "8",
        "--context",
        "32",
        "-O",
        "lr=1e-9",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not list((here / "out.partial").glob("*/job.json")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    assert (process.returncode, out, len(err.splitlines())) == (130, "", 1)
    assert not (here / "out").exists()


@pytest.mark.slow
def test_output_that_cannot_be_written(made):
    """The system tells so only when the buffer is flushed."""
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [Path(sys.executable).with_name("lowkey"), "inspect", made[0]],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ran.returncode == 2
    assert "no space left" in ran.stderr and len(ran.stderr.splitlines()) == 1


# -- help


def test_alone_it_prints_its_help():
    ran = lowkey()
    assert ran.status == 2 and "Usage: lowkey" in ran.err


def test_a_group_of_commands_alone_prints_its_help():
    ran = lowkey("bench")
    assert (
        (ran.status, ran.out) == (2, "")
        and ran.err.splitlines()[0].startswith("Usage: lowkey bench")
        and "\n  decode " in ran.err
    )


def test_help_lists_the_commands():
    out = done("--help").out
    assert [c for c in ALL if c not in out] == []


@pytest.mark.parametrize("command", ALL)
def test_help_of_each_command(command):
    assert f"Usage: lowkey {command}" in done(command, "--help").out


# -- compress and inspect


def test_compress_prints_the_plan_it_wrote(model, made):
    out, told = made
    held = Plan.load(out)
    assert told["plan"] == str(out)
    assert (told["method"]["name"], told["budget"], told["format"]) == ("pca", "50%", 3)
    assert told["ranks"] == {str(i): list(r) for i, r in held.ranks.items()}
    assert told["provenance"]["model"] == str(model)


def test_compress_keeps_half_when_not_told(made):
    assert 0 < made[1]["bytes_per_token"]["float32"] <= pico.LAYERS * 2 * 4 * pico.HEAD_DIM * 4 / 2


def test_no_work_is_left_behind(made):
    assert [p.name for p in made[0].parent.iterdir()] == [made[0].name]


def test_inspect_says_what_compress_said(made):
    assert printed("inspect", made[0]) == made[1]


def test_inspect_without_json(made):
    out = done("inspect", made[0]).out
    held = made[1]["bytes_per_token"]["bfloat16"]
    assert "key rank" in out and f"latents keep {held} of 768 bytes per token" in out


def test_a_budget_in_bytes(model, here):
    told = printed("compress", model, "out", *SMALL, "--budget", "1 KiB/token")
    assert told["budget"] == "1 KiB/token"
    assert 0 < told["bytes_per_token"]["float32"] <= 1024


def test_an_error_budget(model, here):
    assert printed("compress", model, "out", *SMALL, "--error-budget", "0.5")["budget"] == "error 0.5"


def test_options_reach_the_method(model, here):
    words = (
        *STIEF,
        "--budget",
        "60%",
        "--windows",
        8,
        "--context",
        32,
        "-O",
        "epochs=1",
        "-O",
        "lr=0.5",
        "-O",
        "key_bases=per_head",
    )
    parameters = printed("compress", model, "out", *words)["method"]["parameters"]
    assert (parameters["epochs"], parameters["lr"], parameters["key_bases"]) == (1, 0.5, "per_head")


def test_the_other_arguments_reach_the_plan(model, here):
    words = (
        "--layout",
        "pre_rope",
        "--allocator",
        "uniform",
        "--sinks",
        2,
        "--recent",
        3,
        "--rank-multiple",
        4,
        "--seed",
        7,
    )
    told = printed("compress", model, "out", *SMALL, *words)
    assert (told["layout"], told["allocator"]["name"], told["sinks"], told["recent"]) == (
        "pre_rope",
        "uniform",
        2,
        3,
    )
    assert told["provenance"]["seed"] == 7
    assert {r % 4 for pair in told["ranks"].values() for r in pair} == {0}


def test_a_text_of_ones_own(model, made, here):
    (here / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    told = printed("compress", model, "out", *SMALL, "--calibration", "text.txt")
    assert told["provenance"]["data_sha256"] != made[1]["provenance"]["data_sha256"]


OUTSIDE = """
from dataclasses import dataclass
from lowkey.methods import PCA

@dataclass(frozen=True)
class Mine(PCA):
    loud: bool = False
    times: int = 1
"""


def test_a_method_from_a_file_of_ones_own(model, here, monkeypatch):
    (here / "outside_method.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(here)
    words = ("--method", "outside_method:Mine", *SMALL[2:], "-O", "loud=true", "-O", "times=3")
    method = printed("compress", model, "out", *words)["method"]
    assert method["name"] == "outside_method:Mine"
    assert (method["parameters"]["loud"], method["parameters"]["times"]) == (True, 3)


def test_a_class_that_has_not_all_of_a_method_is_refused(here, monkeypatch):
    parts = ("fit", "summary", "paper", "allocator", "layout", "grid", "candidates")
    lines = [
        "from dataclasses import dataclass",
        "@dataclass(frozen=True)",
        "class Half:",
        *(f"    {part} = None" for part in parts),
    ]
    (here / "half_method.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(here)
    line = refused("compress", "tiny", "out", "--method", "half_method:Half")
    assert "half_method:Half' is not a suitable class" in line and "has_finish" in line


@pytest.mark.parametrize("content", ["import nothing_of_this_name", "1 / 0", "def ("])
def test_a_method_file_that_does_not_import(here, monkeypatch, content):
    (here / "broken_method.py").write_text(content)
    monkeypatch.syspath_prepend(here)
    assert "broken_method:Mine" in refused("compress", "tiny", "out", "--method", "broken_method:Mine")


def test_options_are_read_by_the_type_of_their_default():
    method = catalog.make_method("stiefattention", {"epochs": "3", "lr": "1e-2", "parametrisation": "mlp"})
    assert method == StiefAttention("mlp", epochs=3, lr=0.01)


def test_a_flag_is_true_or_false(here, monkeypatch):
    (here / "flag_method.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(here)
    assert catalog.make_method("flag_method:Mine", {"loud": "false"}).loud is False
    with pytest.raises(LowkeyError, match="true or false"):
        catalog.make_method("flag_method:Mine", {"loud": "maybe"})


# -- eval


def test_eval_prints_one_result_and_writes_it(scored):
    out, ran = scored
    result = json.loads(ran.out)
    assert list(result) == ["format", "model", "environment", "rows"]
    assert result["format"] == 1
    assert files.read_json(out, "result", "result", 1) == result
    assert f"result written to {out}" in ran.err


def test_rows_of_a_result(scored, made):
    rows = json.loads(scored[1].out)["rows"]
    assert [row["name"] for row in rows] == ["full", "pca 50%", "int8", "int4"]
    assert [key for row in rows for key in ROW if key not in row] == []
    assert (rows[1]["method"], rows[1]["plan"], rows[1]["budget"]) == ("pca", str(made[0]), "50%")


def test_the_full_row_is_the_reference(scored):
    full = json.loads(scored[1].out)["rows"][0]
    assert abs(full["kl"]) < 1e-6
    assert (full["top1_agreement"], full["layer_error"]) == (1.0, 0.0)
    assert full["bytes_held"] == full["bytes_full"]


def test_bytes_are_held_as_predicted(scored):
    rows = json.loads(scored[1].out)["rows"]
    assert [row["bytes_held"] for row in rows] == [row["bytes_predicted"] for row in rows]
    assert len({row["bytes_held"] for row in rows}) == len(rows)


def test_everything_that_was_asked_for_is_measured(scored):
    unmeasured = {key for row in json.loads(scored[1].out)["rows"] for key in ROW[6:] if row[key] is None}
    assert unmeasured == set()
    assert json.loads(scored[1].out)["rows"][0]["task"] == EVERYTHING[1]


def test_without_a_task_perplexity_and_bytes_are_measured(model, here):
    for row in printed("eval", model, *SCORE, "--out", "r.json")["rows"]:
        assert row["task"] == "perplexity" and row["bytes_held"] and row["kl"] is not None
        assert {
            row[key] for key in ("layer_error", "exact_match", "perplexity_decode", "prefill_ms", "step_ms")
        } == {None}


@pytest.mark.parametrize(
    "words",
    [["--task", "layers"], ["--task", "layers,speed"], ["--task", "layers", "--task", "speed"]],
    ids=str,
)
def test_what_nobody_asked_for_is_null(model, here, words):
    for row in printed("eval", model, *SCORE, *words, "--out", "r.json")["rows"]:
        assert row["layer_error"] is not None and row["bytes_held"] is not None
        assert {row[key] for key in ("perplexity", "kl", "top1_agreement", "exact_match")} == {None}


@pytest.mark.parametrize("bits", [8, 4])
def test_bits_choose_the_packed_rows(model, here, bits):
    rows = printed("eval", model, *SCORE, "--task", "speed", "--bits", bits, "--out", "r.json")["rows"]
    assert [row["name"] for row in rows] == ["full", f"int{bits}"]


def test_plans_of_the_same_name_keep_rows_of_their_own(model, made, here):
    done("compress", model, "wide", *SMALL, "--ranks", "2,16")
    words = ("--plan", made[0], "--plan", "wide", "--bits", 8, "--task", "layers", "--out", "r.json")
    rows = printed("eval", model, *SCORE, *words)["rows"]
    assert [row["name"] for row in rows] == [
        "full",
        "pca 50% pca",
        "pca 50% wide",
        "pca 50% int8 pca",
        "pca 50% int8 wide",
        "int8",
    ]
    assert [row["plan"] for row in rows] == [None, *[str(made[0]), "wide"] * 2, None]
    assert rows[1]["layer_error"] != rows[2]["layer_error"]
    assert rows[3]["bytes_held"] < rows[1]["bytes_held"] and (rows[3]["bits"], rows[3]["packing"]) == (
        8,
        "int8",
    )


def test_without_a_name_the_result_goes_to_results(model, here):
    err = done("eval", model, *SCORE, "--task", "speed").err
    (found,) = (here / "results").iterdir()
    assert found.name.startswith("eval-pico-") and f"results/{found.name}" in err


def test_brackets_in_a_path_are_printed_as_they_are(model, here):
    ran = done("eval", model, *SCORE, "--task", "speed", "--out", "r[bold][1].json")
    assert "r[bold][1].json" in ran.err and (here / "r[bold][1].json").exists()


def test_eval_without_json_prints_a_table(model, made, here):
    ran = done("eval", model, "--plan", made[0], *SCORE, "--task", "layers", "--out", "r.json")
    assert "pca 50%" in ran.out and "layer error" in ran.out and "100.0%" in ran.out
    assert "recall" not in ran.out


def test_the_text_and_the_command_are_recorded(model, here):
    (here / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    environment = printed("eval", model, *SCORE, "--task", "speed", "--data", "text.txt", "--out", "r.json")[
        "environment"
    ]
    assert environment["data"]["name"] == "text.txt" and environment["data"]["context"] == 192
    assert environment["command"].startswith("lowkey eval") and "--data text.txt" in environment["command"]
    assert (environment["dtype"], environment["device"]) == ("float32", "cpu")


def test_another_dtype(model, here):
    result = printed(
        "eval", model, *SCORE, "--task", "speed", "--bits", 8, "--dtype", "bfloat16", "--out", "r.json"
    )
    assert result["environment"]["dtype"] == "bfloat16"
    assert result["rows"][0]["bytes_per_token"] == pico.LAYERS * 2 * 4 * pico.HEAD_DIM * 2


# -- the others


def test_generate_prints_what_it_wrote_and_held(model, made):
    told = printed("generate", model, "--prompt", "Once upon a time" * 8, "--plan", made[0], "--tokens", 5)
    assert told["new_tokens"] == 5 and told["tokens_per_s"] > 0
    assert 0 < told["bytes_held"] < told["bytes_full"]


def test_generate_streams_the_same_text(model, made):
    words = ("generate", model, "--prompt", "Once upon a time", "--plan", made[0], "--tokens", 5)
    ran = done(*words)
    assert ran.out.rstrip("\n") == printed(*words)["text"].rstrip("\n")
    assert "tokens/s" in ran.err


def test_generate_over_packed_integers(model):
    """Beside the first 4 tokens and the last 32, which are held whole."""
    told = printed("generate", model, "--prompt", "Once upon a time" * 8, "--bits", 8, "--tokens", 5)
    tokens, whole = 16 * 8 + 5 - 1, 2 * 4 * pico.HEAD_DIM * 4
    places = 3 * 8 + 4 * 4  # of a row, and of each of its sinks
    assert told["bytes_full"] == pico.LAYERS * tokens * whole
    assert told["bytes_held"] == pico.LAYERS * (
        (tokens - 32) * whole * (16 + 8) / 64 + (4 + 32) * whole + places
    )


@pytest.mark.parametrize("bits", ["int4", "kivi4", "hadamard4"])
def test_generate_over_packed_latents(model, made, bits):
    whole, packed = (
        printed("generate", model, "--prompt", "Once upon a time " * 8, "--plan", made[0], *b)
        for b in ((), ("--bits", bits))
    )
    assert packed["bytes_held"] < whole["bytes_held"]


def test_generate_over_the_full_cache(model):
    told = printed("generate", model, "--prompt", "Once upon a time", "--tokens", 5)
    assert told["bytes_held"] == told["bytes_full"] == pico.LAYERS * 2 * 4 * pico.HEAD_DIM * 4 * (16 + 5 - 1)


def test_report_writes_a_page(scored, here):
    told = printed("report", scored[0], "-o", "page.html")
    assert told == {"report": "page.html"}
    assert "pca 50%" in (here / "page.html").read_text()


def test_report_without_json(scored, here):
    ran = done("report", scored[0])
    assert ran.out == "" and "report written to report.html" in ran.err


def test_methods_lists_everything():
    told = printed("methods")
    assert list(told["methods"]) == list(METHODS) and list(told["allocators"]) == list(RANK_ALLOCATORS)
    assert told["methods"]["stiefattention"]["options"]["epochs"] == StiefAttention().epochs
    assert told["dynamic"]["dynakv"]["paper"] == "arXiv:2603.04411" and "dynakv" not in told["methods"]


def test_methods_without_json():
    out = done("methods").out
    assert [
        name for name in (*METHODS, *RANK_ALLOCATORS, "dynakv", "lowkey dynamic") if name not in out
    ] == []


def test_methods_says_what_a_method_starts_from_and_what_an_error_budget_bounds():
    told = printed("methods")
    assert {told["methods"]["stiefattention"][name] for name in ("allocator", "layout", "ranks")} == {
        *("weighted-pareto", "pre_rope", "50%,60%,70%,80%,90%")
    }
    assert (
        "weight" in told["allocators"]["weighted-pareto"]["bounds"]
        and "tail" in told["allocators"]["tail"]["bounds"]
    )
    assert "largest error of a layer" in " ".join(done("methods").out.split())


def test_compress_takes_ranks_and_an_error_budget(model, here):
    words = (
        "compress",
        model,
        "out",
        *SMALL[2:],
        "--method",
        "pca",
        "--allocator",
        "uniform",
        "--error-budget",
        "0.9",
        "--ranks",
        "25%,7",
    )
    told = printed(*words)
    assert told["profile"]["ranks"] == [4, 7, 16] and told["budget"] == "error 0.9"
    assert set(told["profile"]["bounded"]) == {"what", "error", "budget", "reached"}


def test_profile_writes_the_surface_and_two_plots(here):
    short = pico.save(here / "short", max_position_embeddings=32)  # and so are its windows
    words = ("profile", short, "--method", "pca", "--windows", 4, "-o", "profile")
    told = printed(*words)
    assert told.items() <= json.loads((here / "profile" / "profile.json").read_text()).items()
    assert told["layers"] == [0, 1, 2] and len(told["surface"]) == 3
    for name in ("surface.png", "spectra.png"):
        assert (here / "profile" / name).read_bytes().startswith(b"\x89PNG")


# -- heads and policies


def test_heads_writes_a_file_and_says_what_it_holds(here):
    told = printed(
        "heads", "tiny", "-o", "heads.json", "--kind", "er", "--cases", 10, "--context", 200, "--seed", 3
    )
    assert (told["heads"], told["kind"], told["task"], told["drawn"], told["seed"]) == (
        "heads.json",
        "er",
        "recall",
        10,
        3,
    )
    assert json.loads((here / "heads.json").read_text())["values"] and told["accepted"] >= 10
    ran = done("heads", "tiny", "-o", "other.json", "--task", "facts", "--cases", 10, "--context", 600)
    assert "other.json: 10 of 10 cases right" in ran.out and "KV head" in ran.out


def test_heads_replaces_a_file_only_when_told_to(here):
    command = ("heads", "tiny", "-o", "notes.txt", "--kind", "copy", "--cases", 10, "--context", 200)
    for more in ([], ["--force"]):
        assert "'notes.txt' is there, and lowkey did not write it" in refused(*command, *more)
    assert (here / "notes.txt").read_text() == "mine"
    command = [word if word != "notes.txt" else "heads.json" for word in command]
    done(*command)
    assert "'heads.json' already exists; choose another name or pass --force" in refused(*command)
    done(*command, "--force")
    assert json.loads((here / "heads.json").read_text())["kind"] == "copy"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--kind", "r3"), "kind 'r3' is unknown"),
        (("--task", "riddle"), "task 'riddle' is unknown"),
        (("--cases", 3), "cases 3"),
        (("--context", 99999), "context 99999: the model reads 1280 tokens at most"),
        (("--haystack", "notes.txt"), "data: "),
        (("--haystack", "none.txt"), "haystack 'none.txt': no such file"),
        (
            ("--task", "comparison", "--cases", 10, "--context", 500),
            "task 'comparison': 0 of 10 cases answered right",
        ),
    ],
)
def test_heads_that_cannot_be_measured_are_refused(here, words, says):
    before = tree(here)
    assert says in refused("heads", "tiny", *words)
    assert tree(here) == before


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Head scores of `tiny`."""
    place = tmp_path_factory.mktemp("heads") / "r2.json"
    done("heads", "tiny", "-o", place, "--task", "facts", "--cases", 12, "--context", 400)
    return place


def test_eval_has_a_row_for_each_policy_and_budget(here, scores):
    words = (
        "--policy",
        "ada-kv,headkv-r2",
        "--budget",
        "6%,40 tokens",
        "--heads",
        scores,
        "-O",
        "sinks=1",
        "-O",
        "recent=4",
    )
    told = printed("eval", "tiny", *words, "--task", "recall", "--cases", 6, "--context", 256, "--bits", 4)
    rows = told["rows"]
    assert [r["name"] for r in rows] == [
        "full",
        "ada-kv 6%",
        "ada-kv 40 tokens",
        "headkv-r2 6%",
        "headkv-r2 40 tokens",
        "int4",
    ]
    assert (
        set(ROW) <= set(rows[1])
        and rows[1]["policy"]["allocator"]["name"] == "ada"
        and rows[1]["budget"] == "6%"
    )
    for row in rows[1:5]:
        assert (
            row["bytes_held"] == row["bytes_predicted"] < 0.2 * row["bytes_full"]
            and row["layer_error"] is None
        )
        tokens = 0.06 * 256 if row["budget"] == "6%" else 40
        assert sum(map(sum, row["kept_per_head"])) == round(24 * tokens)
    assert len({tuple(map(tuple, r["kept_per_head"])) for r in rows[1:5]}) == 4
    assert rows[2]["exact_match"] >= 0.5
    assert told["environment"]["data"]["refeed"] is True


def test_policies_go_on_top_of_a_plan(model, plan, here):
    told = printed(
        "eval",
        model,
        "--plan",
        plan,
        "--policy",
        "snapkv,kvzip",
        "--budget",
        "50%",
        "--task",
        "perplexity",
        "--windows",
        2,
        "--context",
        64,
    )
    full, low, *both = [r for r in told["rows"] if r["bits"] is None]
    for row in both:
        assert row["plan"] == str(plan) and row["policy"] and " on " in row["name"]
        assert row["bytes_held"] == row["bytes_predicted"] < low["bytes_held"] < full["bytes_held"]


def test_generate_over_a_policy_says_what_is_held(here):
    told = printed(
        "generate",
        "tiny",
        "--prompt",
        "It was a dark night. " * 20,
        "--policy",
        "kvzip",
        "--budget",
        "30%",
        "--tokens",
        8,
    )
    assert told["new_tokens"] == 8 and told["bytes_held"] < 0.5 * told["bytes_full"]


def test_fastgen_needs_no_budget(here):
    told = printed(
        "generate",
        "tiny",
        "--prompt",
        "It was a dark night. " * 10,
        "--policy",
        "fastgen",
        "-O",
        "recovery=0.5",
        "--tokens",
        2,
    )
    assert 0 < told["bytes_held"] < told["bytes_full"]


def test_policies_are_listed(here):
    told = printed("policies")
    assert {"snapkv", "pyramidkv", "ada-kv", "headkv-r2", "h2o", "kvzip"} <= set(told["policies"])
    assert told["policies"]["ada-kv"]["allocator"]["name"] == "ada" and "headkv" in told["allocators"]
    assert "arXiv:2404.14469" in done("policies").out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--policy", "snapvk", "--budget", "5%"), "did you mean 'snapkv'"),
        (("--policy", "snapkv"), "needs a budget"),
        (("--policy", "fastgen,snapkv"), "needs a budget"),
        (("--budget", "5%"), "give --policy too"),
        (("--policy", "snapkv", "--budget", "1%"), "do not hold the 4 sinks and 8 recent"),
        (("--policy", "snapkv", "--budget", "150%"), "150%"),
        (("--policy", "snapkv", "--budget", "banana"), "banana"),
        (
            ("--policy", "headkv-r2", "--budget", "10%"),
            "lowkey heads MODEL --kind r2 --out r2.json`, then pass --heads r2.json",
        ),
        (
            ("--policy", "razor", "--budget", "10%"),
            "--kind induction --out induction.json` and `lowkey heads MODEL --kind echo",
        ),
        (("--policy", "headkv-r2", "--budget", "10%", "--heads", "notes.txt"), "notes.txt"),
        (("--policy", "headkv-r2", "--budget", "10%", "--heads", "none.json"), "none.json"),
        (("--policy", "snapkv", "--budget", "10%", "-O", "windw=3"), "windw"),
        (("--policy", "snapkv", "--budget", "10%", "-O", "window=x"), "window"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(here, words, says):
    before = tree(here)
    assert says in refused("eval", "tiny", *words, "--task", "recall", "--out", "r.json")
    assert tree(here) == before


def test_another_models_head_scores_are_refused(model, scores, here):
    assert "made for" in refused(
        "eval", model, "--policy", "headkv-r2", "--budget", "50%", "--heads", scores, "--out", "r.json"
    )


# -- recover and export


@pytest.fixture(scope="module")
def halved(model, tmp_path_factory):
    """A plan that merges every two KV heads in a form that a plain checkpoint can have."""
    folder = tmp_path_factory.mktemp("halved")
    done("compress", model, folder / "plan", *SMALL, *BARE, "--method", "kv-head-svd", "-O", "keys=commuting")
    return folder / "plan"


def test_export_writes_a_plain_checkpoint_with_half_the_kv_heads(model, halved, here):
    told = printed("export", model, halved, "out")
    assert told == {"model": "out", "format": "hf"}
    config = json.loads((here / "out" / "config.json").read_text())
    assert config["num_key_value_heads"] == 2
    assert "--force" in refused("export", model, halved, "out")


def test_export_refuses_other_plans_and_formats(model, made, halved, here):
    assert "--sinks 0 --recent 0" in refused("export", model, made[0], "out")
    done("compress", model, "bare", *SMALL, *BARE)
    assert "commuting" in refused("export", model, "bare", "out")
    assert "hf" in refused("export", model, halved, "out", "--format", "gguf")


def test_recover_writes_a_model_and_its_plan(model, halved, here):
    told = printed(
        "recover", model, halved, "better", "--stages", "distill=1,ce=2", "--length", 16, "--batch", 2
    )
    written = json.loads((here / "better" / "losses.json").read_text())["losses"]
    assert told["steps"] == 3 and len(written) == 3
    assert [(s["objective"], s["first"], s["last"]) for s in told["stages"]] == [
        ("distill", written[0]["loss"], written[0]["loss"]),
        ("ce", written[1]["loss"], written[2]["loss"]),
    ]
    assert told["held_out"].keys() == {"full", "before", "after"}
    again = printed(
        "generate", "better", "--prompt", "Once upon a time", "--plan", "better/plan", "--tokens", 3
    )
    assert again["bytes_held"] < again["bytes_full"]
    assert not list(here.glob("*.partial")), "nothing is left of the work"


def test_recover_takes_the_settings_of_kv_latent(model, halved, here):
    """arXiv:2507.11273: two stages with rates of their own, attention in full, adapters on the feed-forward
    maps, KL at 10.
    """
    words = (
        "--stages",
        "distill=1:1e-3,kl=1:2e-5",
        "--full",
        "self_attn.*",
        "--lora",
        "mlp.*",
        "--temperature",
        10,
        "--eps",
        2e-4,
    )
    told = printed("recover", model, halved, "better", *words, "--length", 16, "--batch", 2)
    about = json.loads((here / "better" / "plan" / "plan.json").read_text())["provenance"]["recovered"][
        "settings"
    ]
    assert (about["stages"], about["lrs"], about["temperature"]) == (
        [["distill", 1], ["kl", 1]],
        [1e-3, 2e-5],
        10,
    )
    assert (about["full"], about["lora"], about["eps"]) == (["self_attn.*"], ["mlp.*"], 2e-4) and told[
        "exact"
    ] is False


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--stages", "ce"], "name=steps"),
        (["--stages", "sft=3"], "sft"),
        (["--stages", "ce=0"], "at least 1"),
        (["--stages", "ce=3:fast"], "rates are numbers"),
        (["--full", "attn"], "matches no linear layer"),
        (["--lr", "-1"], "lr"),
    ],
)
def test_bad_arguments_of_recover(model, halved, here, words, says):
    assert says in refused("recover", model, halved, "better", *words)


# -- a rank for every token

LEVELLED = (
    "--layout",
    "pre_rope",
    "--key-bases",
    "per_head",
    "--steps",
    2,
    "--windows",
    8,
    "--context",
    32,
    "--seed",
    3,
)


@pytest.fixture(scope="module")
def levelled(model, tmp_path_factory):
    """(dynamic plan folder, what `dynamic --json` printed)."""
    out = tmp_path_factory.mktemp("levelled") / "plan"
    return out, printed("dynamic", model, out, "--budget", "40%", *LEVELLED)


def test_dynamic_prints_the_plan_it_wrote(model, levelled):
    out, told = levelled
    held = DynamicPlan.load(out, loading.load(str(model), device="cpu")[0])
    assert (told["plan"], told["method"], told["budget"], told["layout"]) == (
        str(out),
        "dynakv",
        "40%",
        "pre_rope",
    )
    assert (
        held.training["target"],
        held.training["steps"],
        held.training["seed"],
        held.provenance["seed"],
    ) == (0.4, 2, 3, 3)
    assert held.provenance["tokens"] == 8 * 32 and held.factors[0].k_down.shape[0] == 4, (
        "a key basis for each head"
    )
    assert held.share == told["share"] <= 0.4 + 1e-6
    assert told["bytes_per_token"]["bfloat16"] == 3 * (held.share * 2 * 4 * 16 * 2 + 4)
    assert printed("inspect", out) == told
    said = done("inspect", out).out
    assert "16, 8, 4 or 2 of 16" in said and f"{100 * held.share:.1f}%" in said and str(out) in said


def test_eval_measures_a_dynamic_plan_beside_others(model, made, levelled, here):
    words = ("--windows", 2, "--context", 192, "--cases", 1, "--task", "perplexity,layers,recall")
    rows = printed("eval", model, "--plan", levelled[0], "--plan", made[0], *words, "--out", "r.json")["rows"]
    assert [r["name"] for r in rows] == ["full", "dynakv 40%", "pca 50%", "int8", "int4"]
    row = rows[1]
    assert (row["method"], row["plan"], row["budget"], row["layout"]) == (
        "dynakv",
        str(levelled[0]),
        "40%",
        "pre_rope",
    )
    loaded, tokenizer = loading.load(str(model), device="cpu")
    plan = DynamicPlan.load(levelled[0], loaded)
    ids = text.windows(text.encode(tokenizer, text.embedded_text("evaluation")), tokenizer, 192, "data")[:2]
    with torch.no_grad():
        scores = loaded(ids, past_key_values=make_dynamic_cache(loaded, plan)).logits[:, :-1]
        loaded(ids[:1], past_key_values=(past := make_dynamic_cache(loaded, plan)))
    assert row["perplexity"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(scores.mT, ids[:, 1:]).exp()), rel=1e-4
    )
    assert (
        row["bytes_held"]
        == row["bytes_predicted"]
        == past.nbytes()
        < rows[0]["bytes_held"]
        == row["bytes_full"]
    )
    assert row["layer_error"] > 0 and row["exact_match"] is not None
    assert "dynakv 40%" in (done("report", "r.json", "-o", "page.html") and (here / "page.html").read_text())


def test_generate_over_a_dynamic_plan(model, levelled):
    told = printed("generate", model, "--prompt", "Once upon a time", "--plan", levelled[0], "--tokens", 5)
    loaded, tokenizer = loading.load(str(model), device="cpu")
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    past = make_dynamic_cache(loaded, DynamicPlan.load(levelled[0], loaded))
    assert told["text"] == tokenizer.decode(pico.generate(loaded, ids, 5, past)[0], skip_special_tokens=True)
    assert told["bytes_held"] == past.nbytes() < told["bytes_full"]


@pytest.mark.parametrize(
    "words, says",
    [
        (["--budget", "64 KiB/token"], ["budget 64 KiB/token", "mean share", "50%"]),
        (["--budget", "512 tokens"], ["budget 512 tokens", "50%"]),
        (["--budget", "0.5"], ["budget '0.5'", "50%"]),
        (["--budget", "10%"], ["budget of 10%", "2 of 16", "12.5%"]),
        (["--layout", "rope"], ["layout 'rope'", "did you mean 'pre_rope'?"]),
        (["--key-bases", "own"], ["key bases 'own'", "shared, per_head"]),
        (["--steps", -1], ["steps -1", "at least 0"]),
        (["--windows", 3], ["windows 3", "at least 4"]),
        (["--context", 4], ["context 4", "at least 8"]),
        (["--calibration", "none.txt"], ["none.txt", "no such file"]),
        (["--dtype", "banana"], ["dtype 'banana'", "bfloat16"]),
    ],
    ids=str,
)
def test_bad_arguments_of_dynamic(model, here, words, says):
    before = tree(here)
    line = refused("dynamic", model, "out", *words)
    assert [s for s in says if s not in line] == []
    assert tree(here) == before


def test_dynamic_replaces_a_folder_only_when_told_to(model, levelled, here):
    shutil.copytree(levelled[0], here / "out")
    before = tree(here)
    assert "--force" in refused("dynamic", model, "out", *LEVELLED)
    assert tree(here) == before
    assert "KL" in done("dynamic", model, "out", *LEVELLED, "--force").out
    assert DynamicPlan.load(here / "out").budget == "50%"


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "--bits", "int4", "--plan"],
        ["eval", "--policy", "snapkv", "--budget", "50%", "--plan"],
        ["generate", "--prompt", "a", "--bits", "int4", "--plan"],
        ["generate", "--prompt", "a", "--policy", "snapkv", "--budget", "50%", "--plan"],
        ["recover"],
        ["export"],
    ],
    ids=lambda w: " ".join(w[:3]),
)
def test_what_a_dynamic_plan_cannot_do_is_refused(model, levelled, here, words):
    before = tree(here)
    line = refused(words[0], model, *words[1:], levelled[0], *([] if "--plan" in words else ["out"]))
    assert (
        f"plan {str(levelled[0])!r}" in line
        and "only eval and generate" in line
        and "lowkey compress" in line
    )
    assert tree(here) == before


@pytest.mark.parametrize("words", [["eval"], ["generate", "--prompt", "a"]], ids=lambda w: w[0])
def test_another_models_dynamic_plan_is_refused(other, levelled, here, words):
    assert "was made for model" in refused(words[0], other, *words[1:], "--plan", levelled[0])


@pytest.mark.parametrize("command", ["inspect", "eval", "generate"])
def test_a_damaged_dynamic_plan(model, here, levelled, command):
    folder = Path(shutil.copytree(levelled[0], here / "plan"))
    truncate(folder / dynamic.DYNAMIC_PLAN_TENSORS)
    words = {
        "inspect": [folder],
        "eval": [model, "--plan", folder],
        "generate": [model, "--prompt", "a", "--plan", folder],
    }[command]
    line = refused(command, *words)
    assert str(folder) in line and "damaged" in line


# -- numbers beyond the model


@pytest.mark.parametrize(
    "words, says",
    [
        (
            ["generate", "--prompt", "abc", "--tokens", 2000],
            ["tokens 2000", "512 positions", "give at most 509"],
        ),
        (
            ["generate", "--prompt", "abc" * 200, "--tokens", 1],
            ["tokens 1", "512 positions", "a shorter prompt"],
        ),
        (
            ["generate", "--prompt", "abc", "--tokens", 10**20],
            ["tokens 100000000000000000000", "at most 16777216"],
        ),
        (
            ["eval", "--task", "recall", "--context", 512],
            ["context 512", "512 positions", "another task than recall"],
        ),
        (["eval", "--context", 513], ["context 513", "512"]),
        (["compress", "out", "--context", 513], ["context 513", "512 positions"]),
        (["dynamic", "out", "--context", 513], ["context 513", "512 positions"]),
        (["convert", "out", "--attention", "mha", "--context", 513], ["context 513", "512 positions"]),
        (["heads", "--kind", "copy", "--context", 513], ["context 513", "512 tokens at most"]),
        (["heads", "--kind", "echo", "--context", 513], ["context 513", "512 tokens"]),
    ],
    ids=str,
)
def test_more_than_the_model_has_positions_for(model, here, words, says):
    before = tree(here)
    line = refused(words[0], model, *words[1:])
    assert all(word in line for word in says), line
    assert tree(here) == before


# -- options that would do nothing


@pytest.mark.parametrize(
    "words, says",
    [
        (["heads", "--kind", "echo", "--task", "recall"], ["task 'recall'", "kind 'echo'", "leave it out"]),
        (
            ["heads", "--kind", "induction", "--haystack", "notes.txt"],
            ["haystack 'notes.txt'", "kind 'induction'"],
        ),
        (["generate", "--prompt", "a", "-O", "recent=4"], ["option 'recent=4'", "--policy"]),
        (["generate", "--prompt", "a", "-A", "alpha=0"], ["allocator option 'alpha=0'", "--policy"]),
        (["generate", "--prompt", "a", "--heads", "notes.txt"], ["heads 'notes.txt'", "--policy"]),
        (["eval", "--budget", "10%"], ["budget '10%'", "--policy"]),
        (["eval", "--heads", "notes.txt"], ["heads 'notes.txt'", "--policy"]),
        (["compress", "out", "-O", "epochs=1", "-O", "epochs=2"], ["epochs is given twice"]),
        (
            ["compress", "out", "-A", "step=0.1", "--allocator", "greedy"],
            ["option 'step'", "allocator 'greedy'", "none"],
        ),
        (
            ["compress", "out", "--allocator", "threshold", "-A", "step=nan"],
            ["option step='nan'", "finite number"],
        ),
        (
            ["convert", "out", "--attention", "mha", "--calibration", "notes.txt"],
            ["calibration 'notes.txt'", "--whiten"],
        ),
    ],
    ids=str,
)
def test_options_that_would_do_nothing_are_refused(model, here, monkeypatch, words, says):
    monkeypatch.setattr(loading, "load", lambda *given: pytest.fail("loaded"))
    line = refused(words[0], model, *words[1:])
    assert all(word in line for word in says), line


def test_options_of_allocators_reach_them(model, here):
    words = [
        "--method",
        "eigenattention",
        "--windows",
        8,
        "--context",
        32,
        "--error-budget",
        0.5,
        "--allocator",
        "threshold",
    ]
    plan = printed("compress", model, "plan", *words, "-A", "energy=singular", "-A", "step=0.1")
    assert plan["allocator"] == {"name": "threshold", "parameters": {"step": 0.1, "energy": "singular"}}
    told = done("inspect", "plan").out
    assert (
        "step=0.1 (default 0.02" in told
        and "energy=singular (default squared, one of squared, singular)" in told
    )
    line = refused(
        "generate", model, "--prompt", "a", "--policy", "pyramidkv", "--budget", "50%", "-A", "beta=0"
    )
    assert "option beta='0' of the allocator of policy 'pyramidkv': must be at least 1" in line


def test_ranges_and_defaults_are_shown():
    """The same declarations everywhere: in help, in lists, and as JSON."""
    assert "kl=0.25 (at least 0 and at most 1)" in done("methods").out
    assert printed("methods")["methods"]["kq-svd"]["ranges"]["ridge"] == "at least 0 and at most 1"
    assert printed("methods")["allocators"]["threshold"]["ranges"]["energy"] == "one of squared, singular"
    assert "kernel=7 (odd, at least 1 and at most 4095)" in done("policies").out
    assert printed("policies")["policies"]["curdkv"]["ranges"]["kind"] == "one of keys, values, product"
    assert "at least 4 and at most 1048576" in " ".join(done("compress", "--help").out.split())
