"""`lowkey compress` and `lowkey inspect`: the plan they write and describe, and the arguments they refuse."""

from __future__ import annotations

import pico
import pytest
import torch
from commands import BARE, SMALL, done, printed, refused, tree

from lowkey import catalog
from lowkey.core.types import LowkeyError
from lowkey.methods import StiefAttention
from lowkey.models import loading
from lowkey.plan.plan import Plan

STIEF = ("--method", "stiefattention")


# -- bad arguments


@pytest.mark.parametrize(
    "words, says",
    [
        (["--method", "stiefatention"], ["method 'stiefatention'", "did you mean 'stiefattention'?"]),
        (
            ["--method", "zzz"],
            ["method 'zzz'", "pca, eigenattention, stiefattention", "package.module:Class"],
        ),
        (["--method", "no.such.module:Class"], ["method 'no.such.module:Class'", "package.module:Class"]),
        (["--method", "json:Class"], ["method 'json:Class'", "package.module:Class"]),
        (["--method", ":Class"], ["method ':Class'", "package.module:Class"]),
        (["--method", "os:path"], ["method 'os:path'", "dataclass", "fit"]),
        (["--allocator", "best"], ["allocator 'best'", "greedy"]),
        (["--layout", "rope"], ["layout 'rope'", "did you mean 'pre_rope'?"]),
        ([*STIEF, "-O", "epoch=5"], ["'epoch'", "'stiefattention'", "epochs"]),
        ([*STIEF, "-O", "epochs=many"], ["epochs='many'", "whole number"]),
        ([*STIEF, "-O", "parametrisation=lucky"], ["parametrisation='lucky'", "mlp, free"]),
        ([*STIEF, "-O", "key_bases=none"], ["key_bases='none'", "shared, per_head"]),
        (["-O", "epochs"], ["'epochs'", "name=value"]),
        (["--budget", "150%"], ["budget '150%'", "100%", "50%"]),
        (["--budget", "0%"], ["budget '0%'", "50%"]),
        (["--budget", "banana"], ["budget 'banana'", "50%"]),
        (["--budget", "0.5"], ["budget '0.5'", "50%"]),
        (["--budget", ""], ["budget ''", "50%"]),
        (["--budget", "512 tokens"], ["budget 512 tokens", "50%"]),
        (["--budget", "50%", "--error-budget", 0.03], ["budget 50%", "error budget 0.03", "one of them"]),
        (["--error-budget", 0], ["error budget 0", "above 0"]),
        (["--error-budget", 1.5], ["error budget 1.5", "up to 1"]),
        (["--error-budget", "nan"], ["error budget nan", "up to 1"]),
        (["--error-budget", "small"], ["--error-budget", "'small'", "--help"]),
        (["--context", 0], ["context 0", "at least 8"]),
        (["--context", -5], ["context -5", "at least 8"]),
        (["--context", "banana"], ["--context", "'banana'", "--help"]),
        (["--windows", 3], ["windows 3", "at least 4"]),
        (["--rank-multiple", 17], ["rank multiple 17", "between 1 and the head dim 16"]),
        (["--rank-multiple", 0], ["rank multiple 0", "at least 1"]),
        (["--ranks", "banana"], ["ranks 'banana'", "16,32,64"]),
        (["--ranks", "8,17"], ["ranks '8,17'", "17 is not one of"]),
        (["--ranks", "8,12", "--rank-multiple", 8], ["ranks '8,12'", "12 is not one of 8, 16"]),
        ([*STIEF, *BARE, "--budget", "49%"], ["49.0%", "50.0%", "--ranks"]),
        (["--budget", "64 KiB/token"], ["64 KiB/token", "of the full cache", "100%"]),
        (["--budget", "1 KiB"], ["budget 1 KiB of a cache of 512 tokens", "alone take 7%", "--at"]),
        (["--judge", "loss", "--error-budget", 0], ["error budget 0", "nats"]),
        (["--sinks", -1], ["sinks -1", "at least 0"]),
        (["--recent", -1], ["recent -1", "at least 0"]),
        (["--seed", -1], ["seed -1", "at least 0"]),
        (["--dtype", "banana"], ["dtype 'banana'", "bfloat16"]),
        (["--device", "banana"], ["device 'banana'", "cpu"]),
        (["--device", "cuda"], ["device 'cuda'", "--device cpu"]),
        (["--bogus"], ["--bogus", "--help"]),
    ],
    ids=str,
)
def test_bad_arguments_of_compress(model, here, monkeypatch, words, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = tree(here)
    line = refused("compress", model, "out", *words)
    assert [s for s in says if s not in line] == []
    assert tree(here) == before


def test_arguments_are_judged_before_the_model_is_loaded(here, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("loaded"))
    for words in (
        ["--layout", "rope"],
        ["--budget", "150%"],
        ["--method", "zzz"],
        ["--calibration", "none.txt"],
    ):
        refused("compress", "tiny", "out", *words)


def test_a_budget_that_no_rank_can_reach(model, here):
    line = refused("compress", model, "out", *SMALL, "--budget", "1%")
    assert "budget 1%" in line and "512 tokens" in line and "4 sinks and 32 recent" in line and "--at" in line
    line = refused("compress", model, "out", *SMALL, *BARE, "--budget", "1%")
    assert "1.0%" in line and "give a budget of 12.5% or more" in line
    assert not (here / "out").exists()


# -- compress and inspect


def test_compress_prints_the_plan_it_wrote(model, made):
    out, told = made
    held = Plan.load(out)
    assert told["plan"] == str(out)
    assert (told["method"]["name"], told["budget"], told["format"]) == ("pca", "50%", 4)
    assert told["ranks"] == {str(i): list(r) for i, r in held.ranks.items()}
    assert told["provenance"]["model"] == str(model)


def test_compress_keeps_half_when_not_told(made):
    assert 0 < made[1]["bytes_per_token"]["float32"] <= pico.LAYERS * 2 * 4 * pico.HEAD_DIM * 4 / 2


def test_no_work_is_left_behind(made):
    assert [p.name for p in made[0].parent.iterdir()] == [made[0].name]


def test_inspect_says_what_compress_said(made):
    assert printed("inspect", made[0]) == made[1]


def test_inspect_without_json(made):
    out = done("inspect", made[0]).out
    held = made[1]["bytes_per_token"]["bfloat16"]
    assert "key rank" in out and f"latents keep {held} of 768 bytes per token" in out


def test_a_budget_in_bytes(model, here):
    told = printed("compress", model, "out", *SMALL, "--budget", "1 KiB/token")
    assert told["budget"] == "1 KiB/token"
    assert 0 < told["bytes_per_token"]["float32"] <= 1024


def test_an_error_budget(model, here):
    assert printed("compress", model, "out", *SMALL, "--error-budget", "0.5")["budget"] == "error 0.5"


def test_options_reach_the_method(model, here):
    words = (
        *STIEF,
        "--budget",
        "60%",
        "--windows",
        8,
        "--context",
        32,
        "-O",
        "epochs=1",
        "-O",
        "lr=0.5",
        "-O",
        "key_bases=per_head",
    )
    parameters = printed("compress", model, "out", *words)["method"]["parameters"]
    assert (parameters["epochs"], parameters["lr"], parameters["key_bases"]) == (1, 0.5, "per_head")


def test_other_compress_arguments_reach_the_plan(model, here):
    words = (
        "--layout",
        "pre_rope",
        "--allocator",
        "uniform",
        "--sinks",
        2,
        "--recent",
        3,
        "--rank-multiple",
        4,
        "--seed",
        7,
    )
    told = printed("compress", model, "out", *SMALL, *words)
    assert (told["layout"], told["allocator"]["name"], told["sinks"], told["recent"]) == (
        "pre_rope",
        "uniform",
        2,
        3,
    )
    assert told["provenance"]["seed"] == 7
    assert {r % 4 for pair in told["ranks"].values() for r in pair} == {0}


def test_compress_takes_a_calibration_text(model, made, here):
    (here / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    told = printed("compress", model, "out", *SMALL, "--calibration", "text.txt")
    assert told["provenance"]["data_sha256"] != made[1]["provenance"]["data_sha256"]


OUTSIDE = """
from dataclasses import dataclass
from lowkey.methods import PCA

@dataclass(frozen=True)
class Mine(PCA):
    loud: bool = False
    times: int = 1
"""


def test_a_method_from_a_file_of_ones_own(model, here, monkeypatch):
    (here / "outside_method.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(here)
    words = ("--method", "outside_method:Mine", *SMALL[2:], "-O", "loud=true", "-O", "times=3")
    method = printed("compress", model, "out", *words)["method"]
    assert method["name"] == "outside_method:Mine"
    assert (method["parameters"]["loud"], method["parameters"]["times"]) == (True, 3)


def test_a_class_that_has_not_all_of_a_method_is_refused(here, monkeypatch):
    parts = ("fit", "summary", "paper", "allocator", "layout", "grid", "candidates")
    lines = [
        "from dataclasses import dataclass",
        "@dataclass(frozen=True)",
        "class Half:",
        *(f"    {part} = None" for part in parts),
    ]
    (here / "half_method.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(here)
    line = refused("compress", "tiny", "out", "--method", "half_method:Half")
    assert "half_method:Half' is not a suitable class" in line and "has_finish" in line


@pytest.mark.parametrize("content", ["import nothing_of_this_name", "1 / 0", "def ("])
def test_a_method_file_that_does_not_import(here, monkeypatch, content):
    (here / "broken_method.py").write_text(content)
    monkeypatch.syspath_prepend(here)
    assert "broken_method:Mine" in refused("compress", "tiny", "out", "--method", "broken_method:Mine")


def test_options_are_read_by_the_type_of_their_default():
    method = catalog.make_method("stiefattention", {"epochs": "3", "lr": "1e-2", "parametrisation": "mlp"})
    assert method == StiefAttention("mlp", epochs=3, lr=0.01)


def test_a_flag_is_true_or_false(here, monkeypatch):
    (here / "flag_method.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(here)
    assert catalog.make_method("flag_method:Mine", {"loud": "false"}).loud is False
    with pytest.raises(LowkeyError, match="true or false"):
        catalog.make_method("flag_method:Mine", {"loud": "maybe"})


# -- the others


def test_compress_takes_ranks_and_an_error_budget(model, here):
    words = (
        "compress",
        model,
        "out",
        *SMALL[2:],
        "--method",
        "pca",
        "--allocator",
        "uniform",
        "--error-budget",
        "0.9",
        "--ranks",
        "25%,7",
    )
    told = printed(*words)
    assert told["profile"]["ranks"] == [4, 7, 16] and told["budget"] == "error 0.9"
    assert set(told["profile"]["bounded"]) == {"what", "error", "budget", "reached"}
