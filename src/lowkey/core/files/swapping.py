"""Names change hands in one step, so that a reader finds the old version or the new one, whole, also after a
kill.

What is being written lies in a folder of its own beside its name, which stays locked as long as its writer
lives. So the leftovers of a killed process can be told from work that goes on, whatever the process ids are,
and the next writer sweeps them.
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
OWN_FOLDER = ".lowkey"  # in a folder of this kind: by its name alone it could be somebody's
OLD_NAME, NEW_NAME = "old", "new"
LONGEST_PREFIX = 100  # bytes of a name that its folder's name repeats
FREE_NAME_TRIES = 300
# seconds before a reader tries again
PAUSES = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.1, 0.2, 0.2, 0.5, 0.5)
EXCHANGE = 2  # RENAME_EXCHANGE of Linux
# what a system says that cannot exchange names
UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


@contextmanager
def new_folder_beside(path: Path) -> Iterator[Path]:
    """A new, locked folder beside `path`, which goes when the block ends; those of dead writers go first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settle(path, sweep=True)
    folder, lock = _locked(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked(path: Path) -> tuple[Path, int]:
    """A folder of its own and its lock. Until that is held, another writer may take the folder for abandoned:
    then a new one.
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
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: then nobody sweeps
        pass
    try:
        (folder / OWN_FOLDER).touch()
        return os.path.samestat(folder.stat(), os.fstat(lock))
    except FileNotFoundError:
        return False


def _short(name: str) -> str:
    return os.fsencode(name)[:LONGEST_PREFIX].decode(errors="ignore")


def folders_of(path: Path) -> list[Path]:
    """Those that writers of `path` have made beside it."""
    pattern = re.compile(rf"\.{re.escape(_short(path.name))}\.[0-9a-f]{{16}}\.tmp")
    with suppress(OSError):
        return [path.with_name(name) for name in os.listdir(path.parent) if pattern.fullmatch(name)]
    return []


def settle(path: Path, sweep: bool = False) -> bool:
    """Give `path` back what a killed writer had moved away, and with `sweep` remove what killed writers left.

    Returns whether a living writer is between two renames.
    """
    moving = False
    for folder in folders_of(path):
        with _abandoned(folder) as dead:
            if not dead:
                moving |= (folder / OLD_NAME).exists()
                continue
            with suppress(OSError):
                if (folder / OLD_NAME).exists() and not os.path.lexists(path):
                    os.rename(folder / OLD_NAME, path)
                if sweep and ((folder / OWN_FOLDER).exists() or not any(folder.iterdir())):
                    shutil.rmtree(folder, ignore_errors=True)
    return moving


def is_passing(path: Path) -> bool:
    """A folder of what is being written, to whatever name."""
    return (
        bool(re.fullmatch(r"\..+\.[0-9a-f]{16}\.tmp", path.name)) and path.is_dir() and not path.is_symlink()
    )


@contextmanager
def _abandoned(folder: Path) -> Iterator[bool]:
    """Whether its writer is dead: nobody holds its lock, which is held here meanwhile."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # it is gone, or none of ours
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
    """The folder `new`, in `folder`, takes the name `path`; what stood there is then in `folder`."""
    for _ in range(FREE_NAME_TRIES):
        try:
            if not path.exists():
                os.rename(new, path)
            elif not exchange(new, path):
                _moved(new, path, folder)
            return
        except FileNotFoundError:  # another writer is between two renames, or has just put something there
            settle(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        time.sleep(random.uniform(0.0, 0.02))  # two writers must not wait in step
    raise OSError(errno.EBUSY, "others write there at the same time", str(path))


def exchange(a: Path, b: Path) -> bool:
    """Let two names change places in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here = -100  # AT_FDCWD
    if rename(here, os.fsencode(a), here, os.fsencode(b), EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(b))


def _moved(new: Path, path: Path, folder: Path) -> None:
    """In two steps; `settle` mends what a kill between them leaves."""
    os.rename(path, folder / OLD_NAME)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(folder / OLD_NAME, path)
        raise


def steady(path: Path, read: Callable[[], _T]) -> _T:
    """What `read` gives of one version of the file or folder `path`: again when another took its place
    meanwhile.

    Errors: LowkeyError, as `read` has them, for a version that stayed.
    """
    for pause in PAUSES:
        time.sleep(pause)
        before = _version(path)
        try:
            found = read()
        except (LowkeyError, FileNotFoundError):  # also of what was moved away while it was read
            moving = settle(path)
            if before == _version(path) and not (before is None and moving):
                raise
        else:
            if before == _version(path):
                return found
    return read()


def _version(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def sync(path: Path) -> None:
    """Onto the disk; folders where the system lets one."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)
