"""Odd values for every option of every verb: exit status 2, one printable line, nothing written."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

import pico
import pytest

from lowkey.cli import app
from lowkey.core.printable import printable

ESCAPE = "\x1b]0;owned\x07"
NUMBERS = ["", "abc", "nan", "inf", "-1", "1.5", ESCAPE, "1" + "0" * 20, "9" * 5000]
RATES = ["", "abc", "nan", "inf", "-1", "1e400", ESCAPE]
WORDS = ["", "nosuch", ESCAPE, ":", "os:path", "a" * 3000]
PATHS = ["nosuch", "folder", "fifo", "binary", "empty", "/dev/zero", "a" * 300, ESCAPE]
BUDGETS = [
    "",
    "nosuch",
    "0%",
    "-1%",
    "101%",
    "nan%",
    "50",
    "9" * 400 + "%",
    "10000000000000000000 KiB/token",
    ESCAPE,
]
PAIRS = ["", "x", "=", "=1", "nosuch=1", f"{ESCAPE}=1"]

SAMPLE = {
    "--windows": NUMBERS,
    "--context": NUMBERS,
    "--seed": NUMBERS,
    "--calibration": PATHS,
    "--dtype": WORDS,
    "--device": WORDS,
}
METHOD = [
    "epochs=-1",
    "epochs=nan",
    "epochs=1e3",
    "lr=inf",
    "lr=nan",
    "lr=-1",
    "patience=-1",
    "key_bases=both",
]
POLICY = [
    f"{name}={value}"
    for name in ("sinks", "recent", "every", "window", "kernel")
    for value in ("-1", "nan", "x", "1" + "0" * 20)
]
VERBS: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "compress": (
        ["MODEL", "out"],
        {
            **SAMPLE,
            **{
                "--method": WORDS,
                "--budget": BUDGETS,
                "--error-budget": RATES,
                "--allocator": WORDS,
                "--layout": WORDS,
                "--judge": WORDS,
            },
            **{
                "--ranks": [*WORDS, "0", "-1", "0%", "200%"],
                "--rank-multiple": NUMBERS,
                "--sinks": NUMBERS,
                "--recent": NUMBERS,
            },
            **{"--heads": PATHS, "-O": PAIRS + METHOD, "-A": PAIRS},
        },
    ),
    "dynamic": (
        ["MODEL", "out"],
        {**SAMPLE, "--budget": BUDGETS, "--layout": WORDS, "--key-bases": WORDS, "--steps": NUMBERS},
    ),
    "profile": (["MODEL"], {**SAMPLE, "--context": [], "--method": WORDS, "--layout": WORDS, "-O": PAIRS}),
    "heads": (
        ["MODEL"],
        {
            "--kind": WORDS,
            "--task": WORDS,
            "--haystack": PATHS,
            "--cases": NUMBERS,
            "--context": NUMBERS,
            "--seed": NUMBERS,
        },
    ),
    "convert": (
        ["MODEL", "out", "--attention", "mha"],
        {
            "--heads": WORDS,
            "--basis": WORDS,
            "--frequencies": WORDS,
            "--data": PATHS,
            "--context": NUMBERS,
            "--windows": NUMBERS,
            "-O": PAIRS,
        },
    ),
    "diversity": (
        ["MODEL"],
        {"--data": PATHS, "--windows": NUMBERS, "--context": NUMBERS, "--inits": NUMBERS, "--seed": NUMBERS},
    ),
    "sinks": (["MODEL"], {"--data": PATHS, "--windows": NUMBERS, "--context": NUMBERS, "--seed": NUMBERS}),
    "generate": (
        ["MODEL", "--prompt", "abc", "--policy", "snapkv", "--budget", "50%"],
        {
            "--tokens": NUMBERS,
            "--bits": WORDS,
            "--budget": BUDGETS,
            "--policy": WORDS,
            "--plan": PATHS,
            "--heads": PATHS,
            "-O": PAIRS + POLICY,
        },
    ),
    "eval": (
        ["MODEL", "--policy", "ada-kv", "--budget", "50%"],
        {
            **{
                "--context": NUMBERS,
                "--windows": NUMBERS,
                "--cases": NUMBERS,
                "--seed": NUMBERS,
                "--task": WORDS,
                "--data": PATHS,
            },
            **{"--sinks": NUMBERS, "--recent": NUMBERS},
            **{
                "--budget": BUDGETS,
                "-O": PAIRS,
                "-A": [*PAIRS, "alpha=nan", "alpha=2"],
                "--plan": PATHS,
                "--heads": PATHS,
            },
        },
    ),
    "bench": (
        ["decode"],
        {
            **{
                name: [*NUMBERS, "999999999999"]
                for name in ("--context", "--head-dim", "--heads", "--kv-heads", "--repeats")
            },
            "--seed": NUMBERS,
            **{"--dtype": WORDS, "--budget": BUDGETS},
        },
    ),
    "bench step": (
        ["MODEL"],
        {
            **{name: [*NUMBERS, "1,,2", "8k" * 99] for name in ("--context", "--threads")},
            "--rounds": NUMBERS,
            "--settings": [
                *(word for word in WORDS if word),
                *("int4,", "+", "snapkv:", "full+full", "plan:", "plan:folder", "plan:" + "a" * 300),
                *(f"snapkv:{budget}" for budget in BUDGETS),
            ],
            **{"--dtype": WORDS, "--device": WORDS, "--heads": PATHS},
        },
    ),
    "recover": (
        ["MODEL", "nosuch", "out"],
        {"--stages": [*WORDS, "ce", "ce=0", "ce=-1", "ce=1e3", "ce=1,"], "--rank": NUMBERS, "--lr": RATES},
    ),
    "export": (["MODEL", "nosuch", "out"], {"--format": WORDS, "--dtype": WORDS}),
    "serve": (
        ["MODEL", "--dry-run"],
        {
            **dict.fromkeys(("--context", "--port", "--block"), NUMBERS),
            **dict.fromkeys(("--kernel", "--exact", "--dtype"), WORDS),
            "--memory": ["", "abc", "-1", "nan", "1e3", ESCAPE],
            "--host": ["", " ", ESCAPE],
            "--plan": PATHS,
            "-E": ["", "x", "=", "=1", f"{ESCAPE}=1", "--x=1", "port=1", "model=x"],
        },
    ),
    "inspect": ([], {"": PATHS}),
    "report": ([], {"": PATHS}),
    "pretrain": ([], {"": PATHS}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    pico.save(folder / "model", pad_token_id=None)
    for name, content in (("binary", b"\xff\x00" * 50), ("empty", b"")):
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    return folder


@pytest.mark.parametrize(
    ("verb", "option"),
    [(verb, option) for verb, (_, options) in VERBS.items() for option in options],
    ids=lambda x: x or "argument",
)
def test_odd_values_are_refused_in_one_line(place, monkeypatch, verb, option):
    monkeypatch.chdir(place)
    before = {p.name for p in place.iterdir()}
    base, options = VERBS[verb]
    for value in options[option]:
        words = [
            *verb.split(),
            *("model" if word == "MODEL" else word for word in base),
            *([option] if option else []),
            value,
        ]
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.object(sys, "argv", ["lowkey", *words]),
            redirect_stdout(out),
            redirect_stderr(err),
            pytest.raises(SystemExit) as exit,
        ):
            app.main()
        line = err.getvalue()
        assert (exit.value.code, out.getvalue(), len(line.splitlines())) == (2, "", 1), (value[:40], line)
        assert line.startswith("lowkey: ") and printable(line) == line, (value[:40], line)
    assert {p.name for p in place.iterdir()} == before
