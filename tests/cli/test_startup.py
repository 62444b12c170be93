"""Thread settings that are made before torch is loaded, and the version."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from commands import lowkey

from lowkey import __version__
from lowkey.cli.loading import quiet_libraries

LOGGERS = {"backends.numba_cache": True, "conversion.convert": False}  # whether a command lets them warn

# The start of a command with torch alone behind it; OpenMP then prints what it was told.
START = """
import sys, types
sys.modules["lowkey"] = types.ModuleType("lowkey")
sys.modules["lowkey.cli.app"] = cli = types.ModuleType("lowkey.cli.app")
cli.main = lambda: __import__("torch")
import lowkey_start
lowkey_start.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other builds of torch have another OpenMP")
@pytest.mark.parametrize(("given", "told"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_asleep_unless_told_otherwise(given, told):
    plain = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment = plain | {"OMP_DISPLAY_ENV": "TRUE"} | ({"OMP_WAIT_POLICY": given} if given else {})
    ran = subprocess.run(
        [sys.executable, "-c", START], env=environment, capture_output=True, text=True, check=True
    )
    assert f"OMP_WAIT_POLICY = '{told}'" in ran.stderr


def test_the_number_of_threads(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # the command sets them for this process; they are put back
    before = torch.get_num_threads()
    try:
        assert lowkey("--threads", 2, "methods", "--json").status == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_is_known_before_torch_is_loaded():
    """As a shell starts the command: torch reads the number when it is loaded."""
    start = (
        "import atexit, sys\n"
        "sys.argv = ['lowkey', '--threads', '2', 'methods', '--json']\n"
        "atexit.register(lambda: print(sys.modules['torch'].get_num_threads(), file=sys.stderr))\n"
        "import lowkey_start\n"
        "lowkey_start.main()\n"
    )
    ran = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=True)
    assert ran.stderr == "2\n"


@pytest.mark.parametrize("wrong", ["0", "-1", "1025", "x", "1.5"])
def test_a_number_of_threads_that_cannot_be(wrong):
    ran = lowkey("--threads", wrong, "methods")
    assert ran.status == 2 and wrong in ran.err and ran.err.count("\n") == 1


def test_commands_silence_libraries_but_not_a_long_compilation():
    quiet_libraries()
    said = {name: logging.getLogger(f"lowkey.{name}").isEnabledFor(logging.WARNING) for name in LOGGERS}
    assert said == LOGGERS


def test_the_version():
    assert lowkey("--version")[:2] == (0, f"lowkey {__version__}\n")
