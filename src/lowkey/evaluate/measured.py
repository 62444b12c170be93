"""What has been measured so far, kept in a file beside the result, so that the same command goes on where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowkey import files

EVERY = 5.0  # seconds of work that a kill may cost, beside the measurement that it met
NAME = "measured.json"


class Measured:
    """Measurements by name, each plain JSON: a window or a case under one setting. work: where to keep them, or None for memory alone; job:
    all that decides what they are."""

    def __init__(self, work: Path | None = None, job: Mapping[str, Any] | None = None) -> None:
        self.work, self.job = work, job or {}
        self.known, self.written = self._read(), time.monotonic()
        self.saved = len(self.known)

    def __contains__(self, name: str) -> bool:
        return name in self.known

    def __getitem__(self, name: str) -> Any:
        return self.known[name]

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` gives, which is called only where nothing of that name is known. Numbers that are not finite become None."""
        if name not in self.known:
            self.known[name] = files.jsonable(measure())
            if time.monotonic() - self.written >= EVERY:
                self.write()
        return self.known[name]

    def write(self) -> None:
        """What is new, in one step, as every file of lowkey's."""
        if self.work is None or self.saved == len(self.known):
            return
        folder = files.job_folder(self.work, self.job)
        files.write_work_json(folder, NAME, {"measured": self.known})
        self.saved, self.written = len(self.known), time.monotonic()

    def _read(self) -> dict[str, Any]:
        if self.work is None or not (self.work / files.job_name(self.job) / NAME).exists():
            return {}
        folder = files.job_folder(self.work, self.job)
        found = files.read_work_json(folder, NAME).get("measured")
        if not isinstance(found, dict):
            raise files.damaged(folder, f"{NAME} holds no measurements")
        return found
