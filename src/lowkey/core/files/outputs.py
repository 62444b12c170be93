"""Where lowkey may write: it replaces or removes only what it wrote itself and nobody has changed since.

Whose a file is, is read from its contents, never from its name. JSON and text of ours carry a checksum of
themselves, tensor files say what they are, and every folder of ours has a list of its files with their
checksums, `.lowkey.json`.
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
from lowkey.core.files.atomic import NEW_NAME, new_folder_beside, read_consistently, recover_interrupted
from lowkey.core.files.reading import (
    CHECKSUM,
    KIND,
    MOST_HEADER,
    MOST_JSON,
    file_checksum,
    has_checksum,
    json_digest,
    parse_json,
    read_json,
    tensor_marks,
)

MANIFEST = ".lowkey.json"
# the last line of a text file of ours
LAST_LINE = re.compile(rb"[^\n]*lowkey ([\w-]+) ([0-9a-f]{64})[^\n]*\n?")
ELSEWHERE = "choose another place"


# -- whose is it


def kind_of(path: Path) -> str | None:
    """What kind of file this is, if lowkey wrote it and nobody changed it; else None.

    Of a tensor file, only the header is read.
    """
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return None
        with path.open("rb") as file:
            start = file.read(9)
        # JSON begins with a brace; a tensor file with the length of its JSON header in 8 bytes
        if start[:1] == b"{":
            return _kind_of_json(path)
        if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= MOST_HEADER:
            return tensor_marks(path, "file")[0] or None
        return _kind_of_text(path)
    except (OSError, ValueError):
        return None


def _kind_of_json(path: Path) -> str | None:
    if path.stat().st_size > MOST_JSON:
        return None
    content = parse_json(path.read_bytes().decode())
    is_ours = isinstance(content, dict) and content.get(CHECKSUM) == json_digest(content)
    return content.get(KIND) if is_ours else None


def _kind_of_text(path: Path) -> str | None:
    if path.stat().st_size > MOST_JSON:
        return None
    text = path.read_bytes()
    start = text.rstrip(b"\n").rfind(b"\n") + 1
    mark = LAST_LINE.fullmatch(text[start:])
    if mark is None or mark[2].decode() != hashlib.sha256(text[:start]).hexdigest():
        return None
    return mark[1].decode()


def with_mark(text: str, kind: str, comment: tuple[str, str]) -> str:
    """A text with a last line that says what it is and has a checksum.

    Args:
        text: the text.
        kind: what kind of file it is.
        comment: what begins and ends a comment in the language of the text.
    """
    text = text.rstrip("\n") + "\n"
    return f"{text}{comment[0]}lowkey {kind} {hashlib.sha256(text.encode()).hexdigest()}{comment[1]}\n"


def manifest(folder: Path) -> dict:
    """A list of all files below a folder with their checksums, for `.lowkey.json`."""
    return {
        "complete": True,
        "files": {
            str(p.relative_to(folder)): [file_checksum(p)] for p in sorted(folder.rglob("*")) if p.is_file()
        },
    }


def listed_files(folder: Path) -> dict[str, list[str]]:
    """The files that lowkey wrote into a folder, each with the checksums that it may have.

    Raises:
        LowkeyError: for a damaged list.
    """
    listed = read_json(folder / MANIFEST, "list of files", "files")["files"]
    if not (isinstance(listed, dict) and all(isinstance(sums, list) for sums in listed.values())):
        raise LowkeyError(f"list of files {str(folder / MANIFEST)!r} holds no checksums; it is damaged")
    return listed


def first_foreign_file(folder: Path) -> str | None:
    """The first file, link or folder below a folder that lowkey did not write there, or that was changed.

    Returns:
        Its path inside the folder, or None.
    """
    try:
        known = listed_files(folder) if os.path.lexists(folder / MANIFEST) else {}
    except LowkeyError:
        return MANIFEST
    return next(
        (name for name in _below(folder, known) if not unchanged(folder / name, known.get(name, ()))), None
    )


def _below(folder: Path, known: dict[str, list[str]]) -> Iterator[str]:
    """All files and links below a folder, and the folders that hold no file of the list."""
    parents = {str(p) for name in known for p in Path(name).parents}
    for place, folders, names in os.walk(folder):
        inside = Path(place).relative_to(folder)
        whole = [
            name for name in folders if (Path(place) / name).is_symlink() or str(inside / name) not in parents
        ]
        yield from (str(inside / name) for name in sorted([*names, *whole]) if str(inside / name) != MANIFEST)


def unlisted_files(folder: Path) -> list[str]:
    """The files directly in a folder that are not on its list, or were changed."""
    known = listed_files(folder) if os.path.lexists(folder / MANIFEST) else {}
    names = [p.name for p in folder.iterdir() if (p.is_symlink() or not p.is_dir()) and p.name != MANIFEST]
    return [name for name in names if not unchanged(folder / name, known.get(name, ()))]


def unchanged(file: Path, sums: Collection[str]) -> bool:
    """Whether this is a regular file that has one of the checksums."""
    try:
        return bool(sums) and stat.S_ISREG(os.lstat(file).st_mode) and has_checksum(file, sums)
    except (OSError, LowkeyError):
        return False


def verify(folder: Path, what: str) -> None:
    """Check that every file that lowkey wrote into a folder is there as it was written.

    Cards (`.md`) may be changed: no program reads them.

    Args:
        folder: the folder.
        what: what it is, for messages.

    Raises:
        LowkeyError: if a file is missing or changed, or the folder is incomplete.
    """
    # the list is written last, so without it the folder is no whole one
    known = read_json(folder / MANIFEST, what, "files")
    if not known.get("complete"):
        raise LowkeyError(
            f"{what} {str(folder)!r}: is just being written, or its writer was killed; give its command again"
        )
    for name, sums in listed_files(folder).items():
        if not name.endswith(".md") and not has_checksum(folder / name, sums, what):
            rule = "is not what lowkey wrote; make it again"
            raise LowkeyError(
                f"{what} {str(folder)!r}: {name} {rule}, or delete {MANIFEST} there if you changed it on "
                "purpose"
            )


# -- may it be written


def link_target(path: Path) -> Path:
    """Where a link leads; a path that is no link, itself. Output goes there, and the link stays."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def check_writable(path: Path) -> None:
    """Check that something can be written at this place, before the work rather than after it.

    It is tried: all names that are missing are made, inside the nearest folder that exists.

    Raises:
        LowkeyError: if it cannot.
    """
    try:
        recover_interrupted(link_target(path))
        place = link_target(path).absolute()
        if place.is_symlink() or os.path.ismount(place):
            raise LowkeyError(
                f"output {str(path)!r}: is a link to itself, or where a disk is mounted; {ELSEWHERE}"
            )
        existing = next(p for p in place.parents if os.path.lexists(p))
        is_beside = existing == place.parent  # then, what a kill leaves is removed by the next writer
        with (
            new_folder_beside(place)
            if is_beside
            else TemporaryDirectory(prefix=".lowkey.", dir=existing, ignore_cleanup_errors=True) as made
        ):
            inside = Path(made) / NEW_NAME / place.relative_to(existing)
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
    """Check that a folder can be written at `path`.

    Nothing may be there, or only files that lowkey wrote.

    Args:
        path: the folder.
        force: whether files that lowkey wrote are replaced.
        again: the name of a file by which a folder of the same kind is known. Such a folder is replaced
            without `force`.

    Raises:
        LowkeyError: if it cannot; also with `force`, if there is anything that lowkey did not write.
    """
    if path.name in ("", ".."):
        raise LowkeyError(f"output {str(path)!r} has no name of its own; give the name of a new folder")
    check_writable(path)
    read_consistently(link_target(path), lambda: _check_there(path, force, again))


