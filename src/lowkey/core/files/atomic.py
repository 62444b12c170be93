"""Replaces files and folders in one step, so that a reader finds the old version or the new one, whole.

This also holds after a kill. What is being written lies in a *staging folder* beside its final name. The
folder stays locked as long as its writer lives. So what a killed process left can be told from work that goes
on, whatever the process ids are, and the next writer removes it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from lowkey.core.errors import LowkeyError

_T = TypeVar("_T")
OWN_FOLDER = ".lowkey"  # a file in each staging folder, since a folder of that name could be somebody else's
OLD_NAME, NEW_NAME = "old", "new"  # what staging folders call the old and the new version
LONGEST_PREFIX = 100  # bytes of the final name that the name of its staging folder repeats
FREE_NAME_TRIES = 300
# seconds before a reader tries again
PAUSES = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.1, 0.2, 0.2, 0.5, 0.5)
EXCHANGE = 2  # RENAME_EXCHANGE of Linux
# the errors of a system that cannot exchange two names
UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


@contextmanager
def new_folder_beside(path: Path) -> Iterator[Path]:
    """A new, locked staging folder beside `path`, which is removed when the block ends.

    Staging folders of writers that are dead are removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_interrupted(path, sweep=True)
    folder, lock = _locked(path)
    try:
        yield folder
    finally:
        try:
            _remove(folder)
        finally:
            os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a staging folder, its mark last: what a kill leaves of it is still known as ours."""
    with suppress(OSError):
        for child in folder.iterdir():
            if child.name != OWN_FOLDER:
                shutil.rmtree(child, ignore_errors=True) if child.is_dir() else child.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _locked(path: Path) -> tuple[Path, int]:
    """A new staging folder for `path`, and its lock.

    Until the lock is held, another writer may take the folder for abandoned and remove it; then another
    folder is made.
    """
    for _ in range(FREE_NAME_TRIES):
        folder = path.with_name(f".{_short(path.name)}.{secrets.token_hex(8)}.tmp")
        folder.mkdir()
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            if _holds(lock, folder):
                return folder, lock
            os.close(lock)
    raise OSError(errno.EBUSY, "others remove what is written", str(path))


def _holds(lock: int, folder: Path) -> bool:
    """Take the lock, and tell whether it is that of the folder that now has this name."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, on which nobody removes staging folders
        pass
    try:
        (folder / OWN_FOLDER).touch()
        return os.path.samestat(folder.stat(), os.fstat(lock))
    except FileNotFoundError:
        return False


def _short(name: str) -> str:
    return os.fsencode(name)[:LONGEST_PREFIX].decode(errors="ignore")


def staging_folders(path: Path) -> list[Path]:
    """The staging folders that writers of `path` have made beside it."""
    pattern = re.compile(rf"\.{re.escape(_short(path.name))}\.[0-9a-f]{{16}}\.tmp")
    with suppress(OSError):
        return [path.with_name(name) for name in os.listdir(path.parent) if pattern.fullmatch(name)]
    return []


def recover_interrupted(path: Path, sweep: bool = False) -> bool:
    """Give `path` back the old version if a writer was killed between two renames.

    Args:
        path: the final name.
        sweep: whether to remove what killed writers left.

    Returns:
        Whether a living writer is between two renames.
    """
    moving = False
    for folder in staging_folders(path):
        with _abandoned(folder) as dead:
            if not dead:
                # its writer has moved the old version here and not yet put the new one in its place
                moving |= (folder / OLD_NAME).exists()
                continue
            with suppress(OSError):
                if (folder / OLD_NAME).exists() and not os.path.lexists(path):
                    os.rename(folder / OLD_NAME, path)
                if sweep and ((folder / OWN_FOLDER).exists() or not any(folder.iterdir())):
                    _remove(folder)
    return moving


def is_staging_folder(path: Path) -> bool:
    """Whether this is a staging folder, for whatever name."""
    return (
        bool(re.fullmatch(r"\..+\.[0-9a-f]{16}\.tmp", path.name)) and path.is_dir() and not path.is_symlink()
    )


@contextmanager
def _abandoned(folder: Path) -> Iterator[bool]:
    """Whether the writer of a staging folder is dead, that is, nobody holds its lock.

    If so, the lock is held during the block.
    """
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # it has been removed, or is no folder of ours
        yield False
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True
    finally:
        os.close(lock)


def swap(new: Path, path: Path, folder: Path) -> None:
    """Give a new folder its final name.

    Args:
        new: the new folder, inside the staging folder.
        path: the final name.
        folder: the staging folder, which then holds the old version.
    """
    for _ in range(FREE_NAME_TRIES):
        try:
            if not path.exists():
                os.rename(new, path)
            elif not exchange(new, path):
                _swap_in_two_steps(new, path, folder)
            return
        except FileNotFoundError:  # another writer is between two renames, or has just put something there
            recover_interrupted(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        time.sleep(random.uniform(0.0, 0.02))  # two writers must not wait in step
    raise OSError(errno.EBUSY, "others write there at the same time", str(path))


def exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step. Returns False if the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here = -100  # AT_FDCWD: relative paths begin at the working folder
    if rename(here, os.fsencode(a), here, os.fsencode(b), EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(b))


def _swap_in_two_steps(new: Path, path: Path, folder: Path) -> None:
    """As `swap`, for systems that cannot exchange names.

    After a kill between the two steps, `recover_interrupted` brings the old version back.
    """
    os.rename(path, folder / OLD_NAME)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(folder / OLD_NAME, path)
        raise


def read_consistently(path: Path, read: Callable[[], _T]) -> _T:
    """Read one version of a file or folder.

    If another version takes its place meanwhile, it is read again.

    Args:
        path: what is read.
        read: reads it.

    Returns:
        What `read` returned.

    Raises:
        LowkeyError: as `read` raised it, for a version that stayed.
    """
    for pause in PAUSES:
        time.sleep(pause)
        before = _version(path)
        try:
            content = read()
        except (LowkeyError, FileNotFoundError):  # also of what was moved away while it was read
            moving = recover_interrupted(path)
            if before == _version(path) and not (before is None and moving):
                raise
        else:
            if before == _version(path):
                return content
    return read()


def _version(path: Path) -> tuple[int, ...] | None:
    """What differs between two versions of a file or folder; None if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def sync(path: Path) -> None:
    """Write a file to the disk; also a folder, if the system allows it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)
