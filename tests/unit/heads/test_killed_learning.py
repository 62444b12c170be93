"""What is learnt of a model ends with the same bytes after a kill, and is of no use to another model."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pico
import pytest
import torch
from head_recording import refused, small
from pico import attached

import lowkey
from lowkey.catalog import make_policy
from lowkey.heads import CHAIN_KINDS, GATE_TRAININGS, GATES
from lowkey.heads.induction import estimate_echo
from lowkey.heads.rivals import Ablation, DistilledTraining
from lowkey.heads.rlkv import RewardTraining
from lowkey.heads.scores import HeadScores
from lowkey.models.loading import load
from lowkey.policies.gates import Gates

# what forks may say in a process with threads
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

CORPUS = " ".join(f"word{(i * i) % 89}" for i in range(2000))
CHAINS = {"sinks": 2, "recent": 3, "pairs": 4, "shortest": 2, "longest": 3}
TRAININGS = {
    "reward": RewardTraining(steps=4, prompts=2, samples=2, micro=4, tau=0.2, **CHAINS),
    "distilled": DistilledTraining(steps=4, prompts=2, **CHAINS),
    "ablation": Ablation(**CHAINS),
}
OF_GATES = {
    "fast-kvzip": {"steps": 5, "positions": 20, "tokens": 30},
    "chunk-gate": {"chunk": 4, "sinks": 2, "recent": 6, "continuation": 10, "steps": 6, "save_every": 2},
}
KINDS = [*GATES, "r2", "echo", *CHAIN_KINDS]  # all kinds of one job stand behind `r2` and `echo`


def learn(kind, model, **given):
    """What a command learns of a model, as `lowkey gates` and `lowkey heads` call it."""
    tokenizer = load("tiny")[1] if kind in CHAIN_KINDS else pico.tokenizer()
    if kind in CHAIN_KINDS:
        return CHAIN_KINDS[kind](
            model, tokenizer, cases=12, context=40, seed=0, training=TRAININGS[kind], **given
        )
    if kind in GATES:
        own = {"training": GATE_TRAININGS[kind](**OF_GATES[kind])} if kind in OF_GATES else {}
        return GATES[kind](model, tokenizer, corpus=CORPUS, windows=3, context=40, **own, **given)
    if kind == "echo":
        return estimate_echo(model, tokenizer, kind=kind, cases=4, context=40, **given)
    return small(model, kind, **given)


def model_of(kind, other=False):
    if kind in CHAIN_KINDS:
        loaded = load("tiny", "float32")[0]
        if other:
            with torch.no_grad():
                loaded.model.norm.weight.mul_(1.5)
        return loaded
    return lowkey.attach(pico.build("llama", initializer_range=0.1)) if other else attached("llama")


def saved(found, path) -> dict[str, bytes]:
    """The bytes of all files of an artefact, without its folder."""
    found.save(path)
    parts = path.iterdir() if path.is_dir() else [path]
    return {part.name: part.read_bytes() for part in parts}


class Counted:
    """Progress that counts items and dies by SIGKILL before the item of one number."""

    def __init__(self, last: int | None = None) -> None:
        self.begun, self.last = 0, last

    def __call__(self, items, label, total=None):
        for item in items:
            if self.begun == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            self.begun += 1
            yield item


def kill(kind, model, work: Path, last: int) -> None:
    """Learn in a process of its own, which is killed when so many items are done."""
    number = os.fork()
    if not number:
        try:
            learn(kind, model, work=work, progress=Counted(last))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == -signal.SIGKILL


@pytest.fixture
def answering(accepting, willing, monkeypatch):
    monkeypatch.setattr("lowkey.core.files.measured.SECONDS_BETWEEN_WRITES", 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_killed_ends_with_the_same_bytes(kind, answering, tmp_path):
    model, all_of_it = model_of(kind), Counted()
    whole = saved(learn(kind, model, progress=all_of_it), tmp_path / "whole")
    kill(kind, model, tmp_path / "work", all_of_it.begun - 1)
    assert {path.name for path in tmp_path.glob("work/*/*")} > {"job.json"}, "nothing was saved"
    again = saved(learn(kind, model, work=tmp_path / "work"), tmp_path / "again" / "whole")
    assert again == whole


@pytest.mark.parametrize("kind", KINDS)
def test_unfinished_work_of_another_model_is_left_alone(kind, answering, tmp_path):
    model, other, count = model_of(kind), model_of(kind, other=True), Counted()
    wanted = saved(learn(kind, other, progress=count), tmp_path / "wanted")
    kill(kind, model, tmp_path / "work", count.begun // 2)
    found = learn(kind, other, work=tmp_path / "work")
    assert saved(found, tmp_path / "again" / "wanted") == wanted
    refuse(kind, model, tmp_path / "wanted")


def refuse(kind, model, path) -> None:
    """Another model's artefact is refused in one line."""
    if kind not in GATES:
        return refused(lambda: HeadScores.load(path, model), "made for", "this one is")
    policy = make_policy(kind, "50%", {})
    refused(lambda: lowkey.make_cache(model, policy=policy, gates=Gates.load(path)), "made for model")
