"""Measurements that are kept in a file beside the result, so that a stopped command can go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowkey.core.errors import LowkeyError
from lowkey.core.files.reading import jsonable
from lowkey.core.files.work import (
    damaged_work,
    job_folder,
    job_name,
    read_work_json,
    remove_work,
    write_work_json,
)
from lowkey.core.processes import ALONE, Processes

_T = TypeVar("_T")
SECONDS_BETWEEN_WRITES = 5.0  # seconds of work that a kill may cost, beside the measurement that it met
MEASURED_FILES = "measured*.json"  # of the main process `measured.json`, of the others with their number


class Measured:
    """Measurements by name, as plain JSON: for example of one window under one setting.

    Several processes divide measurements in three steps, which are right for a single process, too:

        for name, measure in measured.share(todo):  # the same list in every process
            measured.once(name, measure)
        measured.gather()  # now all of them are known here

    Args:
        work: the folder for unfinished work, or None to keep them in memory alone. That of the main process
            counts for all.
        job: everything that decides what they are, as plain JSON. That of the main process counts for all.
        processes: the processes that share the work.
    """

    def __init__(
        self,
        work: Path | None = None,
        job: Mapping[str, Any] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.work, self.job, self.processes = work, job or {}, processes
        self.known = self._read() if processes.main else {}
        if processes.count > 1:  # all start from what the main process knows
            place, self.job, self.known = processes.exchange([work and str(work), self.job, self.known])[0]
            self.work = None if place is None else Path(place)
        self.written, self.saved, self.shared = time.monotonic(), len(self.known), set(self.known)

    def __contains__(self, name: str) -> bool:
        return name in self.known

    def __getitem__(self, name: str) -> Any:
        return self.known[name]

    def share(self, items: Iterable[_T]) -> list[_T]:
        """Those of the items that this process measures, see `Processes.share`."""
        return self.processes.share(items)

    def gather(self) -> None:
        """Let every process know what all have measured. All of them must call it."""
        if self.processes.count == 1:
            return
        new = {name: value for name, value in self.known.items() if name not in self.shared}
        # what several have measured is the first one's, everywhere
        for part in reversed(self.processes.exchange(new)):
            self.known.update(part)
        self.shared = set(self.known)

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """The measurement of this name, which is taken only if it is not known.

        Args:
            name: of the measurement.
            measure: takes it. Numbers that are not finite become None.
        """
        if name not in self.known:
            self.known[name] = jsonable(measure())
            if time.monotonic() - self.written >= SECONDS_BETWEEN_WRITES:
                self.write()
        return self.known[name]

    def tensor(
        self, name: str, shape: tuple[int, ...], measure: Callable[[], Tensor | None]
    ) -> Tensor | None:
        """As `once`, for a measurement that is a tensor or None.

        Args:
            name: of the measurement.
            shape: that it has.
            measure: takes it.

        Returns:
            The tensor in fp64, exactly as measured.

        Raises:
            LowkeyError: if it is not finite, or the file holds something else.
        """

        def plain() -> list | None:
            if (measured := measure()) is not None and not bool(measured.isfinite().all()):
                raise LowkeyError(
                    f"{name}: the model's numbers are not finite; load it with --dtype float32, or check its "
                    "weights"
                )
            return None if measured is None else measured.tolist()

        if (known := self.once(name, plain)) is None:
            return None
        try:
            measured = torch.tensor(known, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            measured = torch.empty(0)
        if measured.shape != shape:
            raise LowkeyError(
                f"unfinished work: {name!r} is no table of shape {shape}; it is damaged: delete {self.work} "
                "and start anew"
            )
        return measured

    def write(self) -> None:
        """Write what is new to the file, in one step."""
        if self.work is None or self.saved == len(self.known):
            return
        if self.processes.main:  # the one that removes what other jobs left
            folder, name = job_folder(self.work, self.job), MEASURED_FILES.replace("*", "")
        else:
            folder = self.work / job_name(self.job)
            name = MEASURED_FILES.replace("*", f"-{self.processes.rank}")
        write_work_json(folder, name, {"measured": self.known})
        self.saved, self.written = len(self.known), time.monotonic()

    def forget(self) -> None:
        """Remove what was saved, which nothing goes on from when a job is refused."""
        if self.work is not None:
            remove_work(self.work)

    def _read(self) -> dict[str, Any]:
        """What processes of this job saved, however many they were."""
        if self.work is None:
            return {}
        files = sorted((self.work / job_name(self.job)).glob(MEASURED_FILES))
        folder, known = job_folder(self.work, self.job) if files else self.work, dict[str, Any]()
        for file in files:  # the main process's comes last
            measured = read_work_json(folder, file.name).get("measured")
            if not isinstance(measured, dict):
                raise damaged_work(folder, f"{file.name} holds no measurements")
            known |= measured
        return known
