"""Caches that hold tokens in two widths: what the policy keeps in one, all other tokens in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pico
import pytest
import torch
from cache_kinds import agree
from evicting_caches import PADS, made, record
from packing_by_hand import BLOCK, rounded
from pico import attached, feed, prompt

import lowkey
from lowkey import Exact, load_cache
from lowkey.catalog import make_policy
from lowkey.core.types import LowkeyError
from lowkey.policies import POLICIES, SnapKV
from lowkey.policies.base import Rest
from lowkey.storage.packing import SCHEMES

LENGTH, STEPS, WINDOW = 120, 3, Exact(2, 5)
SIZES = {4: 8 + 2 * 4, 2: 4 + 2 * 4}  # bytes of the 16 channels of a key in integers, in fp32


def chosen(name="snapkv", budget="30%", **options):
    return make_policy(name, budget, {"sinks": "2", "recent": "5"} | {k: str(v) for k, v in options.items()})


def rest_of(layer, row):
    """For each head, the positions that are held in fewer bits."""
    starts, positions = layer.rest_starts.tolist(), layer.rest_positions
    rows = range(row * layer.row_heads, (row + 1) * layer.row_heads)
    return [positions[starts[i] : starts[i + 1]] for i in rows]


def as_held(x, at, packing):
    """Tokens `at` of a head's keys or values (s, d) as a row holds them; the last block is filled up."""
    if not packing:
        return x[at].double()
    name, bits = packing
    if name != "kivi":
        return rounded(x[at], False, bits).double()
    filled = torch.cat([x[at], x[at][-1:].expand(-len(at) % BLOCK, -1)])
    return rounded(filled, True, bits)[: len(at)].double()


def seen_by(layer, row, pad, head, whole, packings, per_channel):
    """Keys or values of one head as the newest query should see them, by hand: (s, d)."""
    kept, rest = (x[head].long() + pad for x in (layer.kept_positions(row), rest_of(layer, row)))
    end = LENGTH + STEPS
    own, others = ((p if per_channel or p is None or p[0] != "kivi" else ("int", p[1])) for p in packings)
    exact = [t for t in kept.tolist() if t >= end - WINDOW.recent or t < pad + WINDOW.sinks]
    in_rows = [t for t in kept.tolist() if pad + WINDOW.sinks <= t < LENGTH - WINDOW.recent]
    decoded = [t for t in kept.tolist() if LENGTH - WINDOW.recent <= t < end - WINDOW.recent]
    in_blocks = packings[0] and packings[0][0] == "kivi"  # dense tokens that fill no block yet
    parts = [
        as_held(whole, exact, None),
        as_held(whole, in_rows, own),
        as_held(whole, decoded, None if in_blocks else own),
        as_held(whole, rest.tolist(), others),
    ]
    assert sorted([*exact, *in_rows, *decoded, *rest.tolist()]) == list(range(pad, end))
    return torch.cat(parts)


@pytest.mark.parametrize("allocator", ["uniform", "ada"])
@pytest.mark.parametrize(
    ("bits", "own", "rest", "others"),
    [
        (None, None, "int2", ("int", 2)),
        (4, ("int", 4), "int2", ("int", 2)),
        (4, ("int", 4), "kivi2", ("kivi", 2)),
        ("kivi4", ("kivi", 4), "int2", ("int", 2)),
        ("kivi8", ("kivi", 8), "kivi4", ("kivi", 4)),
    ],
)
@torch.no_grad()
def test_a_step_attends_to_all_tokens_each_in_its_width(bits, own, rest, others, allocator):
    """One softmax over exact tokens, kept ones, and the rest, in double precision; each was rounded once."""
    model = attached("llama")
    cache = made(chosen(allocator=allocator, rest=rest), bits=bits, exact=WINDOW)
    logs = record(cache)
    feed(model, prompt(LENGTH + STEPS), cache, PADS, [LENGTH, *[1] * STEPS])
    assert cache.nbytes() == cache.predicted_nbytes()
    for layer, log in zip(cache.evicting, logs, strict=True):
        keys, values = (torch.cat([entry[k] for entry in log], 2) for k in (0, 1))
        call, out = log[-1][2:]
        for row, pad in enumerate(PADS):
            for head in range(4):
                k = seen_by(layer, row, pad, head, keys[row, head], (own, others), True)
                v = seen_by(layer, row, pad, head, values[row, head], (own, others), False)
                weights = (call.query[row, head, :, 0].double() @ k.mT * call.scaling).softmax(-1)
                torch.testing.assert_close(
                    out[row, head, :, 0].double(), weights @ v, rtol=0, atol=2e-5 * float(v.abs().max())
                )


