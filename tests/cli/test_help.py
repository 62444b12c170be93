"""Help, and command lines that do not parse."""

from __future__ import annotations

import pytest
from commands import done, lowkey, refused

ALL = (
    "compress",
    "dynamic",
    "eval",
    "cost",
    "generate",
    "serve",
    "profile",
    "methods",
    "policies",
    "heads",
    "inspect",
    "report",
)


# -- bad arguments


@pytest.mark.parametrize("words", [["compres"], ["compress"], ["methods", "--jsn"], ["inspect"]], ids=str)
def test_a_command_line_that_does_not_parse(words):
    assert "--help" in refused(*words)


# -- help


def test_without_arguments_help_is_printed():
    ran = lowkey()
    assert ran.status == 2 and "Usage: lowkey" in ran.err


def test_a_group_of_commands_alone_prints_its_help():
    ran = lowkey("bench")
    assert (
        (ran.status, ran.out) == (2, "")
        and ran.err.splitlines()[0].startswith("Usage: lowkey bench")
        and "\n  decode " in ran.err
    )


def test_help_lists_the_commands():
    out = done("--help").out
    assert [c for c in ALL if c not in out] == []


@pytest.mark.parametrize("command", ALL)
def test_help_of_each_command(command):
    assert f"Usage: lowkey {command}" in done(command, "--help").out
