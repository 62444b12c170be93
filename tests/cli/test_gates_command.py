"""`lowkey gates`: what a policy learns, and how `eval` and `generate` are told of it."""

from __future__ import annotations

import json

import pytest
import torch
from commands import done, lowkey

EVAL = ["eval", "tiny", "--budget", "30%", "--windows", "2", "--context", "64", "--task", "perplexity"]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("triattention", []),
        ("fast-kvzip", ["-O", "steps=5"]),
        ("chunk-gate", ["-O", "steps=2", "-O", "recent=8", "-O", "continuation=16"]),
    ],
)
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


def test_published_gates_are_converted_and_used(tmp_path):
    sizes = {"k_base": (6, 1, 16, 16), "b": (6, 1, 1), "q_norm.weight": (16,), "k_norm.weight": (16,)}
    sizes |= {"q_proj.weight": (96, 192), "q_proj.bias": (96,), "k_proj.weight": (96, 192)}
    states = [{name: torch.randn(size).bfloat16() for name, size in sizes.items()} for _ in range(4)]
    torch.save({"module": states}, tmp_path / "q1.pt")
    given = ("--published", tmp_path / "q1.pt", "-O", "bias_factor=2", "--json")
    told = json.loads(done("gates", "tiny", tmp_path / "gates", *given).out)
    assert (told["layers"], told["settings"]["bias_factor"]) == (4, 2)
    result = ("--gates", tmp_path / "gates", "--out", tmp_path / "result.json")
    done(*EVAL, "--policy", "fast-kvzip", *result)


def test_bad_input_is_one_line(tmp_path):
    out, empty = str(tmp_path / "gates"), str(tmp_path / "empty.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    cases = [
        (["gates", "tiny", out, "--method", "snapkv"], ["method 'snapkv'", "fast-kvzip"]),
        (["gates", "tiny", out, "-O", "stepz=5"], ["stepz", "did you mean 'steps'?"]),
        (["gates", "tiny", out, "-O", "steps=-1"], ["steps", "-1"]),
        (["gates", "tiny", out, "-O", "facts=99"], ["facts", "99", "at most 32"]),
        (["gates", "tiny", out, "--published", "no.pt"], ["no.pt", "does not exist"]),
        (["gates", "tiny", out, "--published", empty, "-O", "steps=5"], ["steps", "bias_factor"]),
        (["gates", "tiny", out, "--published", empty], [empty, "not read as a file of torch.save"]),
        (["gates", "tiny", out, "--published", "no.pt", "--context", "64"], ["no.pt", "leave out context"]),
        (
            ["gates", "tiny", out, "--published", "no.pt", "--method", "triattention"],
            ["no.pt", "method 'triattention'"],
        ),
        (["gates", "tiny", out, "--method", "triattention", "-O", "steps=5"], ["steps", "it has none"]),
        ([*EVAL, "--policy", "triattention"], ["triattention", "lowkey gates", "--gates"]),
        ([*EVAL, "--policy", "snapkv", "--gates", out], [out, "lowkey gates"]),
        (["eval", "tiny", "--gates", out], ["gates", "give --policy too"]),
    ]
    for given, said in cases:
        ran = lowkey(*given)
        assert ran.status == 2 and ran.err.count("\n") == 1
        assert all(word in ran.err for word in said), ran.err
