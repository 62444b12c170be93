"""kvpress's own environment, outside the tree: kvpress pins transformers below the version that lowkey needs.

    python benchmarks/kvpress/environment.py     # makes it if it is missing, and prints its Python

It lies in ~/.cache/lowkey/kvpress-VERSION, or under $XDG_CACHE_HOME, and takes 1.4 GB. Its torch is the very
build of the environment that runs this script, so that both sides compute with the same kernels, and a build
for the CPU stays one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import torch

PINNED = "0.5.5"
INSTALLED = "installed"  # a file that says that pip has finished
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"


def folder() -> Path:
    """Where the environment lies."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowkey" / f"kvpress-{PINNED}"


def python() -> Path:
    """The environment's Python; makes the environment if it is missing.

    Raises:
        SystemExit: it cannot be installed; one line says why.
    """
    place, build = folder(), str(torch.__version__)
    executable = place / "bin" / "python"
    if not (place / INSTALLED).exists():
        venv.create(place, with_pip=True)
        index = ["--extra-index-url", CPU_BUILDS] if build.endswith("+cpu") else []
        wanted = [f"kvpress=={PINNED}", f"torch=={build}"]
        pip = subprocess.run(
            [executable, "-m", "pip", "install", "--quiet", *index, *wanted], capture_output=True, text=True
        )
        if pip.returncode:
            last = (pip.stderr.strip().splitlines() or ["pip says nothing"])[-1]
            sys.exit(f"kvpress {PINNED} with torch {build} cannot be installed in {place}: {last}")
        (place / INSTALLED).touch()
    return executable


if __name__ == "__main__":
    print(python())
