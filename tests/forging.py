"""Changes the content of saved files and updates their checksums.

What is tested is then what a loader makes of the content.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lowkey.core import files
from lowkey.core.files.reading import CHECKSUM, json_digest, tensor_marks


def edit_json(path: Path, change: Callable[[dict], Any] | None = None, **fields: object) -> None:
    """Change the object in place, or set some of its fields."""
    value = json.loads(path.read_text())
    if change is not None:
        change(value)
    value |= fields
    value[CHECKSUM] = json_digest(value)
    path.write_text(json.dumps(value, indent=2) + "\n")


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any], about: Path | None = None) -> None:
    """Change the tensors; `about` is the JSON file that has their checksum."""
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    kind, _ = tensor_marks(path, "file")
    change(tensors)
    path.unlink()
    checksum = files.write_tensors(path, tensors, kind)
    if about is not None:
        edit_json(about, tensors_sha256=checksum)
