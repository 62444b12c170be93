"""Steps over rows of different length take the plain path, too, and no row depends on its neighbours."""

from __future__ import annotations

import pico
import pytest
import torch
from cache_kinds import KINDS, agree
from counted_steps import (
    MORE_OPERATIONS,
    NOT_PLAIN,
    STEPS,
    Counted,
    Reads,
    fed,
    filled,
    operations_of_stock,
    reads_of_stock,
    steps,
)
from failing_calls import same, state

from lowkey import make_cache
from lowkey.backends import numba_cpu
from lowkey.models.fingerprint import model_fingerprint
from lowkey.storage import stepping
from lowkey.storage.exact import Exact, SinkPoints, SinkRule

PADS = [7, 0, 43]  # the blocks of 32 tokens begin and end at other steps in each row
# one of each way to store tokens
STORED = (
    *(
        "bits-8",
        "bits-kivi4",
        "exact",
        "plan",
        "plan-pre",
        "plan-kivi",
        "plan-exact",
        "rule",
        "snapkv",
        "think",
        "matching",
    ),
    *("plan-h2o", "snapkv-kivi2", "merged-pre-global-8", "every-hadamard4", "every-global", "dynamic-pre"),
)
PLAIN = [kind for kind in STORED if kind not in NOT_PLAIN]


@pytest.mark.parametrize("with_numba", [True, False], ids=["numba", "torch"])
@pytest.mark.parametrize("kind", STORED)
def test_padded_steps_give_what_other_steps_give(kind, with_numba, monkeypatch):
    if not with_numba:
        monkeypatch.setattr(numba_cpu, "available", lambda: False)
    model, cache = filled(kind, "llama", PADS)
    plain = steps(model, cache, STEPS, pads=PADS)
    monkeypatch.setattr(stepping.SteppingLayer, "_is_plain", lambda *_: False)
    _, other = filled(kind, "llama", PADS)
    # a sum that is rounded in another way may turn the last bit of an integer
    torch.testing.assert_close(plain, steps(model, other, STEPS, pads=PADS), atol=1e-3, rtol=0)
    for a, b in zip(state(cache), state(other), strict=True):
        assert {n: (t.shape, t.dtype) for n, t in a.items()} == {n: (t.shape, t.dtype) for n, t in b.items()}
    assert agree(cache, "compact") == agree(other, "compact")


@pytest.mark.parametrize("kind", PLAIN)
def test_a_padded_step_reads_no_value(kind):
    model, cache = filled(kind, "llama", PADS)
    steps(model, cache, 2, pads=PADS)
    with Reads() as reads:
        fed(model, cache, pico.prompt(1, batch=3), PADS)
    # transformers asks once per step whether there is padding
    assert reads.found == reads_of_stock(PADS)
    assert all(layer.room is not None for layer in cache.layers)


@pytest.mark.parametrize("kind", ["bits-8", "bits-kivi4", "snapkv-kivi2"])
def test_a_padded_step_takes_few_operations(kind):
    assert numba_cpu.available()
    model, cache = filled(kind, "llama", PADS)
    steps(model, cache, 2, pads=PADS)
    with Counted() as own:
        fed(model, cache, pico.prompt(1, batch=3), PADS)
    assert own.operations <= operations_of_stock(PADS) + MORE_OPERATIONS * pico.LAYERS


@pytest.mark.parametrize("row", range(len(PADS)))
@pytest.mark.parametrize(
    "kind", ["bits-8", "bits-kivi4", "bits-hadamard4", "plan-kivi", "plan-exact", "exact"]
)
def test_a_padded_row_gives_what_it_gives_alone(kind, row):
    model, cache = filled(kind, "llama", PADS)
    found = steps(model, cache, STEPS, pads=PADS)[row]
    alone, pad = KINDS[kind](model), PADS[row]
    fed(model, alone, pico.prompt(80, batch=3)[row : row + 1, pad:])
    ids = pico.prompt(STEPS, batch=3, seed=3)[row : row + 1]
    want = torch.cat([fed(model, alone, x) for x in ids.split(1, 1)], 1)[0]
    # sums in another order may bring a number to the other side of a code of 8 bits
    torch.testing.assert_close(found, want, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["bits-8", "bits-kivi4", "snapkv", "exact"])
def test_a_mask_that_hides_a_token_is_honoured_or_refused(kind, monkeypatch):
    """Within a room, too."""
    outcomes = []  # the plain path has to leave this step to the general one
    for plain in (True, False):
        if not plain:
            monkeypatch.setattr(stepping.SteppingLayer, "_is_plain", lambda *_: False)
        model, cache = filled(kind, "llama", PADS)
        steps(model, cache, 5, pads=PADS)
        mask, positions = pico.padding(PADS, 86)
        mask[1, 30] = 0
        before = state(cache)
        try:
            with torch.no_grad():
                out = model(
                    pico.prompt(1, 3),
                    past_key_values=cache,
                    attention_mask=mask,
                    position_ids=positions[:, 85:],
                ).logits
        except Exception as error:
            assert same(state(cache), before)
            out = str(error)
        outcomes.append(out)
    if isinstance(outcomes[0], str):
        assert outcomes[0] == outcomes[1]
    else:
        torch.testing.assert_close(*outcomes, atol=2e-4, rtol=0)


@pytest.mark.parametrize("pads", [None, PADS])
@pytest.mark.parametrize("bits", [8, "kivi8"])
def test_sinks_that_come_within_a_room_are_found(bits, pads, monkeypatch):
    model, found = pico.attached("llama"), []
    points = SinkPoints(torch.zeros(1, 4, pico.HEAD_DIM), torch.full((1,), 7.8))  # some 2 % of the tokens
    rule = SinkRule({1: points, 2: points}, (0,), 1, model_fingerprint(model))
    for plain in (True, False):
        if not plain:
            monkeypatch.setattr(stepping.SteppingLayer, "_is_plain", lambda *_: False)
        cache = make_cache(model, bits=bits, exact=Exact(6, 33, rule=rule))
        fed(model, cache, pico.prompt(80, len(pads or [0, 0])), pads)
        before = [x.clone() for x in (layer.sink_index for layer in cache.layers)]
        found.append((steps(model, cache, 80, pads=pads), state(cache)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-3, rtol=0)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a["sink_index"], b["sink_index"])
        torch.testing.assert_close(a["sink_k"], b["sink_k"], atol=1e-3, rtol=0)
    assert not torch.equal(before[-1], a["sink_index"])
