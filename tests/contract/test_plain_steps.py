"""Steps of decoding for which nothing looks at the value of a tensor give what all other steps give."""

from __future__ import annotations

import pico
import pytest
import torch
from cache_kinds import CASES, KINDS, agree, feed
from counted_steps import (
    EVICTING,
    LATENTS,
    LIMITS,
    MANY_OPERATIONS,
    MORE_OPERATIONS,
    NOT_PLAIN,
    PROMPT,
    SELECTING,
    STEPS,
    Counted,
    Reads,
    filled,
    operations_of_stock,
    steps,
)
from failing_calls import same, state

import lowkey
from lowkey.backends import numba_cpu
from lowkey.storage import stepping

# of texts in which no number lies so close to the middle of two codes that a sum in another order decides
OTHER_SEEDS = {"mixed-4": 5, "mixed-merged-pre": 4, "mixed-every": 4}


@pytest.mark.parametrize(("kind", "name"), [*CASES, *((kind, "llama") for kind in (*LATENTS, *SELECTING))])
def test_plain_steps_give_what_other_steps_give(kind, name, monkeypatch):
    model, cache = filled(kind, name)
    seed = OTHER_SEEDS.get(kind, 3)
    plain = steps(model, cache, STEPS, seed)
    monkeypatch.setattr(stepping.SteppingLayer, "_is_plain", lambda *_: False)
    _, other = filled(kind, name)
    torch.testing.assert_close(plain, steps(model, other, STEPS, seed), atol=2e-4, rtol=0)
    for a, b in zip(state(cache), state(other), strict=True):
        assert {n: (t.shape, t.dtype) for n, t in a.items()} == {n: (t.shape, t.dtype) for n, t in b.items()}
    assert agree(cache, "compact") == agree(other, "compact")


@pytest.mark.parametrize("kind", [k for k in (*KINDS, *SELECTING) if k not in NOT_PLAIN])
def test_a_plain_step_reads_no_value(kind):
    model, cache = filled(kind, "llama")
    steps(model, cache, 2)  # looks once whether there is padding, and makes room
    with Reads() as reads:
        feed(model, cache, pico.prompt(1, batch=2))
    assert reads.found == []


@pytest.mark.parametrize("kind", [k for k in (*KINDS, *LATENTS, *SELECTING) if k not in MANY_OPERATIONS])
def test_a_plain_step_takes_few_operations(kind):
    assert numba_cpu.available()
    model, cache = filled(kind, "llama")
    steps(model, cache, 2)
    with Counted() as own:
        feed(model, cache, pico.prompt(1, batch=2))
    more = LIMITS.get(kind, MORE_OPERATIONS)
    assert own.operations <= operations_of_stock() + more * pico.LAYERS


@pytest.mark.parametrize("kind", EVICTING)
def test_a_step_that_evicts_has_bounded_costs(kind):
    assert numba_cpu.available()
    model, cache = filled(kind, "llama")
    steps(model, cache, 2)
    with Counted() as own, Reads() as reads:
        feed(model, cache, pico.prompt(1, batch=2))
    most_reads, more = EVICTING[kind]
    assert 0 < len(reads.found) <= most_reads * pico.LAYERS
    assert own.operations <= operations_of_stock() + more * pico.LAYERS


def test_steps_between_selections_read_no_value():
    model, cache = filled("every-8", "llama")
    reading = []
    for n, ids in enumerate(pico.prompt(26, batch=2, seed=3).split(1, 1), 1):
        with Reads() as reads:
            feed(model, cache, ids)
        reading += [n] if reads.found else []
    assert reading == [1, 8, 16, 24]  # the first may be a question of one token


@pytest.mark.parametrize("kind", ["bits-8", "bits-kivi4", "plan-exact", "plan-4", "snapkv-kivi2", "every-8"])
@pytest.mark.parametrize("taken", [1, 7, stepping.ROOM, stepping.ROOM + 1])
def test_a_step_that_fails_within_a_room_is_undone(kind, taken, monkeypatch):
    model, cache = filled(kind, "llama")
    steps(model, cache, taken)
    size, last = cache.nbytes(), model.get_decoder().layers[1].self_attn.o_proj
    monkeypatch.setattr(type(last), "forward", _interrupted(type(last).forward, last))
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, pico.prompt(1, batch=2))
    monkeypatch.undo()
    cache.get_seq_length()
    _, straight = filled(kind, "llama")
    steps(model, straight, taken)
    assert cache.nbytes() == size == cache.predicted_nbytes()
    assert torch.equal(steps(model, cache, 3, seed=5), steps(model, straight, 3, seed=5))
    assert same(state(cache), state(straight))


def _interrupted(forward, where):
    """A forward that is interrupted in one module."""

    def run(self, *args, **kwargs):
        if self is where:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    return run


def test_positions_that_do_not_count_up_are_refused_in_a_room():
    model, cache = filled("bits-8", "llama")
    steps(model, cache, 3)
    before = state(cache)
    wrong = torch.full((2, 1), PROMPT + 7)
    with pytest.raises(lowkey.LowkeyError, match="position_ids: "):
        model(pico.prompt(1, batch=2), past_key_values=cache, position_ids=wrong)
    assert same(state(cache), before)


def test_moved_tensors_are_read_where_they_are():
    model, cache = filled("bits-8", "llama")
    steps(model, cache, 3)
    _, straight = filled("bits-8", "llama")
    steps(model, straight, 3)
    for layer in cache.layers:
        layer.map_tensors(lambda t: t.clone())
        layer.recent_k[:, :, : layer.room.window] += 1.0
    for layer in straight.layers:
        layer.recent_k[:, :, : layer.room.window] += 1.0
    assert torch.equal(steps(model, cache, 2, seed=5), steps(model, straight, 2, seed=5))
