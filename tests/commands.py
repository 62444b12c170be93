"""The command line as tests run it: in this process, with what it printed."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from lowkey.cli import app

SMALL = ("--method", "pca", "--windows", 8, "--context", 32)
BARE = ("--sinks", 0, "--recent", 0)
SCORE = ("--windows", 2, "--context", 192, "--cases", 1)
EVERYTHING = ("--task", "perplexity,layers,recall,speed")
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
    """Exit status and output of a command."""

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
    """Run a command that must succeed."""
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


def truncate(path: Path) -> None:
    """Cut the last 100 bytes off a file."""
    path.write_bytes(path.read_bytes()[:-100])
