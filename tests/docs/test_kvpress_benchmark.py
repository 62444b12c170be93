"""What both sides of the comparison with kvpress are measured by."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from pages import ROOT
from safetensors.torch import load_file


@pytest.fixture
def measuring(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "kvpress")
    import measuring

    return measuring


class Counting:
    """A side whose model expects that every id is followed by the next one, with probability 1/2."""

    read = whole = staticmethod(lambda cache, *given: cache)

    def kept(self, row, ids):
        return SimpleNamespace(keys=torch.zeros(2, 3)), torch.ones(1, 1, ids.shape[1]), 0.5

    def fork(self, cache):
        return []

    def drop(self, fork):
        fork.clear()

    def forward(self, fork, ids, start, keep):
        if isinstance(fork, list):
            assert start == 4 + len(fork)
            fork += ids[0].tolist()
        logits = torch.zeros(ids.shape[1], 9).log_softmax(-1)
        logits.fill_(math.log(0.5 / 8)).scatter_(1, (ids[0, :, None] + 1) % 9, math.log(0.5))
        return logits[-keep:]

    def cleared(self):
        return 7


def test_bytes_are_those_of_whole_storages_counted_once(measuring):
    whole = torch.zeros(10, 4)
    held = SimpleNamespace(layers=[{"keys": whole[:2], "values": (whole[5:], torch.zeros(3))}])
    held.model = torch.nn.Linear(50, 50)
    assert measuring.reachable(held) == 4 * (40 + 3)


def test_answers_are_judged_token_by_token(measuring, tmp_path):
    asked = [[[5], [6, 7]], [[2, 3], [4, 4]]]
    job = {"contexts": [{"ids": [0, 1, 2, 3], "asked": asked}], "ends": [8], "most": 3}
    measuring.measure(Counting(), {"full": {}}, job, tmp_path)
    measuring.measure(Counting(), {"full": {}}, job, tmp_path)  # nothing is left to do
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["nats"] == pytest.approx([math.log(2), (math.log(2) + math.log(16)) / 2])
    assert found["best"] == [[6, 7, 8], [4, 5, 5]]
    assert found["texts"] == [[6, 7], [4, 5, 6]]  # the end, or as many as there may be
    assert (found["held"], found["outside"], len(found["steps"])) == (24, 7, measuring.STEPS)
    assert load_file(tmp_path / "0-full.safetensors")["kept"].shape == (1, 1, 4)
