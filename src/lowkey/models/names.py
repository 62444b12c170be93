"""What may stand for a model: a folder, a GGUF file, a Hub id, or the name of a model that comes with lowkey.

Imports no torch: the command line refuses a name that cannot be a model before it loads torch.
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path

from lowkey.core import files
from lowkey.core.errors import LowkeyError
from lowkey.core.options import nearest_name, shown
from lowkey.models import packaged
from lowkey.models.packaged import PACKAGED

TINY = "tiny"
ALIKE = 0.8  # names at least so similar to one of ours are taken for a slip, and the Hub is not asked
GIVE = f"give a model folder, a Hub id, a .gguf file, or one of {', '.join(map(repr, (TINY, *PACKAGED)))}"
DTYPES = ("auto", "float32", "bfloat16", "float16")  # of a loaded model; auto: as it was saved
DEVICES = ("auto", "cpu", "cuda", "balanced")
GGUF_MAGIC = b"GGUF"  # the first bytes of a GGUF file
HUB_ADDRESSES = ("https://", "http://", "hf.co/", "huggingface.co/")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]{0,95}", re.ASCII)  # owner/name


def check_name(name: str) -> None:
    """Refuse what cannot be a model, without asking the Hub.

    A name that is written like a Hub id passes, although the Hub may not know it.

    Args:
        name: as a user gives it.

    Raises:
        LowkeyError: for a folder or file that is missing or no model, for a model that has to be downloaded
            first, and for a word that is neither a path nor a Hub id.
    """
    if name == TINY:
        return
    if name in PACKAGED:
        _check_folder(name, packaged.packaged_folder(name))
        return
    check_spelling(name)
    if is_gguf(name):
        with files.opened_file(Path(name), "model", files.ANY_SIZE, "give a model folder or a GGUF file"):
            return
    if os.path.exists(name):
        _check_folder(name, Path(name))
    elif name.startswith(HUB_ADDRESSES):
        raise LowkeyError(f"model {shown(name)}: is an address; give the Hub id, written owner/name")
    elif is_local(name):
        raise LowkeyError(f"model {shown(name)}: no such folder; {GIVE}")
    elif not HUB_ID.fullmatch(name):
        raise LowkeyError(f"model {shown(name)}: no such folder, and a Hub id is written owner/name; {GIVE}")


def check_spelling(name: str) -> None:
    """Refuse a name that is nearly that of a model that comes with lowkey. Raises: LowkeyError."""
    if not os.path.exists(name) and (near := get_close_matches(name.lower(), [TINY, *PACKAGED], 1, ALIKE)):
        raise LowkeyError(f"model {name!r} is unknown; did you mean {near[0]!r}?")


def check_dtype(name: str) -> None:
    """Refuse a name that is not in DTYPES. Raises: LowkeyError."""
    if name not in DTYPES:
        raise LowkeyError(f"dtype {shown(name)} is unknown; {nearest_name(name, DTYPES)}")


def check_device(name: str) -> None:
    """Refuse a name that is neither in DEVICES nor of one GPU, like `cuda:1`. Raises: LowkeyError."""
    if name not in DEVICES and not re.fullmatch(r"cuda:\d+", name):
        raise LowkeyError(f"device {shown(name)} is unknown; {nearest_name(name, DEVICES, ' or cuda:N')}")


def is_local(name: str) -> bool:
    """Whether this can only be a path on this machine, and no Hub id."""
    return name.startswith((".", "/", "~")) or name.count(os.sep) > 1


def is_gguf(name: str | Path) -> bool:
    """Whether this is a GGUF file, or should be one by its name."""
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return path.is_file() and file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except (OSError, ValueError):
        return False


def _check_folder(name: str, path: Path) -> None:
    """Refuse a folder that exists and holds no model. Raises: LowkeyError."""
    if not (path / "config.json").is_file():
        raise LowkeyError(f"model {name!r} is no model: it has no config.json; {GIVE}")
    for part in path.iterdir():
        if part.exists() and not (part.is_file() or part.is_dir()):
            raise LowkeyError(
                f"model {name!r}: its {part.name} is neither a file nor a folder; save or download it again"
            )
