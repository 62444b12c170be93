"""Recipes of short trainings, their text, and their loss curves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import torch

from lowkey.cli import app
from lowkey.pretraining import Recipe
from lowkey.pretraining.log import read_log

MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}
TRAINING = {
    "tokens": 24 * 128,
    "batch_tokens": 128,
    "length": 32,
    "micro_batch": 2,
    "lr": 1e-2,
    "precision": "fp32",
    "log_every": 1,
    "save_every": 5,
    "evaluate_every": 8,
}
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "ran",
    "off",
    "to",
    "see",
    "what",
    "was",
    "there",
    "dark",
    "house",
]


def corpus(folder: Path) -> Path:
    """40 short documents as .jsonl."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for n in range(40):
        picks = torch.randint(len(WORDS), (20 + n,), generator=generator).tolist()
        lines.append(json.dumps({"text": " ".join(WORDS[i] for i in picks)}))
    path = folder / "text.jsonl"
    path.write_text("\n".join(lines))
    return path


def recipe(folder: Path, **training: object) -> Recipe:
    """The recipe of a short training in this folder."""
    data = {"path": str(corpus(folder)), "vocab_size": 300, "held_out": 0.1, "cache": str(folder / "tokens")}
    return Recipe.of({"model": MODEL, "data": data, "training": {**TRAINING, **training}})


def curve(out: Path) -> list[dict]:
    """The log but for what a clock says."""
    return [
        {k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_log(out / "log.jsonl")
    ]


DYING = """
import os, signal, sys
from lowkey.pretraining import Recipe, Trained, models, pretrain
from lowkey.pretraining.corpus import prepare

def progress(items, label, total=None):
    for item in items:
        if label == "pretraining" and item == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield item

pretrain(Recipe.read(sys.argv[1]), sys.argv[2], device="cpu", progress=progress)
"""


def killed(wanted: Recipe, out: Path, step: int) -> None:
    """Train in a process of its own, which is killed -9 when `step` steps are done."""
    path = out.with_name("recipe.toml")
    path.write_text(wanted.toml())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", DYING, str(path), str(out), str(step)],
        env=environment,
        capture_output=True,
        timeout=120,
    )
    assert found.returncode == -signal.SIGKILL, found.stderr.decode()


def command(*words: object) -> tuple[int, str, str]:
    """(status, stdout, stderr) of `lowkey` in this process."""
    out, err = StringIO(), StringIO()
    with (
        mock.patch.object(sys, "argv", ["lowkey", *map(str, words)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            app.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue()
