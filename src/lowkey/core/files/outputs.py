"""Where lowkey may write: what it replaces or removes is nothing but what it wrote itself and nobody has
changed since.

That is read from what files hold, never from their names: JSON and text of ours carry a checksum of
themselves, tensors say what they are, and every folder of ours has a list of its files with their checksums,
`.lowkey.json`.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from lowkey.core.errors import LowkeyError
from lowkey.core.files.reading import (
    CHECKSUM,
    KIND,
    MOST_HEADER,
    MOST_JSON,
    file_checksum,
    has_checksum,
    json_digest,
    marks,
    parse_json,
    read_json,
)
from lowkey.core.files.swapping import NEW_NAME, new_folder_beside, settle, steady

MANIFEST = ".lowkey.json"
LAST_LINE = re.compile(
    rb"[^\n]*lowkey ([\w-]+) ([0-9a-f]{64})[^\n]*\n?"
)  # the last line of a text file of ours
ELSEWHERE = "choose another place"


# -- whose is it


def kind_of(path: Path) -> str | None:
    """What lowkey wrote into this file; None for what others wrote or changed. A file of tensors is taken by
    its header.
    """
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return None
        with path.open("rb") as file:
            start = file.read(9)
        if start[:1] == b"{":
            return _kind_of_json(path)
        if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= MOST_HEADER:
            return marks(path, "file")[0] or None
        return _kind_of_text(path)
    except (OSError, ValueError):
        return None


def _kind_of_json(path: Path) -> str | None:
    if path.stat().st_size > MOST_JSON:
        return None
    found = parse_json(path.read_bytes().decode())
    return found.get(KIND) if isinstance(found, dict) and found.get(CHECKSUM) == json_digest(found) else None


def _kind_of_text(path: Path) -> str | None:
    if path.stat().st_size > MOST_JSON:
        return None
    text = path.read_bytes()
    start = text.rstrip(b"\n").rfind(b"\n") + 1
    found = LAST_LINE.fullmatch(text[start:])
    return (
        found[1].decode() if found and found[2].decode() == hashlib.sha256(text[:start]).hexdigest() else None
    )


def marked(text: str, kind: str, comment: tuple[str, str]) -> str:
    """A text with a last line, a comment of its own language, that says whose it is."""
    text = text.rstrip("\n") + "\n"
    return f"{text}{comment[0]}lowkey {kind} {hashlib.sha256(text.encode()).hexdigest()}{comment[1]}\n"


def manifest(folder: Path) -> dict:
    """The checksums of all files below a folder."""
    return {
        "complete": True,
        "files": {
            str(p.relative_to(folder)): [file_checksum(p)] for p in sorted(folder.rglob("*")) if p.is_file()
        },
    }


def listed(folder: Path) -> dict[str, list[str]]:
    """The files that lowkey wrote into this folder, each with the checksums that it may have. Errors:
    LowkeyError for a damaged list.
    """
    found = read_json(folder / MANIFEST, "list of files", "files")["files"]
    if not (isinstance(found, dict) and all(isinstance(sums, list) for sums in found.values())):
        raise LowkeyError(f"list of files {str(folder / MANIFEST)!r} holds no checksums; it is damaged")
    return found


def foreign(folder: Path) -> str | None:
    """The first thing below a folder that lowkey did not write there, or that was changed since."""
    try:
        known = listed(folder) if os.path.lexists(folder / MANIFEST) else {}
    except LowkeyError:
        return MANIFEST
    return next(
        (name for name in _below(folder, known) if not unchanged(folder / name, known.get(name, ()))), None
    )


def _below(folder: Path, known: dict[str, list[str]]) -> Iterator[str]:
    """Files, links, and folders of which the list knows nothing."""
    parents = {str(p) for name in known for p in Path(name).parents}
    for place, folders, names in os.walk(folder):
        inside = Path(place).relative_to(folder)
        whole = [
            name for name in folders if (Path(place) / name).is_symlink() or str(inside / name) not in parents
        ]
        yield from (str(inside / name) for name in sorted([*names, *whole]) if str(inside / name) != MANIFEST)


def others(folder: Path) -> list[str]:
    """The files right in a folder that its list does not have as they are."""
    known = listed(folder) if os.path.lexists(folder / MANIFEST) else {}
    names = [p.name for p in folder.iterdir() if (p.is_symlink() or not p.is_dir()) and p.name != MANIFEST]
    return [name for name in names if not unchanged(folder / name, known.get(name, ()))]


def unchanged(file: Path, sums: Collection[str]) -> bool:
    """Whether this is a file, and has one of the checksums."""
    try:
        return bool(sums) and stat.S_ISREG(os.lstat(file).st_mode) and has_checksum(file, sums)
    except (OSError, LowkeyError):
        return False


def verify(folder: Path, what: str) -> None:
    """Every file that lowkey wrote into this folder is there as it was written, but for cards, which say
    nothing to a program.

    Errors: LowkeyError.
    """
    known = read_json(folder / MANIFEST, what, "files")
    if not known.get("complete"):
        raise LowkeyError(
            f"{what} {str(folder)!r}: is just being written, or its writer was killed; give its command again"
        )
    for name, sums in listed(folder).items():
        if not name.endswith(".md") and not has_checksum(folder / name, sums, what):
            rule = "is not what lowkey wrote; make it again"
            raise LowkeyError(
                f"{what} {str(folder)!r}: {name} {rule}, or delete {MANIFEST} there if you changed it on "
                "purpose"
            )


# -- may it be written


def link_target(path: Path) -> Path:
    """Where a link leads: what is written goes there, and the link stays."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def check_writable(path: Path) -> None:
    """Something can be written at this place: tried, with all names that are missing, in the nearest folder
    that exists.

    Errors: LowkeyError, before the work rather than after it.
    """
    try:
        settle(link_target(path))
        place = link_target(path).absolute()
        if place.is_symlink() or os.path.ismount(place):
            raise LowkeyError(
                f"output {str(path)!r}: is a link to itself, or where a disk is mounted; {ELSEWHERE}"
            )
        ground = next(p for p in place.parents if os.path.lexists(p))
        near = ground == place.parent  # then a kill leaves what the next writer sweeps
        with (
            new_folder_beside(place)
            if near
            else TemporaryDirectory(prefix=".lowkey.", dir=ground, ignore_cleanup_errors=True) as made
        ):
            inside = Path(made) / NEW_NAME / place.relative_to(ground)
            inside.parent.mkdir(parents=True)
            inside.write_bytes(b"tried")
    except LowkeyError:
        raise
    except (OSError, ValueError) as error:
        raise LowkeyError(
            f"output {str(path)!r}: cannot be written ({getattr(error, 'strerror', None) or error}); "
            f"{ELSEWHERE}"
        ) from None


