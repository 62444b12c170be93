"""Standard streams that are closed, broken, narrow or full, and control characters in what is printed.

Commands run in a forked process whose standard streams are what a shell would have made them.
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from unittest import mock

import pico
import pytest

from lowkey.cli import app
from lowkey.cli.tables import screen, show_plan
from lowkey.core.printable import printable

ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e"


def opened(place: int, encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.FileIO(place, "w", closefd=False), encoding=encoding)


def forked(*words: str, out: int | None, err: int | None, encoding: str = "utf-8") -> int:
    """The exit status of the command with these files as stdout and stderr; None: closed."""
    pid = os.fork()
    if not pid:
        status = 99
        try:
            for place, given in ((1, out), (2, err)):
                os.close(place) if given is None else os.dup2(given, place)
            sys.stdout, sys.stderr = (
                opened(place, encoding) if given is not None else None
                for place, given in ((1, out), (2, err))
            )
            sys.argv = ["lowkey", *words]
            app.main()
        except SystemExit as exit:
            status = exit.code
            for stream in (sys.stdout, sys.stderr):
                stream.flush()  # as the interpreter does in the end
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def file(tmp_path):
    """(descriptor to write to, what was written)"""
    place = tmp_path / "stream"
    with place.open("wb") as stream:
        yield stream.fileno(), lambda: place.read_text(encoding="utf-8")


@pytest.mark.parametrize("verb", ["policies", "methods"])
def test_a_reader_that_has_seen_enough_is_no_error(verb, file):
    reading, writing = os.pipe()
    os.close(reading)
    assert forked(verb, out=writing, err=file[0]) == 0
    assert forked(verb, "--json", out=writing, err=file[0]) == 0
    os.close(writing)
    assert file[1]() == ""


def test_closed_output(file):
    assert forked("methods", out=None, err=file[0]) == 0
    assert forked("methods", "--json", out=None, err=file[0]) == 0
    assert forked("methods", out=None, err=None) == 0
    assert forked("inspect", "no-such-plan", out=file[0], err=None) == 2
    assert file[1]() == ""


def test_a_full_disk_is_one_line(file):
    full = os.open("/dev/full", os.O_WRONLY)
    assert forked("methods", out=full, err=file[0]) == 2
    os.close(full)
    assert (
        file[1]() == "lowkey: output: no space left on the device; free some space or choose another place\n"
    )


def test_an_encoding_that_lacks_characters(file):
    assert forked("methods", out=file[0], err=file[0], encoding="ascii") == 0
    assert "stiefattention" in file[1]() and file[1]().isascii()


@pytest.mark.parametrize(
    "words",
    [("generate", "tiny", "--prompt", "a\udcff"), ("compress", "tiny", "\udcff"), ("\udcff",)],
    ids=ascii,
)
def test_bytes_that_are_no_text(words, file):
    assert forked(*words, out=file[0], err=file[0]) == 2
    assert (
        file[1]().startswith("lowkey: argument '")
        and "is not UTF-8" in file[1]()
        and len(file[1]().splitlines()) == 1
    )


# -- escapes


def test_what_a_terminal_would_obey_is_written_as_its_escape():
    assert printable(ESCAPE) == r"\x1b]0;owned\x07\x1b[2J\u202e"
    assert printable("a\rb\x00\udcff") == r"a\rb\x00\udcff"
    assert printable("Größe: 3 µm\n\t日本") == "Größe: 3 µm\n\t日本"


def test_names_out_of_a_plan_are_printable(capsys):
    about = {"name": f"pca{ESCAPE}", "parameters": {}}
    plan = pico.plan(pico.stock("llama"), method=about, allocator=about)
    show_plan(plan, Path("p"), False)
    assert "owned" in (out := capsys.readouterr().out) and printable(out) == out
    with mock.patch.object(type(screen), "is_terminal", True):
        screen.print(ESCAPE)
    assert ESCAPE[:4] not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [("inspect", ESCAPE), ("compress", ESCAPE, "out"), (ESCAPE,), ("eval", "tiny", "--task", ESCAPE)],
    ids=ascii,
)
def test_messages_are_printable(words):
    err = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["lowkey", *words]),
        mock.patch.object(sys, "stderr", err),
        pytest.raises(SystemExit) as exit,
    ):
        app.main()
    line = err.getvalue()
    assert (
        exit.value.code == 2
        and line.startswith("lowkey: ")
        and printable(line) == line
        and len(line.splitlines()) == 1
    )


def test_json_is_ascii(file):
    assert forked("methods", "--json", out=file[0], err=file[0], encoding="ascii") == 0
    assert "stiefattention" in json.loads(file[1]())["methods"]
