"""The log: one JSON object per line, no step twice, even after a run was killed and went on."""

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
    """Appends to `folder`/log.jsonl; what was logged after `step`, where the checkpoint stands, is cut off
    first.
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
        with files.disk_errors_explained(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record)) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """All records of a log; a last line that was cut by a kill is left out. Errors: LowkeyError for a damaged
    one.
    """
    lines = files.read_bytes(path, "log", LARGEST_LOG).splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = files.parse_json(line.decode())
            if not (isinstance(record, dict) and type(record.get("step")) is int):
                raise ValueError("no record")
            found.append(record)
        except ValueError:
            if number < len(lines):
                raise LowkeyError(f"log {str(path)!r}: line {number} is damaged; remove it") from None
    return found


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity and no NaN: None in their place."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
