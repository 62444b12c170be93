"""Random sequences of good and failing calls: the cache holds what the good calls alone would give."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from cache_kinds import KINDS, REREAD, SLIDING, agree, can_be_saved
from failing_calls import FAILURES, NOT_REFUSED, same, state
from pico import attached, feed, prompt

from lowkey import load_cache

EVENTS = [
    "step",
    "steps",
    "turn",
    "failure",
    "failure",
    "failure",
    "reorder",
    "select",
    "repeat",
    "copy",
    "save",
]
# of any length and number of rows
FITTING = {name: failure for name, failure in FAILURES.items() if "mask" not in name}
FEW = ["bits-8", "plan-kivi", "rule", "snapkv", "every-global", "plan-razor", "think", "dynamic"]
CASES = [(kind, "llama") for kind in KINDS if kind not in REREAD] + [(kind, "gemma2") for kind in SLIDING]


class Life:
    """A cache that fails in between, and one that does not."""

    def __init__(self, kind: str, name: str, seed: int) -> None:
        self.draw, self.kind, self.name, self.model = random.Random(seed), kind, name, attached(name)
        self.cache, self.straight = (KINDS[kind](self.model) for _ in range(2))
        self.pads = [self.draw.choice([0, 3]), 0]
        self.read(20)

    def read(self, length: int) -> None:
        ids = prompt(length, batch=len(self.pads), seed=self.draw.randint(0, 999))
        assert torch.equal(
            *(feed(self.model, ids, cache, self.pads) for cache in (self.cache, self.straight))
        )

    def step(self, folder):
        self.read(1)

    def steps(self, folder):
        for _ in range(self.draw.randint(1, 30)):
            self.read(1)

    def turn(self, folder):
        self.read(self.draw.randint(2, 9))

    def failure(self, folder):
        found = self.draw.choice(list(FITTING))
        if found in NOT_REFUSED.get(self.kind, ()) or (
            self.name == "gemma2" and found == "interrupt in the first attention"
        ):
            return
        ids = prompt(self.draw.choice([1, 5]), batch=len(self.pads))
        self.cache.get_seq_length()  # an earlier failure may wait to be undone
        before = state(self.cache)
        with pytest.raises((Exception, KeyboardInterrupt)):
            FITTING[found](self.model, self.cache, ids)
        agree(self.cache, found)
        if self.draw.random() < 0.5:  # else the next call is the first to ask
            assert len({layer.get_seq_length() for layer in self.cache.layers}) == 1 and same(
                state(self.cache), before
            )

    def reorder(self, folder):
        self.move("reorder_cache", [self.draw.randrange(len(self.pads)) for _ in self.pads])

    def select(self, folder):
        self.move(
            "batch_select_indices",
            sorted(self.draw.sample(range(len(self.pads)), max(1, len(self.pads) - 1))),
        )

    def move(self, how, rows):
        for cache in (self.cache, self.straight):
            getattr(cache, how)(torch.tensor(rows))
        self.pads = [self.pads[row] for row in rows]

    def repeat(self, folder):
        if len(self.pads) < 3:
            for cache in (self.cache, self.straight):
                cache.batch_repeat_interleave(2)
            self.pads = [pad for pad in self.pads for _ in range(2)]

    def copy(self, folder):
        self.cache = copy.deepcopy(self.cache)

    def save(self, folder):
        if can_be_saved(self.cache):
            self.cache.save(folder / "cache", force=True)
            self.cache = load_cache(folder / "cache", self.model)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 6))])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(*case, marks=[] if case[0] in FEW and case[1] == "llama" else pytest.mark.slow)
        for case in CASES
    ],
)
def test_random_calls_leave_what_the_good_calls_alone_would(kind, name, seed, tmp_path):
    life, events = Life(kind, name, seed), []
    for _ in range(8):
        events.append(life.draw.choice(EVENTS))
        getattr(life, events[-1])(tmp_path)
        if events[-1] != "failure":
            agree(life.cache, events)
            agree(life.straight, events)
    life.read(3)
    assert same(state(life.cache), state(life.straight)), events
