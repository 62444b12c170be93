"""Texts, models, plans and numbers of tokens that a command cannot use: one line, and nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import forging
import pico
import pytest
import torch
from commands import SMALL, refused, tree, truncate
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from lowkey.plan.reading import PLAN_JSON, PLAN_TENSORS

# -- bad text


TEXTS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "no such file"),
    "empty": (b"", "is empty"),
    "blank": (b" \n\t ", "is empty"),
    "latin-1": ("é".encode("latin-1") * 99, "not UTF-8"),
    "binary": (bytes(range(256)) * 9, "not UTF-8"),
    "nul": (b"a\0b" * 99, "NUL"),
    "short": (b"Too few words.", "too few"),
}


@pytest.mark.parametrize(
    "command", [("compress", "out", "--calibration"), ("eval", "--data")], ids=lambda c: c[0]
)
@pytest.mark.parametrize("kind", TEXTS)
def test_bad_text(model, here, command, kind):
    content, says = TEXTS[kind]
    path = here / "text.txt"
    if content is not None:
        path.write_bytes(content)
    before = tree(here)
    line = refused(command[0], model, *command[1:], path)
    assert says in line and (str(path) in line or (kind == "short" and "calibration" in line))
    assert tree(here) == before


@pytest.mark.parametrize(
    "command", [("compress", "out", "--calibration"), ("eval", "--data")], ids=lambda c: c[0]
)
def test_a_folder_is_no_text(model, here, command):
    assert "is a folder" in refused(command[0], model, *command[1:], here)


# -- bad models


@pytest.mark.parametrize("name", ["./none", "/no/such/folder", "no-such-model", "no-such/model"])
def test_a_model_that_is_nowhere(here, name):
    line = refused("compress", name, "out", *SMALL)
    assert f"model {name!r}" in line and "'tiny'" in line


@pytest.mark.parametrize("name", [".", "notes.txt"])
def test_a_place_that_is_no_model(here, name):
    assert "no config.json" in refused("compress", name, "out", *SMALL)


@pytest.mark.parametrize(
    "kind, says",
    [
        ("gpt2", "supported families: llama"),
        ("deepseek_v3", "MLA"),
        ("mistral", "only sliding-window layers"),
    ],
)
def test_a_family_that_is_not_supported(model, here, kind, says):
    folder = Path(shutil.copytree(model, here / "model"))
    if kind == "mistral":
        pico.save(folder, kind, sliding_window=pico.WINDOW)
    else:
        AutoConfig.for_model(kind).save_pretrained(folder)
    line = refused("compress", folder, "out", *SMALL)
    assert kind in line and says in line


def lose_a_weight(path: Path) -> None:
    weights = load_file(path)
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    "file, damage",
    [
        ("config.json", lambda p: p.write_text("{")),
        ("config.json", lambda p: p.write_text("[]")),
        ("config.json", lambda p: p.write_text("{}")),
        ("config.json", lambda p: p.write_bytes(bytes(range(256)))),
        ("config.json", lambda p: p.write_text('{"model_type": "mystery"}')),
        (
            "config.json",
            lambda p: p.write_text(p.read_text().replace('"hidden_size": 64', '"hidden_size": 128')),
        ),
        ("model.safetensors", truncate),
        ("model.safetensors", lambda p: p.write_bytes(b"")),
        ("model.safetensors", lambda p: p.unlink()),
        ("model.safetensors", lose_a_weight),
        ("tokenizer.json", lambda p: p.write_text("{")),
    ],
)
def test_a_damaged_model(model, here, file, damage):
    folder = Path(shutil.copytree(model, here / "model"))
    damage(folder / file)
    before = tree(here)
    assert f"model {str(folder)!r}" in refused("compress", folder, "out", *SMALL)
    assert tree(here) == before


def test_a_model_that_brings_code_is_neither_run_nor_asked_about(model, here, monkeypatch):
    folder = Path(shutil.copytree(model, here / "model"))
    (folder / "config.json").write_text(
        '{"model_type": "mystery", "auto_map": {"AutoConfig": "evil.Config"}}'
    )
    (folder / "evil.py").write_text(f"open({str(here / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    assert f"model {str(folder)!r}" in refused("compress", folder, "out", *SMALL)
    assert not (here / "ran").exists()


# -- bad plans


def change(plan: Path, **fields: object) -> None:
    forging.edit_json(plan / PLAN_JSON, **fields)


def fill_with_nan(plan: Path) -> None:
    forging.edit_tensors(
        plan / PLAN_TENSORS, lambda tensors: [t.fill_(torch.nan) for t in tensors.values()], plan / PLAN_JSON
    )


BAD_PLANS: dict[str, tuple[Callable[[Path], object], str]] = {
    "newer": (lambda p: change(p, format=99), "upgrade lowkey"),
    "no json": (lambda p: (p / PLAN_JSON).write_text("{"), "damaged"),
    "deep json": (lambda p: (p / PLAN_JSON).write_text("[" * 100_000), "damaged"),
    "list": (lambda p: (p / PLAN_JSON).write_text("[]"), "damaged"),
    "truncated": (lambda p: truncate(p / PLAN_TENSORS), "damaged"),
    "other tensors": (lambda p: save_file({"a": torch.zeros(1)}, p / PLAN_TENSORS), "damaged"),
    "huge header": (lambda p: (p / PLAN_TENSORS).write_bytes(b"\xff" * 64), "damaged"),
    "nan": (fill_with_nan, "NaN"),
    "huge ranks": (lambda p: change(p, ranks={"0": [10**9, 1]}), "head dim"),
    "layout": (lambda p: change(p, layout="__import__('os')"), "post_rope"),
    "gone": (lambda p: (p / PLAN_TENSORS).unlink(), "does not exist"),
}


@pytest.mark.parametrize("command", ["inspect", "eval", "generate"])
@pytest.mark.parametrize("kind", BAD_PLANS)
def test_a_bad_plan(model, here, plan, command, kind):
    damage, says = BAD_PLANS[kind]
    damage(plan)
    before = tree(here)
    words = {
        "inspect": [plan],
        "eval": [model, "--plan", plan],
        "generate": [model, "--prompt", "a", "--plan", plan],
    }[command]
    line = refused(command, *words)
    assert str(plan) in line and says in line
    assert tree(here) == before


@pytest.mark.parametrize("fields", [{"ranks": {}}, {"geometry": {"kv_heads": "4", "head_dim": 16}}], ids=str)
def test_inspect_of_an_impossible_plan(plan, fields):
    change(plan, **fields)
    assert str(plan) in refused("inspect", plan)


@pytest.mark.parametrize("words", [["eval"], ["generate", "--prompt", "a"]], ids=lambda w: w[0])
def test_a_plan_of_another_model(other, made, here, words):
    line = refused(words[0], other, *words[1:], "--plan", made[0])
    assert "was made for model" in line and "compress this model" in line


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 9}'])
def test_a_damaged_result_is_refused_by_report(here, content):
    if content is not None:
        (here / "r.json").write_text(content)
    assert "r.json" in refused("report", "r.json", "-o", "page.html")
    assert not (here / "page.html").exists()


# -- numbers beyond the model


@pytest.mark.parametrize(
    "words, says",
    [
        (
            ["generate", "--prompt", "abc", "--tokens", 2000],
            ["tokens 2000", "512 positions", "give at most 509"],
        ),
        (
            ["generate", "--prompt", "abc" * 200, "--tokens", 1],
            ["tokens 1", "512 positions", "a shorter prompt"],
        ),
        (
            ["generate", "--prompt", "abc", "--tokens", 10**20],
            ["tokens 100000000000000000000", "at most 16777216"],
        ),
        (
            ["eval", "--task", "recall", "--context", 512],
            ["context 512", "512 positions", "another task than recall"],
        ),
        (["eval", "--context", 513], ["context 513", "512"]),
        (["compress", "out", "--context", 513], ["context 513", "512 positions"]),
        (["dynamic", "out", "--context", 513], ["context 513", "512 positions"]),
        (["convert", "out", "--attention", "mha", "--context", 513], ["context 513", "512 positions"]),
        (["heads", "--kind", "copy", "--context", 513], ["context 513", "512 tokens at most"]),
        (["heads", "--kind", "echo", "--context", 513], ["context 513", "512 tokens"]),
    ],
    ids=str,
)
def test_more_than_the_model_has_positions_for(model, here, words, says):
    before = tree(here)
    line = refused(words[0], model, *words[1:])
    assert all(word in line for word in says), line
    assert tree(here) == before