def check_folder(path: Path, force: bool, again: str | None = None) -> None:
    """A folder can be written at `path`: nothing is there, or only files that lowkey wrote, which are
    replaced with `force`. again: the name of a file by which a folder of the same kind is known; such a
    folder is replaced without `force`.

    Errors: LowkeyError; also with `force` for whatever lowkey did not write.
    """
    if path.name in ("", ".."):
        raise LowkeyError(f"output {str(path)!r} has no name of its own; give the name of a new folder")
    check_writable(path)
    steady(link_target(path), lambda: _check_there(path, force, again))


def _check_there(path: Path, force: bool, again: str | None) -> None:
    if not os.path.lexists(link_target(path)):
        return
    if not path.is_dir():
        raise LowkeyError(f"output {str(path)!r} is a file; choose a folder")
    check_removable(path)
    if os.listdir(path) and not force and (again is None or not (path / again).exists()):
        raise LowkeyError(f"output {str(path)!r} already holds files; choose another folder or pass --force")


def check_removable(folder: Path) -> None:
    """Nothing in it is anybody else's. Errors: LowkeyError."""
    if (found := foreign(folder)) is not None and folder.is_dir():
        raise LowkeyError(
            f"output {str(folder)!r} holds other files: lowkey did not write {found!r} there, or it was "
            "changed since; choose another folder or move it away"
        )


def check_file(path: Path, kind: str | None = None, force: bool = False) -> None:
    """A file can be written at `path`: nothing is there, or a file that lowkey wrote and that is of this
    `kind` or given up by `force`.

    Errors: LowkeyError; also with `force` for what lowkey did not write.
    """
    if path.name not in ("", ".."):
        check_writable(path)
    if path.is_dir():
        raise LowkeyError(f"output {str(path)!r} is a folder; give the name of a file")
    place = link_target(path)
    if not os.path.lexists(place):
        return
    found = check_replaceable(place)
    if not force and found != kind:
        raise LowkeyError(f"output {str(path)!r} already exists; choose another name or pass --force")


def check_replaceable(file: Path) -> str | None:
    """What lowkey wrote there. Errors: LowkeyError for what it did not."""
    found = kind_of(file)
    if found is None:
        raise LowkeyError(
            f"output {str(file)!r} is there, and lowkey did not write it, or it was changed since; choose "
            "another name"
        )
    return found
