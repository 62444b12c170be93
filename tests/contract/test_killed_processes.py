"""Processes that are killed at any moment leave whole files, and the same command then ends as usual."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch

import lowkey
from lowkey.cli import app
from lowkey.core import files
from lowkey.heads.scores import HeadScores
from lowkey.plan.plan import Plan

# what forks may say in a process with threads
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def child(act: Callable[[], object]) -> int:
    """The number of a process that does it."""
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        act()
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def done(act: Callable[[], object], within: float = 120) -> float:
    """Seconds that it took in a process of its own, in which it must end well."""
    number, start = child(act), time.monotonic()
    while time.monotonic() - start < within:
        ended, status = os.waitpid(number, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0
            return time.monotonic() - start
        time.sleep(0.002)
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    raise AssertionError("it did not end")


def killed(act: Callable[[], object], after: float) -> bool:
    """Whether it was still running when it was killed."""
    number = child(act)
    time.sleep(after)
    os.kill(number, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(number, 0)[1])


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.name.endswith(".tmp") or p.name.endswith(".partial")]


# -- saves


def _plan(path: Path, n: int) -> None:
    pico.plan(pico.stock("llama"), 4 + n, 6).save(path, force=True)


def _cache(path: Path, n: int) -> None:
    cache = lowkey.make_cache(pico.attached("llama"))
    pico.feed(pico.attached("llama"), pico.prompt(4 + n), cache)
    cache.save(path, force=True)


def _heads(path: Path, n: int) -> None:
    HeadScores(
        "copy", "recall", torch.full((12, 3, 8), 0.5).double(), (0, 1, 2), 4, 40, "m", "0", "0", n, {}
    ).save(path)


def _tensors(path: Path, n: int) -> None:
    files.write_tensors(path, {"a": torch.full((1000,), n)}, "work")


SAVES = {  # name: (save the n-th version, which version is there)
    "plan": (_plan, lambda path: Plan.load(path).ranks[0][0] - 4),
    "cache": (_cache, lambda path: lowkey.load_cache(path, pico.attached("llama")).get_seq_length() - 4),
    "heads": (_heads, lambda path: HeadScores.load(path).seed),
    "tensors": (_tensors, lambda path: int(files.read_tensors(path, "x", "work")["a"][0])),
}


def kill_a_save(kind: str, folder: Path, after: float) -> None:
    """Two versions take turns without end until the kill."""
    save, version = SAVES[kind]
    path = folder / kind
    path.parent.mkdir(exist_ok=True)
    save(path, 0)

    def forever() -> None:
        for n in itertools.cycle((1, 0)):
            save(path, n)

    assert killed(forever, after)
    assert version(path) in (0, 1)
    save(path, 2)
    assert version(path) == 2 and leftovers(folder) == []


@pytest.mark.parametrize("kind", SAVES)
def test_a_killed_save_leaves_a_whole_version(tmp_path, kind):
    r = random.Random(kind)
    for _ in range(3):
        kill_a_save(kind, tmp_path, r.uniform(0.0, 0.08))


@pytest.mark.parametrize("kind", ["plan", "cache"])
def test_a_killed_save_is_whole_without_atomic_exchange(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("lowkey.core.files.atomic.exchange", lambda a, b: False)
    r = random.Random(kind)
    for _ in range(3):
        kill_a_save(kind, tmp_path, r.uniform(0.0, 0.08))


# -- commands

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it " * 60
RECIPE = """
[model]
hidden_size = 16
intermediate_size = 16
num_hidden_layers = 1
num_attention_heads = 2
[data]
path = "text.txt"
vocab_size = 260
[training]
tokens = 1024
batch_tokens = 64
length = 16
save_every = 3
precision = "fp32"
"""
SMALL = ["--windows", "8", "--context", "24", "--calibration", "text.txt"]
COMMANDS = {  # with the files that must be the same after a kill
    "compress": (["compress", "model", "OUT", *SMALL], ["plan.json", "plan.safetensors", "README.md"]),
    "dynamic": (
        ["dynamic", "model", "OUT", "--steps", "5", *SMALL],
        ["plan.json", "plan.safetensors", "README.md"],
    ),
    "recover": (
        [
            "recover",
            "model",
            "plan",
            "OUT",
            "--stages",
            "kl=6",
            "--length",
            "16",
            "--rank",
            "2",
            "--calibration",
            "text.txt",
        ],
        ["model.safetensors", "losses.json", "plan/plan.json"],
    ),
    "pretrain": (
        ["pretrain", "r.toml", "-o", "OUT", "--device", "cpu"],
        ["model.safetensors", "config.json", "recipe.toml"],
    ),
    "convert": (
        ["convert", "model", "OUT", "--attention", "mqa", "--context", "32", "--windows", "2"],
        ["convert.json", "model.safetensors"],
    ),
    "export": (["export", "model", "halved", "OUT"], ["model.safetensors", "config.json"]),
    "profile": (
        ["profile", "model", "-o", "OUT", "--windows", "4", "--calibration", "text.txt"],
        ["profile.json"],
    ),
    "diversity": (
        ["diversity", "model", "-o", "OUT", "--context", "16", "--windows", "1", "--inits", "1"],
        ["diversity.json"],
    ),
    "eval": (
        ["eval", "model", "--out", "OUT", "--task", "perplexity", "--context", "16", "--windows", "2"],
        [""],
    ),
    "report": (["report", "result.json", "-o", "OUT"], [""]),
}


def command(name: str, out: str) -> Callable[[], None]:
    def act() -> None:
        sys.argv = ["lowkey", *(out if word == "OUT" else word for word in COMMANDS[name][0])]
        app.main()

    return act


def same(name: str, a: Path, b: Path) -> bool:
    if name == "eval":
        rows = [files.read_json(p, "result", "result", 1)["rows"] for p in (a, b)]
        return [r["perplexity"] for r in rows[0]] == [r["perplexity"] for r in rows[1]]
    return all((a / part).read_bytes() == (b / part).read_bytes() for part in COMMANDS[name][1])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pico.save(tmp_path / "model", max_position_embeddings=64)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "r.toml").write_text(RECIPE)
    done(
        lambda: [
            sys.argv.__setitem__(slice(None), ["lowkey", "compress", "model", "plan", *SMALL]),
            app.main(),
        ]
    )
    way = ["--method", "kv-head-svd", "-O", "keys=commuting", "--budget", "50%"]
    done(
        lambda: [
            sys.argv.__setitem__(slice(None), ["lowkey", "compress", "model", "halved", *way, *SMALL]),
            app.main(),
        ]
    )
    row = {"name": "full", "bytes_held": 2, "bytes_full": 2, "perplexity": 3.0}
    files.write_json(
        tmp_path / "result.json", {"format": 1, "model": "m", "environment": {}, "rows": [row]}, "result"
    )
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_commands_and_saves_killed_at_forty_moments(here):
    r, took, late = random.Random(0), {}, 0
    for name in COMMANDS:
        took[name] = done(command(name, f"straight-{name}"))
    for n in range(40):
        name = r.choice([*COMMANDS, *SAVES])
        if name in SAVES:
            kill_a_save(name, here / f"save-{n}", r.uniform(0, 0.3))
            continue
        out = f"out-{n}-{name}"
        for _ in range(r.choice([1, 2])):
            late += not killed(command(name, out), r.uniform(0, took[name]))
        if not (here / out).exists() or name == "pretrain":
            done(command(name, out))
        assert same(name, here / f"straight-{name}", here / out), (n, name)
        assert not [p for p in leftovers(here) if name in p], (n, name)
    assert late < 30