@torch.no_grad()
def test_bytes_are_those_of_two_widths():
    model, layers, heads = attached("llama"), 3, 4
    cache = made(chosen(rest="int2"), bits=4, exact=WINDOW)
    model(prompt(LENGTH, batch=1), past_key_values=cache)
    kept = round(0.3 * LENGTH)
    in_rows = kept - 2 - 5
    exact = (2 + 5) * 2 * pico.HEAD_DIM * 4
    of_head = exact + in_rows * (2 * SIZES[4] + 4) + (LENGTH - kept) * (2 * SIZES[2] + 4)
    indices = 2 * (heads + 1) * 8 + 2 * 8 + 2 * 4
    assert cache.nbytes() == layers * (heads * of_head + indices)


@pytest.mark.parametrize("rest", ["int2", "kivi2"])
@pytest.mark.parametrize("name", ["snapkv", "h2o", "zipvl", "kv-compress", "random"])
def test_every_token_stays_and_none_comes_back(name, rest):
    """Over a prompt, two turns and refreshes while decoding; rows ascend."""
    model = attached("llama")
    cache = made(chosen(name, every=7, rest=rest), bits="kivi4" if rest == "kivi2" else 4, exact=WINDOW)
    before, seen = {}, 0
    for n in (60, 20, *[1] * 15):
        ids = prompt(n, seed=seen)
        seen += n
        feed(model, ids, cache, [0, 0])
        agree(cache, seen)
        for i, layer in enumerate(cache.evicting):
            for row in range(2):
                kept, rest_now = layer.kept_positions(row), rest_of(layer, row)
                for head, (a, b) in enumerate(zip(kept, rest_now, strict=True)):
                    assert sorted([*a.tolist(), *b.tolist()]) == list(range(seen))
                    assert bool((b.diff() > 0).all())
                    assert before.get((i, row, head), set()) <= set(b.tolist())
                    before[i, row, head] = set(b.tolist())
    assert len(set().union(*before.values())) > 30


@pytest.mark.parametrize("rate", [False, True])
@pytest.mark.parametrize("allocator", ["uniform", "ada", "global", "layer-mass", "pyramid"])
@pytest.mark.parametrize(
    ("bits", "rest", "granted"), [(None, "int2", 112_500), (4, "int2", 66_000), ("kivi8", "kivi2", 88_500)]
)
def test_a_budget_of_bytes_counts_both_widths(bits, rest, granted, allocator, rate):
    model, length = attached("llama"), 150
    budget = f"{granted // length} B/token" if rate else f"{granted} B"
    cache = made(chosen(budget=budget, allocator=allocator, rest=rest), bits=bits, exact=WINDOW)
    feed(model, prompt(length, batch=1), cache, [0])
    held = agree(cache, "after the prompt")
    assert held <= granted
    filled = 31 * 3 * 4 * (20 + 44) if rest == "kivi2" else 0  # the last block of every row, in both widths
    assert held > granted - filled - 1000
    kept = sum(len(at) for layer in cache.evicting for at in layer.kept_positions(0))
    others = sum(len(at) for layer in cache.evicting for at in rest_of(layer, 0))
    assert kept + others == 12 * length and min(kept, others) > 12 * 20


def test_a_budget_too_small_for_the_rest_is_refused():
    model, policy = attached("llama"), chosen(budget="10 KiB", rest="int2")
    cache = made(policy, bits=4, exact=WINDOW)
    with pytest.raises(LowkeyError, match="10 KiB") as error:
        feed(model, prompt(150, batch=1), cache, [0])
    least = str(error.value).split(" take ")[1].split(" for ")[0]
    cache = made(chosen(budget=least, rest="int2"), bits=4, exact=WINDOW)
    feed(model, prompt(150, batch=1), cache, [0])
    kept = sum(len(at) for layer in cache.evicting for at in layer.kept_positions(0))
    assert 12 * 7 <= kept <= 12 * 7 + 13  # the message rounds up to a tenth of a KiB


@dataclass(frozen=True)
class Peeking(SnapKV):
    """SnapKV that shows its contexts."""

    contexts: ClassVar[list] = []
    note: str = field(default="", metadata={})

    def score(self, context):
        self.contexts.append(context)
        return super().score(context)


