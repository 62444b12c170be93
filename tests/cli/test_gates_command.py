"""`lowkey gates`: what a policy learns, and how `eval` and `generate` are told of it."""

from __future__ import annotations

import json

import pytest
from commands import done, lowkey

EVAL = ["eval", "tiny", "--budget", "30%", "--windows", "2", "--context", "64", "--task", "perplexity"]


@pytest.mark.parametrize(("method", "options"), [("triattention", []), ("fast-kvzip", ["-O", "steps=5"])])
def test_gates_are_learnt_and_used(tmp_path, method, options):
    out = tmp_path / "gates"
    sample = ("--windows", "4", "--context", "64")
    told = json.loads(done("gates", "tiny", out, "--method", method, *options, *sample, "--json").out)
    assert (told["method"], told["layers"], told["gates"]) == (method, 4, str(out))
    result = tmp_path / "result.json"
    done(*EVAL, "--policy", f"{method},snapkv", "--gates", out, "--out", result)
    rows = json.loads(result.read_text())["rows"]
    assert [row["name"] for row in rows][:3] == ["full", f"{method} 30%", "snapkv 30%"]
    generate = ("generate", "tiny", "--prompt", "The cat sat on the mat.", "--tokens", "4", "--budget", "50%")
    assert done(*generate, "--policy", method, "--gates", out).out


def test_bad_input_is_one_line(tmp_path):
    out = str(tmp_path / "gates")
    cases = [
        (["gates", "tiny", out, "--method", "snapkv"], ["method 'snapkv'", "fast-kvzip"]),
        (["gates", "tiny", out, "-O", "stepz=5"], ["stepz", "did you mean 'steps'?"]),
        (["gates", "tiny", out, "-O", "steps=-1"], ["steps", "-1"]),
        (["gates", "tiny", out, "--method", "triattention", "-O", "steps=5"], ["steps", "it has none"]),
        ([*EVAL, "--policy", "triattention"], ["triattention", "lowkey gates", "--gates"]),
        ([*EVAL, "--policy", "snapkv", "--gates", out], [out, "lowkey gates"]),
        (["eval", "tiny", "--gates", out], ["gates", "give --policy too"]),
    ]
    for given, said in cases:
        ran = lowkey(*given)
        assert ran.status == 2 and ran.err.count("\n") == 1
        assert all(word in ran.err for word in said), ran.err
