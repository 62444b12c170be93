"""The gates of `chunk-gate`: what the model sees in training, what gradients reach, and resuming."""

from __future__ import annotations

import dataclasses

import pico
import pytest
import torch
from pico import attached, prompt, stock

import lowkey
from lowkey.core.types import LowkeyError
from lowkey.heads.chunk_gate import ChunkGatesInTraining, ChunkGateTraining, train_chunk_gate
from lowkey.models.weights import only_trainable
from lowkey.policies.chunks import ChunkGate

CORPUS = " ".join(f"word{(i * i) % 89}" for i in range(4000))
SHORT = ChunkGateTraining(chunk=4, sinks=2, recent=6, continuation=10, steps=6, lr=1e-2, save_every=2)


def trained(model, **options):
    given = {"corpus": CORPUS, "windows": 3, "context": 48, "training": SHORT} | options
    return train_chunk_gate(model, pico.tokenizer(), **given)


def same(a, b):
    pairs = zip(a.layers, b.layers, strict=True)
    return all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in pairs)


def state(name="llama", length=48, **options):
    model = attached(name)
    return ChunkGatesInTraining(model, prompt(length, 3), dataclasses.replace(SHORT, **options)), model


def set_gates(training, bias):
    with torch.no_grad():
        for name, p in training.parameters.items():
            if name.endswith("gate.bias"):
                p.fill_(bias)
            if name.endswith("gate.weight"):
                p.zero_()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gemma2"])
def test_open_gates_of_single_tokens_are_the_full_cache(name):
    """Chunks of one token, gates of 1 and means as they are, also beside layers that slide."""
    training, model = state(name, chunk=1)
    set_gates(training, 60.0)
    with torch.no_grad():
        kl, _ = training.divergence(1, hard=False)
        contexts, original = training.window(1)
        ids = training.rows[1:2, training.context :]
        logits = model(ids, past_key_values=training.cache(contexts, False)[0]).logits
    assert float(kl) < 1e-5 and (logits - original).abs().max() < 1e-4


def test_shut_gates_leave_sinks_and_the_window():
    """The stock model under a mask that hides every chunk from the continuation."""
    training, model = state()
    set_gates(training, -60.0)
    t, n, last = training.context, training.rows.shape[1], 2 + 4 * SHORT.chunks(training.context)
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    mask[t:, 2:last] = False
    added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        wanted = stock("llama")(training.rows[:1], attention_mask=added, use_cache=False).logits[:, t:]
        contexts, _ = training.window(0)
        ids = training.rows[:1, t:]
        found = model(ids, past_key_values=training.cache(contexts, False)[0]).logits
    assert last < t - SHORT.recent + SHORT.chunk and (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("hard", [False, True])
def test_training_sees_what_the_cache_will_hold(hard):
    """With gates that are shut or open for good, the policy's cache gives the same logits as the training."""
    training, model = state(keep=0.5 if hard else 1.0)
    if not hard:
        set_gates(training, 60.0)
    with only_trainable([], model), torch.no_grad():
        for name, p in training.parameters.items():
            if name.endswith(("out", "lstm.bias")):
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
        contexts, _ = training.window(0)
        ids = training.rows[:1, training.context :]
        wanted = model(ids, past_key_values=training.cache(contexts, hard)[0]).logits
        gates = trained(model, training=dataclasses.replace(SHORT, steps=1))
        own = tuple(training.gate(slot) for slot in range(len(training.layers)))
        gates = dataclasses.replace(gates, layers=own)
        t = training.context
        rows = SHORT.chunks(t)
        kept = t - 4 * rows + (-(-rows // 2) if hard else rows)
        policy = ChunkGate(f"{kept} tokens", sinks=2, recent=6, chunk=4, keep=0.5 if hard else 1.0)
        cache = lowkey.make_cache(model, policy=policy, gates=gates)
        model(training.rows[:1, :t], past_key_values=cache)
        assert {len(p) for i in range(3) for p in cache.kept_positions(i)} == {kept}
        found = model(ids, past_key_values=cache).logits
    assert (found - wanted).abs().max() < 1e-4


def test_gradients_reach_everything_in_both_halves():
    for hard in (False, True):
        training, model = state()
        with only_trainable([], model), torch.enable_grad():
            for n in range(2):  # the maps' last layers begin at 0, so the first have no gradient at first
                training.step(n)
            training.optimizer.zero_grad()
            kl, distance = training.divergence(0, hard)
            (kl + distance).backward()
        lacking = [name for name, p in training.parameters.items() if not float(p.grad.abs().max()) > 0]
        assert not lacking
        assert not any(p.requires_grad for p in [training.rows, *training.centres])


def test_training_lowers_the_divergence():
    model = attached("llama")
    told = ChunkGateTraining(chunk=4, sinks=0, recent=4, continuation=12, steps=40, lr=1e-2, keep=0.5)
    training = ChunkGatesInTraining(model, prompt(60, 2), told)
    with only_trainable([], model), torch.enable_grad():
        before = sum(float(training.divergence(n, True)[0].detach()) for n in (0, 1))
        training.run(None, lambda items, label, total: items)
        after = sum(float(training.divergence(n, True)[0].detach()) for n in (0, 1))
    assert after < 0.9 * before


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemError])
def test_a_stopped_training_goes_on_to_the_same_gates(tmp_path, error):
    """An interrupt saves; a process that dies has what it saved before, two steps earlier at most."""
    model, whole = attached("llama"), trained(attached("llama"))

    def stop(items, named, total=None):
        for n, item in enumerate(items):
            if n == 3:
                raise error
            yield item

    with pytest.raises(error):
        trained(model, work=tmp_path / "work", progress=stop)
    again = trained(model, work=tmp_path / "work")
    assert same(again, whole) and again.settings == whole.settings
    assert not same(trained(model, seed=1), whole)


def test_a_window_without_chunks_is_refused():
    with pytest.raises(LowkeyError, match="context 48: has no chunk of 40 tokens"):
        trained(attached("llama"), training=dataclasses.replace(SHORT, chunk=40))
    with pytest.raises(LowkeyError, match="keep"):
        ChunkGateTraining(keep=0.0)
