"""What a command reports while it runs: progress lines, the progress bar, the time that is left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lowkey.core import progress


def test_without_a_terminal_progress_and_time_left_are_lines(monkeypatch, capsys):
    """Ten items of a minute each, on a clock of our own."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for _ in progress.bars(list("abcdefghij"), lambda item: f"perplexity, {item}"):
        now[0] += 60
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[0] == "perplexity, b: 1 of 10, about 9 min left"
        and lines[-1] == "perplexity, j: 9 of 10, about 1 min left"
    )


@pytest.mark.parametrize("seconds, said", [(8, "8 s"), (40, "1 min"), (3541, "59 min"), (7800, "2 h 10 min")])
def test_how_long_in_words(seconds, said):
    assert progress._time_left(seconds) == f", about {said} left"


def test_a_count_without_an_end_has_no_time_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for _ in progress.bars(iter("abc"), "tokenizing"):
        now[0] += 60
    assert capsys.readouterr().err.splitlines() == ["tokenizing: 1", "tokenizing: 2"]


def test_on_a_terminal_the_bar_names_the_item(monkeypatch):
    drawn = io.StringIO()
    monkeypatch.setattr(
        "rich.console.Console", lambda **_: Console(file=drawn, force_terminal=True, width=80)
    )
    assert list(progress.bars(["a", "b"], lambda item: f"perplexity, [{item}]")) == ["a", "b"]
    assert "perplexity, [b]" in drawn.getvalue() and "2/2" in drawn.getvalue()
    assert list(progress.bars([], "nothing")) == []
