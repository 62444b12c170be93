"""Measurements that are kept in a file beside the result, so that a stopped command can go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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

SECONDS_BETWEEN_WRITES = 5.0  # seconds of work that a kill may cost, beside the measurement that it met
MEASURED_FILE = "measured.json"


class Measured:
    """Measurements by name, as plain JSON: for example of one window under one setting.

    Args:
        work: the folder for unfinished work, or None to keep them in memory alone.
        job: everything that decides what they are, as plain JSON.
    """

    def __init__(self, work: Path | None = None, job: Mapping[str, Any] | None = None) -> None:
        self.work, self.job = work, job or {}
        self.known, self.written = self._read(), time.monotonic()
        self.saved = len(self.known)

    def __contains__(self, name: str) -> bool:
        return name in self.known

    def __getitem__(self, name: str) -> Any:
        return self.known[name]

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
        folder = job_folder(self.work, self.job)
        write_work_json(folder, MEASURED_FILE, {"measured": self.known})
        self.saved, self.written = len(self.known), time.monotonic()

    def forget(self) -> None:
        """Remove what was saved, which nothing goes on from when a job is refused."""
        if self.work is not None:
            remove_work(self.work)

    def _read(self) -> dict[str, Any]:
        if self.work is None or not (self.work / job_name(self.job) / MEASURED_FILE).exists():
            return {}
        folder = job_folder(self.work, self.job)
        measured = read_work_json(folder, MEASURED_FILE).get("measured")
        if not isinstance(measured, dict):
            raise damaged_work(folder, f"{MEASURED_FILE} holds no measurements")
        return measured
