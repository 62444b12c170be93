"""Several processes that share the work of one command, as `accelerate launch` and `torchrun` start them.

Every process is given the same command, measures its share, and learns what the others measured. Values go as
JSON through the key-value store that the launcher runs, so neither a process group nor a backend is needed,
and GPUs take no part. Imports torch only where there are several processes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from lowkey.core.errors import LowkeyError
from lowkey.core.progress import Progress, silent

_T = TypeVar("_T")
FAILED, GONE = "failed", "gone"  # keys of the store
PIECE = 2**22  # bytes of a value; the store takes messages of 8 MiB at most
SECONDS_BETWEEN_LOOKS = 0.02
MEETING = timedelta(minutes=30)  # how long the processes wait for the first of them


class Processes:
    """The processes of one command, seen from one of them. By itself it is a single process.

    Args:
        rank: number of this process among all.
        count: number of processes.
        local: number of this process among those of its machine.
        store: the launcher's key-value store, a `torch.distributed.Store`; None for a single process.
    """

    def __init__(self, rank: int = 0, count: int = 1, local: int = 0, store: Any = None) -> None:
        self.rank, self.count, self.local, self.store = rank, count, local, store
        self.turn, self.sent = 0, list[str]()

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def share(self, items: Iterable[_T]) -> list[_T]:
        """The items that this process takes: every process calls it on the same items in the same order."""
        return list(items)[self.rank :: self.count]

    def exchange(self, value: Any) -> list[Any]:
        """The values of all processes, in their order. Every process must call it, as often as the others.

        Args:
            value: of this process, as JSON can hold it. Floats arrive exactly.

        Raises:
            SystemExit: another process has failed, and has said why.
        """
        if self.count == 1:
            return [value]
        words, self.turn = json.dumps(value).encode(), self.turn + 1
        names = [f"{self.turn} {self.rank} {i}" for i in range(len(words) // PIECE + 1)]
        for i, name in enumerate(names):
            self.store.set(name, words[i * PIECE : (i + 1) * PIECE])
        self.store.set(f"{self.turn} {self.rank}", str(len(names)))
        found = [json.loads(self._received(rank)) for rank in range(self.count)]
        # all have begun this turn, so all have ended the one before
        for name in self.sent:
            self.store.delete_key(name)
        self.sent = names
        return found

    def _received(self, rank: int) -> bytes:
        """What a process has sent in this turn."""
        name = f"{self.turn} {rank}"
        self._wait(lambda: self.store.check([name]))
        return b"".join(self.store.get(f"{name} {i}") for i in range(int(self.store.get(name))))

    def _wait(self, done: Callable[[], bool]) -> None:
        """Wait until something is so, or a process has failed."""
        while not done():
            if self.store.check([FAILED]):
                raise SystemExit(2)
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def device(self, name: str) -> str:
        """The device of this process. Each takes a GPU of its own where `name` leaves open which.

        Args:
            name: as the command line takes it.

        Raises:
            LowkeyError: a machine has fewer GPUs than processes, or one process is to take all of them.
        """
        if self.count == 1 or name not in ("auto", "cuda", "balanced"):
            return name
        if name == "balanced":
            raise LowkeyError(
                "device 'balanced': gives all GPUs to one process, and there are several; give --device cuda"
            )
        import torch

        if not (gpus := torch.cuda.device_count()):
            return name
        if self.local >= gpus:
            raise LowkeyError(
                f"device {name!r}: this machine has {gpus} GPUs for more processes; launch one for each GPU, "
                "or give --device cpu"
            )
        return f"cuda:{self.local}"

    def shown(self, progress: Progress) -> Progress:
        """The progress of this process: only the main one shows any."""
        return progress if self.main else silent

    def is_first_to_fail(self) -> bool:
        """Whether no other process has failed before, so that this one has to say why."""
        try:
            return self.store.add(FAILED, 1) == 1
        except RuntimeError:  # the store has ended with the process that failed
            return False

    def leave(self) -> None:
        """End together: the main process, which may hold the store, waits for all others."""
        if not self.main:
            self.store.add(GONE, 1)
            return
        self._wait(lambda: self.store.add(GONE, 0) == self.count - 1)


ALONE = Processes()  # a single process


@contextmanager
def launched() -> Iterator[Processes]:
    """The processes of this command, as the launcher's environment variables name them.

    An error in any of them ends all: the first one raises it, and the others end with exit status 2 and
    without a word.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
        yield ALONE
        return
    from torch.distributed import PrefixStore, rendezvous

    store, rank, count = next(rendezvous("env://", timeout=MEETING))
    # a launcher that restarts its processes may keep the store
    prefix = f"lowkey {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    local = int(os.environ.get("LOCAL_RANK", rank))
    processes = Processes(rank, count, local, PrefixStore(prefix, store))
    try:
        yield processes
        processes.leave()
    except BaseException:
        if not processes.is_first_to_fail():
            raise SystemExit(2) from None
        raise
