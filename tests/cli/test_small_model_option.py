"""`--small-model` of `eval` and `generate`: a model that reads along."""

from __future__ import annotations

import json

import pico
from commands import done, lowkey

POLICY = ("--policy", "smallkv-tokens", "-O", "window=8", "-O", "kernel=7", "--budget", "30%")
EVAL = ("eval", "tiny", "--windows", "1", "--context", "128", "--cases", "2")
GENERATE = ("generate", "tiny", "--prompt", "The cat sat on the mat. " * 12, "--tokens", "4", "--json")


def test_both_bytes_are_told(tmp_path):
    out = tmp_path / "r.json"
    done(*EVAL, *POLICY, "--small-model", "tiny", "--task", "recall,decode,speed", "--out", out)
    rows = json.loads(out.read_text())["rows"]
    row = next(row for row in rows if row["policy"] and row["policy"]["name"] == "smallkv-tokens")
    assert 0 < row["bytes_small_cache"] < row["bytes_held"] == row["bytes_predicted"]
    assert row["bytes_small_weights"] > 10**6 and row["kl_decode"] > 0
    told = json.loads(done(*GENERATE, *POLICY, "-O", "every=2", "--small-model", "tiny").out)
    assert told["new_tokens"] == 4 and 0 < told["bytes_small_cache"] < told["bytes_held"]
    assert told["bytes_small_weights"] == row["bytes_small_weights"]
    assert told["bytes_host"] == row["bytes_host"] == 0
    moved = (*POLICY, "-O", "every=2", "-O", "offload=true", "--small-model", "tiny")
    again = json.loads(done(*GENERATE, *moved).out)
    assert again["bytes_host"] > again["bytes_full"] / 2
    assert again["bytes_held"] - again["bytes_host"] == told["bytes_held"]
    assert "lie in host memory" in done(*GENERATE[:-1], *moved).err


def test_a_full_budget_writes_what_the_full_cache_writes():
    exact = (*GENERATE, "--dtype", "float32")
    whole = ("--policy", "smallkv-tokens", "--budget", "100%", "--small-model", "tiny")
    assert json.loads(done(*exact, *whole).out)["text"] == json.loads(done(*exact).out)["text"]


def test_small_models_that_do_not_fit_are_refused(tmp_path):
    other = str(pico.save(tmp_path / "pico"))
    for given, says in (
        ([*GENERATE, *POLICY], "needs a small model of the same tokenizer"),
        ([*GENERATE, *POLICY, "--small-model", other], "its tokenizer has other tokens"),
        ([*GENERATE, "--small-model", "tiny"], "is for a policy; give --policy too"),
        ([*EVAL, "--policy", "snapkv", "--budget", "30%", "--small-model", "tiny"], "read along"),
        ([*EVAL, *POLICY, "--small-model", "nowhere/none"], "nowhere/none"),
    ):
        ran = lowkey(*given)
        assert ran.status == 2 and says in ran.err and len(ran.err.strip().splitlines()) == 1, ran.err
