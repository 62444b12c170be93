"""Options that would have no effect are refused; ranges and defaults are shown in the help."""

from __future__ import annotations

import pytest
from commands import done, printed, refused

from lowkey.models import loading


@pytest.mark.parametrize(
    "words, says",
    [
        (["heads", "--kind", "echo", "--task", "recall"], ["task 'recall'", "kind 'echo'", "leave it out"]),
        (
            ["heads", "--kind", "induction", "--haystack", "notes.txt"],
            ["haystack 'notes.txt'", "kind 'induction'"],
        ),
        (["generate", "--prompt", "a", "-O", "recent=4"], ["option 'recent=4'", "--policy"]),
        (["generate", "--prompt", "a", "-A", "alpha=0"], ["allocator option 'alpha=0'", "--policy"]),
        (["generate", "--prompt", "a", "--heads", "notes.txt"], ["heads 'notes.txt'", "--policy"]),
        (["eval", "--budget", "10%"], ["budget '10%'", "--policy"]),
        (["eval", "--heads", "notes.txt"], ["heads 'notes.txt'", "--policy"]),
        (["compress", "out", "-O", "epochs=1", "-O", "epochs=2"], ["epochs is given twice"]),
        (
            ["compress", "out", "-A", "step=0.1", "--allocator", "greedy"],
            ["option 'step'", "allocator 'greedy'", "none"],
        ),
        (
            ["compress", "out", "--allocator", "threshold", "-A", "step=nan"],
            ["option step='nan'", "finite number"],
        ),
        (
            ["convert", "out", "--attention", "mha", "--calibration", "notes.txt"],
            ["calibration 'notes.txt'", "--whiten"],
        ),
    ],
    ids=str,
)
def test_options_that_would_do_nothing_are_refused(model, here, monkeypatch, words, says):
    monkeypatch.setattr(loading, "load", lambda *given: pytest.fail("loaded"))
    line = refused(words[0], model, *words[1:])
    assert all(word in line for word in says), line


def test_options_of_allocators_reach_them(model, here):
    words = [
        "--method",
        "eigenattention",
        "--windows",
        8,
        "--context",
        32,
        "--error-budget",
        0.5,
        "--allocator",
        "threshold",
    ]
    plan = printed("compress", model, "plan", *words, "-A", "energy=singular", "-A", "step=0.1")
    assert plan["allocator"] == {"name": "threshold", "parameters": {"step": 0.1, "energy": "singular"}}
    told = done("inspect", "plan").out
    assert (
        "step=0.1 (default 0.02" in told
        and "energy=singular (default squared, one of squared, singular)" in told
    )
    line = refused(
        "generate", model, "--prompt", "a", "--policy", "pyramidkv", "--budget", "50%", "-A", "beta=0"
    )
    assert "option beta='0' of the allocator of policy 'pyramidkv': must be at least 1" in line


def test_ranges_and_defaults_are_shown():
    """The same declarations everywhere: in help, in lists, and as JSON."""
    assert "kl=0.25 (at least 0 and at most 1)" in done("methods").out
    assert printed("methods")["methods"]["kq-svd"]["ranges"]["ridge"] == "at least 0 and at most 1"
    assert printed("methods")["allocators"]["threshold"]["ranges"]["energy"] == "one of squared, singular"
    assert "kernel=7 (odd, at least 1 and at most 4095)" in done("policies").out
    assert printed("policies")["policies"]["curdkv"]["ranges"]["kind"] == "one of keys, values, product"
    assert "at least 4 and at most 1048576" in " ".join(done("compress", "--help").out.split())
