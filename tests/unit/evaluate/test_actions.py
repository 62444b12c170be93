"""Patrols: the expert does what the plan says, and a model is judged by kinds of action."""

from __future__ import annotations

import random

import pico
import torch

from lowkey.evaluate.actions import (
    GUST,
    MOSTLY_CALM,
    MOSTLY_GUSTY,
    PLACES,
    RIGHT,
    Patrol,
    draw_patrol,
    draw_patrols,
    encoded,
    rights,
)


def test_the_expert_walks_its_plan():
    """Replayed by hand: every stop is at the next site, moves lead there, reports are the majority so far."""
    task = Patrol(sites=4, steps=80)
    episode = draw_patrol(random.Random(1), task)
    words = list(episode.words)
    assert len(words) == task.words and words[0] == "plan" and words[5] == "go"
    plan, steps = words[1:5], [words[i : i + 3] for i in range(6, len(words), 3)]
    at, target, gusts = PLACES.index(steps[0][0]), 0, 0
    for n, (place, weather, action) in enumerate(steps, 1):
        assert place == PLACES[at]
        gusts += weather == GUST
        if place == plan[target]:
            assert (
                action == (MOSTLY_GUSTY if 2 * gusts >= n else MOSTLY_CALM) and episode.kinds[n - 1] == "stop"
            )
            target = (target + 1) % 4
        else:
            towards = PLACES.index(plan[target]) > at
            assert (action == RIGHT) == towards
            first = n == 1 or episode.kinds[n - 2] == "stop"
            assert episode.kinds[n - 1] == ("turn" if first else "straight")
            at += 1 if towards else -1
    assert target != 0 or "stop" in episode.kinds


def test_episodes_depend_on_the_seed_alone():
    assert draw_patrols(3, 5) == draw_patrols(3, 5) != draw_patrols(3, 6)


def test_a_model_that_says_the_actions_is_right():
    tokenizer = pico.tokenizer()
    episode = draw_patrol(random.Random(0), Patrol(sites=3, steps=30))
    ids, first = encoded(episode, lambda s: tokenizer.encode(s, add_special_tokens=False))
    assert len(first) == 30 and "".join(tokenizer.decode(ids).split()) == "".join(episode.text.split())
    ids = torch.tensor(ids)
    vocabulary = int(ids.max()) + 1
    logits = torch.nn.functional.one_hot(ids.roll(-1), vocabulary).float()
    found = rights(logits, ids, first, episode.kinds, tokenizer)
    assert all(all(own) for own in found.values()) and sum(map(len, found.values())) > 30
    half = rights(logits[len(ids) // 2 :], ids, first, episode.kinds, tokenizer)
    assert 10 <= sum(len(half[kind]) for kind in ("turn", "straight", "stop")) <= 20
    wrong = rights(logits.roll(1, 1), ids, first, episode.kinds, tokenizer)
    assert not any(wrong["turn"]) and not any(wrong["report"])