def _check_there(path: Path, force: bool, again: str | None) -> None:
    if not os.path.lexists(link_target(path)):
        return
    if not path.is_dir():
        raise LowkeyError(f"output {str(path)!r} is a file; choose a folder")
    check_removable(path)
    if os.listdir(path) and not force and (again is None or not (path / again).exists()):
        raise LowkeyError(f"output {str(path)!r} already holds files; choose another folder or pass --force")


def check_removable(folder: Path) -> None:
    """Check that lowkey wrote everything in a folder. Raises: LowkeyError."""
    if (foreign := first_foreign_file(folder)) is not None and folder.is_dir():
        raise LowkeyError(
            f"output {str(folder)!r} holds other files: lowkey did not write {foreign!r} there, or it was "
            "changed since; choose another folder or move it away"
        )


def check_file(path: Path, kind: str | None = None, force: bool = False) -> None:
    """Check that a file can be written at `path`.

    Nothing may be there, or a file that lowkey wrote.

    Args:
        path: the file.
        kind: a file of this kind is replaced without `force`.
        force: whether a file of any kind is replaced.

    Raises:
        LowkeyError: if it cannot; also with `force`, if lowkey did not write what is there.
    """
    if path.name not in ("", ".."):
        check_writable(path)
    if path.is_dir():
        raise LowkeyError(f"output {str(path)!r} is a folder; give the name of a file")
    place = link_target(path)
    if not os.path.lexists(place):
        return
    kind_there = check_replaceable(place)
    if not force and kind_there != kind:
        # commands that replace files of their own kind have no option to replace others
        remedy = "choose another name" + ("" if kind else " or pass --force")
        raise LowkeyError(f"output {str(path)!r} already exists; {remedy}")


def check_replaceable(file: Path) -> str | None:
    """The kind of a file that lowkey wrote. Raises: LowkeyError if it did not write it."""
    kind = kind_of(file)
    if kind is None:
        raise LowkeyError(
            f"output {str(file)!r} is there, and lowkey did not write it, or it was changed since; choose "
            "another name"
        )
    return kind


def remove_file(path: Path, kind: str) -> None:
    """Remove a file of this kind, if there is one and lowkey wrote it. A link to it stays.

    Raises:
        LowkeyError: if something else is there, or it was changed since.
    """
    place = link_target(path)
    if not os.path.lexists(place):
        return
    if kind_of(place) != kind:
        raise LowkeyError(f"output {str(path)!r} is there, and is no {kind} as lowkey wrote it; move it away")
    place.unlink(missing_ok=True)
