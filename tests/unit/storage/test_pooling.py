"""Chunks that leave the window become one row each: by hand, and what such a layer holds."""

from __future__ import annotations

import itertools
import math

import pico
import pytest
import torch
from evicting_caches import LENGTH, PADS, evicting_cache, policy, record
from pico import attached, feed, prompt
from torch import nn

import lowkey
from lowkey.ops.chunk_gate import STATE_WIDTH, chunks_to_pool
from lowkey.policies.chunks import ChunkGate, ChunkMean

SINKS, RECENT, CHUNK = 3, 5, 7


def turned(model, keys, positions, back):
    """Keys (n, d) in fp64, each pair of channels turned by its angle at these positions."""
    cos, sin = model.model.rotary_emb(keys.unsqueeze(0), torch.tensor([positions]))
    half = keys.shape[1] // 2
    angles = torch.atan2(sin, cos)[0, :, :half].double() * (-1 if back else 1)
    pairs = torch.complex(keys[:, :half].double(), keys[:, half:].double())
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], 1)


class ByHand:
    """One head of a layer: what it holds, in fp64, with torch's own LSTM as the gate."""

    def __init__(self, model, made, layer, head, gate):
        self.model, self.made, self.layer, self.head, self.gate = model, made, layer, head, gate
        self.tokens, self.rows, self.seen = [], [], []  # positions; (centre, count, key, value, score); u
        if gate:
            width = gate["lstm.in"].shape[1]
            self.lstm = nn.LSTM(width, STATE_WIDTH).double()
            with torch.no_grad():
                self.lstm.weight_ih_l0.copy_(gate["lstm.in"])
                self.lstm.weight_hh_l0.copy_(gate["lstm.state"])
                self.lstm.bias_ih_l0.copy_(gate["lstm.bias"])
                self.lstm.bias_hh_l0.zero_()

    def row(self, number, positions, keys, values):
        """The row of a chunk: (centre, count, rotated key, value, score)."""
        centre = sum(positions) // len(positions)
        key = turned(self.model, keys[positions], positions, True).mean(0)
        value = values[positions].double().mean(0)
        score = float(number)
        if self.gate:
            gate = {name: t.double() for name, t in self.gate.items()}
            u = torch.cat([key, value]) - gate["centre"][self.head]
            self.seen.append(u)
            with torch.no_grad():
                out, _ = self.lstm(torch.stack(self.seen))
            score = float(out[-1] @ gate["gate.weight"] + gate["gate.bias"])
            fix = []
            for name in ("keys", "values"):
                inner = torch.relu(gate[f"{name}.in"] @ u + gate[f"{name}.in_bias"])
                fix.append(gate[f"{name}.out"] @ inner + gate[f"{name}.out_bias"])
            key, value = key + fix[0], value + fix[1]
        key = turned(self.model, key.unsqueeze(0), [centre], False)[0]
        return centre, len(positions), key, value, score

    def evict(self, n, budget, keys, values):
        old = [p for p in self.tokens if SINKS <= p < n - RECENT]
        numbers = sorted({(p - SINKS) // CHUNK for p in old})
        stays = len(self.tokens) - len(old)
        choices = [numbers[0], *(number + 1 for number in numbers)] if numbers else [0]
        for until in choices:
            whole = SINKS + until * CHUNK <= n - RECENT
            gone = [p for p in old if (p - SINKS) // CHUNK < until]
            new = len({(p - SINKS) // CHUNK for p in gone})
            wanted = min(math.ceil(self.made.keep * until), len(self.rows) + new)
            if stays + len(old) - len(gone) + wanted <= budget and whole:
                break
        for number in sorted({(p - SINKS) // CHUNK for p in gone}):
            own = [p for p in gone if (p - SINKS) // CHUNK == number]
            self.rows.append(self.row(number, own, keys, values))
        self.tokens = [p for p in self.tokens if p not in gone]
        room = max(0, budget - len(self.tokens))
        best = sorted(range(len(self.rows)), key=lambda i: -self.rows[i][4])[:room]
        self.rows = [self.rows[i] for i in sorted(best)]

    def attend(self, query, keys, values, scaling):
        k = torch.cat([keys[self.tokens].double(), *(row[2].unsqueeze(0) for row in self.rows)])
        v = torch.cat([values[self.tokens].double(), *(row[3].unsqueeze(0) for row in self.rows)])
        scores = query.double() @ k.mT * scaling
        bias = [0.0] * len(self.tokens) + [math.log(row[1]) for row in self.rows]
        return (scores + torch.tensor(bias, dtype=torch.float64)).softmax(-1) @ v


MADE = {
    "chunk-mean": {"keep": 1.0},
    "chunk-mean half": {"keep": 0.5},
    "chunk-gate": {"keep": 0.6},
    "chunk-gate most": {"keep": 1.0},
}


@pytest.mark.defines("policies", "chunk-mean", "chunk-gate")
@pytest.mark.parametrize("which", MADE)
@pytest.mark.parametrize("budget", [24, 40])
def test_attention_is_that_over_tokens_and_rows_of_chunks(which, budget):
    """Over two evictions, each of which makes rows of what it takes from the window."""
    model, name = attached("llama"), which.split()[0]
    made = policy(name, f"{budget} tokens", sinks=SINKS, recent=RECENT, chunk=CHUNK, **MADE[which])
    cache = evicting_cache(model, made)
    for layer in cache.evicting:
        layer.gates = {n: 0.3 * t for n, t in layer.gates.items()}
    seen = record(cache)
    first = 70
    feed(model, prompt(LENGTH, 1), cache, None, [first, LENGTH - first - 2, 1, 1])
    pooled = 0
    for layer, log in zip(cache.evicting, seen, strict=True):
        keys, values = (torch.cat([entry[k] for entry in log], 2)[0] for k in (0, 1))
        call, out = log[-1][2:]
        for j in range(4):
            hand = ByHand(model, made, layer.layer_slot, j, dict(layer.gates))
            for start, stop in ((0, first), (first, LENGTH - 2)):
                hand.tokens += range(start, stop)
                hand.evict(stop, budget, keys[j], values[j])
            hand.tokens += [LENGTH - 2, LENGTH - 1]
            held = sorted([*hand.tokens, *(row[0] for row in hand.rows)])
            assert layer.kept_positions(0)[j].tolist() == held
            wanted = hand.attend(call.query[0, j, :, 0], keys[j], values[j], call.scaling)
            assert (out[0, j, :, 0].double() - wanted).abs().max() < 2e-4 * max(1, float(wanted.abs().max()))
            pooled += len(hand.rows)
    assert pooled >= 12


def brute(sizes, whole, others, held, budget, keep):
    """`chunks_to_pool` for one row, in a loop."""
    numbers = [i for i, n in enumerate(sizes) if n]
    tokens = others + sum(sizes)
    for until in [*numbers[:1], *(i + 1 for i in numbers)]:
        left = tokens - sum(sizes[:until])
        new = sum(n > 0 for n in sizes[:until])
        fits = left + min(math.ceil(keep * until), held + new) <= budget
        if fits and (until == 0 or whole[until - 1]):
            return until, budget - left
    return len(sizes), max(0, budget - tokens + sum(sizes))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.5, 1.0])
def test_no_more_chunks_go_than_the_budget_demands(keep):
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(0, 5, (300, 6), generator=generator)
    for sizes in draws:
        sizes = sizes.clone()
        sizes[: int(sizes[0])] = 0  # chunks that went before
        whole = torch.arange(6) < 5
        others, held = int(draws[0, 0]) + 3, int(sizes[5])
        for budget in (others, others + 2, others + 9, others + 40):
            if not bool((sizes > 0).any()):
                continue
            first, allowed = chunks_to_pool(
                sizes, whole, torch.tensor(others), torch.tensor(held), torch.tensor(budget), keep
            )
            wanted = brute(sizes.tolist(), whole.tolist(), others, held, budget, keep)
            assert (sizes[: int(first)].sum(), int(allowed)) == (sum(sizes.tolist()[: wanted[0]]), wanted[1])


@pytest.mark.parametrize("name", ["chunk-mean", "chunk-gate"])
def test_tokens_and_chunks_part_the_sequence(name):
    """With a row for every chunk no token is lost or counts twice, in padded rows and while decoding."""
    model = attached("llama")
    cache = evicting_cache(model, policy(name, "40 tokens", keep=1.0, chunk=5, every=3))
    feed(model, prompt(LENGTH), cache, PADS, [60, LENGTH - 72, *[1] * 12])
    assert cache.nbytes() == cache.predicted_nbytes()
    for layer in cache.evicting:
        counts = layer.pooled_counts.long()
        row = torch.arange(2 * 4).repeat_interleave(layer.pooled_starts.diff())
        sums = torch.zeros(8, dtype=torch.long).index_add_(0, row, counts).view(2, 4)
        for i, pads in enumerate(PADS):
            rows = layer.pooled_starts.diff().view(2, 4)[i]
            tokens = torch.tensor([len(p) for p in layer.kept_positions(i)]) - rows
            assert (sums[i] + tokens).tolist() == [LENGTH - pads] * 4


def test_random_chunks_are_others_for_another_seed():
    kept = {}
    for choose, seed in (("newest", 0), ("random", 0), ("random", 1)):
        made = ChunkMean("40 tokens", sinks=2, recent=4, chunk=4, keep=0.5, choose=choose, seed=seed)
        cache = evicting_cache(attached("llama"), made)
        feed(attached("llama"), prompt(LENGTH, 1), cache)
        kept[choose, seed] = [p.tolist() for p in cache.kept_positions(1)]
        assert {len(p) for p in kept[choose, seed]} <= set(range(36, 41))
    assert all(a != b for a, b in itertools.combinations(kept.values(), 2))
    assert len({tuple(p) for p in kept["random", 0]}) > 1 == len({tuple(p) for p in kept["newest", 0]})


@pytest.mark.parametrize(("layout", "bits"), [("pre_rope", None), ("post_rope", 4), (None, "kivi2")])
def test_rank_and_integers_hold_whole_rows_of_chunks(layout, bits):
    model = attached("llama")
    plan = pico.plan(model, 9, 9, layout=layout) if layout else None
    made = ChunkMean("50 tokens", chunk=4)
    cache = lowkey.make_cache(model, plan, made, bits=bits)
    feed(model, prompt(LENGTH), cache, PADS, [LENGTH - 4, 1, 1, 1, 1])
    assert cache.nbytes() == cache.predicted_nbytes()
    for layer in cache.evicting:
        assert len(layer.pooled_positions) and layer.pooled_keys.dtype == model.dtype


def test_a_share_of_chunks_is_what_the_gate_finds_best(monkeypatch):
    """Those that have a row score higher than all that have none."""
    made, scores, rows = ChunkGate("30 tokens", sinks=2, recent=4, chunk=4, keep=0.3), [], ChunkGate.rows

    def spy(self, *args):
        found = rows(self, *args)
        scores.append(found[2])
        return found

    monkeypatch.setattr(ChunkGate, "rows", spy)
    cache = evicting_cache(attached("llama"), made)
    feed(attached("llama"), prompt(LENGTH, 1), cache)
    for layer, own in zip(cache.evicting, scores, strict=True):
        held = layer.pooled_scores.split(layer.pooled_starts.diff().tolist())
        for j, best in enumerate(held):
            assert torch.equal(best.sort().values, own[0, j].sort().values[-len(best) :])
            assert 0 < len(best) < own.shape[2]