def test_a_refresh_scores_by_attention_over_all_tokens():
    model = attached("llama")
    cache = made(Peeking("30%", sinks=2, recent=5, every=6, rest="int2"), exact=Exact(0, 0))
    logs = record(cache)
    feed(model, prompt(46, batch=1), cache, [0], [40, *[1] * 6])
    for i, (log, layer) in enumerate(zip(logs, cache.evicting, strict=True)):
        first, second = Peeking.contexts[i], Peeking.contexts[3 + i]
        assert first.positions.shape[2] == 40
        assert all(
            sorted(p[v].tolist()) == list(range(46))
            for p, v in zip(second.positions[0], second.valid[0], strict=True)
        )
        keys = torch.cat([entry[0] for entry in log], 2)[0]
        for head in range(4):
            at, there = second.positions[0, head], second.valid[0, head]
            low = set(rest_of(layer, 0)[head].tolist())
            for t in there.nonzero().flatten().tolist():
                near = rounded(keys[head, at[t] : at[t] + 1], False, 2)[0]
                off = (second.keys[0, head, t] - keys[head, at[t]]).abs().max()
                # what came back rounded was in fewer bits already, and still is
                assert off < 1e-6 or (
                    int(at[t]) in low and torch.allclose(second.keys[0, head, t], near, atol=1e-5)
                )
    Peeking.contexts.clear()


def test_a_saved_cache_holds_both_widths(tmp_path):
    model = attached("llama")
    cache = made(chosen(rest="int2", every=9), bits=4, exact=WINDOW)
    feed(model, prompt(LENGTH), cache, PADS)
    cache.save(tmp_path / "cache")
    again = load_cache(tmp_path / "cache", model)
    assert agree(again, "loaded") == cache.nbytes()
    more = prompt(1, seed=4)
    assert torch.equal(feed(model, more, cache, PADS), feed(model, more, again, PADS))
    for layer in again.evicting:
        layer.make_compact()
        assert layer.own_flaw(4, 16, 16) is None
        layer.rest_positions = layer.rest_positions.flip(0)
        assert layer.own_flaw(4, 16, 16)


def test_chosen_rows_take_both_widths_along():
    model = attached("llama")
    cache = made(chosen(rest="kivi2", allocator="ada"), bits="kivi4", exact=WINDOW)
    feed(model, prompt(LENGTH), cache, PADS)
    wanted = [[x.tolist() for x in rest_of(layer, 1)] for layer in cache.evicting]
    cache.batch_select_indices(torch.tensor([1]))
    agree(cache, "chosen")
    assert [[x.tolist() for x in rest_of(layer, 0)] for layer in cache.evicting] == wanted


# -- names and refusals


def test_the_rest_is_a_packing_or_dropped():
    names = {name for name in SCHEMES if not name.startswith("hadamard")}
    assert set(Rest.__args__) == {"drop", *names}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: POLICIES["think"]("50%", rest="int2"), "rest 'int2' of ThinK"),
        (lambda: POLICIES["razor"]("50%", rest="int2"), "rest 'int2' of Razor"),
        (lambda: POLICIES["snapkv"]("50%", rest="int3"), "rest"),
        (lambda: made(SnapKV("50%", rest="int4"), bits=4), "rest 'int4' of policy 'snapkv'"),
        (lambda: made(SnapKV("50%", rest="kivi4"), bits="kivi2"), "must take fewer"),
    ],
)
def test_what_cannot_be_held_in_two_widths_is_refused(make, says):
    with pytest.raises(LowkeyError, match=says) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_full_budget_holds_all_tokens_in_their_own_form():
    model, ids = attached("llama"), prompt(60)
    mixed, plain = (made(chosen(budget="100%", rest=rest), bits=4) for rest in ("int2", "drop"))
    a, b = (feed(model, ids, cache, PADS, [40, *[1] * 20]) for cache in (mixed, plain))
    assert torch.equal(a, b) and not any(layer.rest_entries for layer in mixed.evicting)


def test_zipvl_as_published_holds_four_and_two_bits():
    """Without a budget: a layer's important tokens stay in 4 bits for good, the rest takes 2."""
    model = attached("llama")
    policy = chosen("zipvl", None, tau=0.5, rest="int2", every=10)
    cache = made(policy, bits=4)
    lowkey.prefill(model, None, cache, prompt(80))
    before = [set(layer.kept_positions(0)[0].tolist()) for layer in cache.evicting]
    for ids in prompt(20, seed=1).split(1, 1):
        feed(model, ids, cache, [0, 0])
    agree(cache, "after two refreshes")
    for layer, kept in zip(cache.evicting, before, strict=True):
        now, rest = set(layer.kept_positions(0)[0].tolist()), set(rest_of(layer, 0)[0].tolist())
        assert not now & rest and now | rest == set(range(100)) and rest
        # tokens of the exact window had not been chosen yet
        assert {p for p in kept if p < 48} <= now
