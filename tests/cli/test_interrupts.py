"""Ctrl-C and failing output: the work is kept, no partial plan is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import pico
import pytest
from commands import SMALL, done, lowkey, refused, tree

from lowkey.methods import PCA


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
        assert "eval, heads, plan, recover and pretrain resume when the same command" in line
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
