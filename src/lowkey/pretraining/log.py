"""The log: one JSON object per line, and no step twice, even after a run was killed and resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lowkey.core import files
from lowkey.core.types import LowkeyError

LOG = "log.jsonl"
LARGEST_LOG = 2**30  # bytes


class Log:
    """Appends to `log.jsonl` in a folder. What was logged after the checkpoint's step is cut off first.

    Args:
        folder: folder of the run.
        step: step of the checkpoint.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / LOG
        kept = (
            [line for line in read_log(self.path) if line["step"] <= step]
            if self.path.exists() and step
            else []
        )
        files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept), ours=True)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        with files.disk_errors_explained(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record)) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """All records of a log. A last line that was cut by a kill is left out.

    Raises:
        LowkeyError: another line is damaged.
    """
    lines = files.read_bytes(path, "log", LARGEST_LOG).splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = files.parse_json(line.decode())
            if not (isinstance(record, dict) and type(record.get("step")) is int):
                raise ValueError("no record")
            records.append(record)
        except ValueError:
            if number < len(lines):
                raise LowkeyError(f"log {str(path)!r}: line {number} is damaged; remove it") from None
    return records


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """A record with None in the place of infinity and NaN, which JSON does not have."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
