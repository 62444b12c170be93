"""`lowkey eval` on two processes, started as `accelerate launch` starts them, measures what one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import done, printed

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
pytestmark = pytest.mark.timeout(600)  # each starts processes that load torch
TIMES = ("prefill_ms", "step_ms")
EVERYTHING = "perplexity,decode,layers,recall,questions,speed"
TASKS = (
    "--task",
    EVERYTHING,
    "--windows",
    3,
    "--context",
    192,
    "--cases",
    3,
    "--questions",
    2,
    "--bits",
    "int8",
)
POLICY = ("--policy", "snapkv", "--budget", "60%", "-O", "recent=4")
# Runs the command; process 1 ends itself by SIGKILL once so many of its measurements are saved.
DYING = """
import os, signal, sys
from lowkey.core.files import measured

measured.SECONDS_BETWEEN_WRITES, left = 0.0, int(sys.argv.pop(1))
write = measured.Measured.write

def dying(self):
    global left
    write(self)
    left -= 1
    if os.environ["RANK"] == "1" and left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

measured.Measured.write = dying
import lowkey_start
lowkey_start.main()
"""


def on_two(*words: object, launch: tuple = ("-m", "lowkey")) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*LAUNCH, "--main_process_port", "0", *map(str, launch), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=560,
    )


def rows(result: dict) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in result["rows"]]


def lines(ran: subprocess.CompletedProcess) -> list[str]:
    return [line for line in ran.stderr.splitlines() if line.startswith("lowkey: ")]


@pytest.fixture(scope="module")
def one(model, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("one") / "one.json"
    return printed("eval", model, *TASKS, *POLICY, "--out", out)


def test_two_processes_measure_what_one_does(model, one, here):
    ran = on_two("eval", model, *TASKS, *POLICY, "--out", "two.json", "--json")
    assert ran.returncode == 0, ran.stderr
    two = json.loads(ran.stdout)  # one object: only the main process prints
    assert rows(two) == rows(one) and all(row["step_ms"] > 0 for row in two["rows"])
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    assert ran.stderr.count("result written to two.json") == 1
    written = json.loads((here / "two.json").read_text())
    assert written["rows"] == two["rows"]
    assert sorted(p.name for p in here.iterdir()) == ["notes.txt", "two.json"]


def test_a_killed_process_ends_all_and_one_goes_on(model, one, here):
    """What both processes had saved counts for the single one that goes on."""
    words = ("eval", model, *TASKS, *POLICY, "--out", "killed.json")
    worker = here / "worker.py"
    worker.write_text(DYING)
    ran = on_two(*words, launch=(worker, 6))
    assert ran.returncode != 0 and not (here / "killed.json").exists()
    assert "Signal 9" in ran.stderr or str(-signal.SIGKILL) in ran.stderr
    saved = [
        json.loads(p.read_text())["measured"] for p in here.glob("killed.json.partial/*/measured-1.json")
    ]
    assert len(saved) == 1 and len(saved[0]) >= 6
    done(*words)
    assert rows(json.loads((here / "killed.json").read_text())) == rows(one)
    assert not Path("killed.json.partial").exists()


@pytest.mark.parametrize(
    "words, told",
    [
        (("--context", "100000"), "context 100000"),
        (("--windowss", "3"), "windowss"),
    ],
    ids=["in the work", "an option"],
)
def test_what_fails_everywhere_is_told_in_one_line(model, words, told, here):
    ran = on_two("eval", model, *words)
    assert ran.returncode != 0 and ran.stdout == ""
    assert len(lines(ran)) == 1 and told in lines(ran)[0]
