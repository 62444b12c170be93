"""Where compiled kernels are kept between processes, and a word to the user while they are compiled.

numba keeps what it compiles beside a module, and takes it for fresh while that one file is unchanged. Our
kernels are made of several files, so they are kept in a folder named by a checksum of all of them. It lies in
NUMBA_CACHE_DIR if that is set, else beside the package, else in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Timer
from typing import Any

import numba

QUIET_SECONDS = 2.0  # seconds
HERE = Path(__file__).parent
logger = logging.getLogger(__name__)


@cache
def kernel_folder() -> Path | None:
    """The folder that compiled kernels are kept in; None if there is none that can be written to."""
    sources = b"".join(path.read_bytes() for path in sorted(HERE.glob("numba_*.py")))
    name = f"lowkey-kernels-{hashlib.sha256(sources).hexdigest()[:16]}"
    given = _settings().CACHE_DIR
    for parent in [Path(given)] if given else [HERE / "__pycache__", *_user_folders()]:
        try:
            (parent / name).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=parent / name).close()
        except OSError:
            continue
        return parent / name
    logger.warning(
        "compiled kernels cannot be kept: no folder for them can be written to; they are compiled again in "
        "every process, unless NUMBA_CACHE_DIR names one"
    )
    return None


def _user_folders() -> list[Path]:
    """The user's folders for caches, the preferred one first; none for a user without a home."""
    if own := os.environ.get("LOWKEY_HOME"):
        return [Path(own).expanduser().absolute()]
    try:
        usual = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    except RuntimeError:
        return []
    return [Path(os.environ.get("XDG_CACHE_HOME") or usual) / "lowkey"]


def _settings() -> Any:
    """numba's settings, a module that numba fills when it is imported."""
    return numba.config


@contextmanager
def _kept() -> Iterator[bool]:
    """Let functions that are declared inside be kept in our folder. Yields whether there is one."""
    folder, settings = kernel_folder(), _settings()
    before = settings.CACHE_DIR
    try:
        # numba asks for its folder when a function is declared, and other people's functions have theirs
        settings.CACHE_DIR = before if folder is None else str(folder)
        yield folder is not None
    finally:
        settings.CACHE_DIR = before


def kept_njit(**options: Any) -> Callable[[Callable], Any]:
    """As `numba.njit(**options)`, kept between processes."""

    def declare(function: Callable) -> Any:
        with _kept() as can_keep:
            return numba.njit(cache=can_keep, **options)(function)

    return declare


def kept_cfunc(signature: Any) -> Callable[[Callable], Any]:
    """As `numba.cfunc(signature)`, kept between processes."""

    def declare(function: Callable) -> Any:
        with _kept() as can_keep:
            try:
                return numba.cfunc(signature, cache=can_keep)(function)
            except OSError:  # the folder's disk may be full
                return numba.cfunc(signature)(function)

    return declare


@contextmanager
def telling(unfinished: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Say that kernels are being compiled, if what happens inside takes long.

    Args:
        unfinished: whether they still are; asked once, after QUIET_SECONDS seconds.
    """
    timer = Timer(QUIET_SECONDS, lambda: _say_once() if unfinished() else None)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@cache
def _say_once() -> None:
    place = kernel_folder()
    kept = "they cannot be kept" if place is None else f"they are kept in {place} for later processes"
    logger.warning("compiling attention kernels for this CPU; %s", kept)
