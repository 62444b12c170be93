"""The gates of Fast KVzip: what they are trained on, how, and that they learn it."""

from __future__ import annotations

import dataclasses
import math

import pico
import pytest
import torch
from pico import attached, prompt, stock

from lowkey.core import files
from lowkey.core.types import LowkeyError
from lowkey.heads.fast_kvzip import (
    FastKVzipTraining,
    fitted_gate,
    inputs_of_gates,
    kvzip_scores,
    train_fast_kvzip,
)
from lowkey.heads.scores import spearman
from lowkey.ops.sink_gate import sink_gate

CORPUS = " ".join(f"word{(i * i) % 89}" for i in range(4000))
SHORT = FastKVzipTraining(steps=20, positions=50, tokens=30)


def trained(model, **options):
    given = {"corpus": CORPUS, "windows": 3, "context": 40, "training": SHORT} | options
    return train_fast_kvzip(model, pico.tokenizer(), **given)


def same(a, b):
    pairs = zip(a.layers, b.layers, strict=True)
    return all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in pairs)


def random_gate(heads=2, groups=3, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "query": (heads, groups, 16, width),
        "query_bias": (heads, groups, 16),
        "key": (heads, 16, width),
        "key_bias": (heads, 16),
        "query_norm": (16,),
        "key_norm": (16,),
        "sinks": (heads, 16, 16),
        "bias": (heads, groups),
    }
    return {name: 0.3 * torch.randn(size, generator=generator) for name, size in sizes.items()}


def test_targets_are_the_largest_weight_of_a_repetition():
    """By hand from transformers' eager attention: one piece of 30 tokens, behind the request."""
    ids = prompt(30, batch=1)
    request = pico.tokenizer()(
        "\n\nRepeat the previous context exactly.\n\n", add_special_tokens=False, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        maps = stock("llama")(torch.cat([ids, request, ids], 1), output_attentions=True).attentions
    for own, attention in zip(kvzip_scores(attached("llama"), pico.tokenizer(), ids), maps, strict=True):
        weights = attention[0, :, 30:].double()
        wanted = weights[..., :30].unflatten(0, (4, 2)).amax((1, 2))
        assert torch.allclose(own.double(), wanted, atol=1e-6)


def test_a_gate_sees_queries_and_keys_before_their_rotation():
    ids, model = prompt(12, batch=1), stock("llama")
    taken = []
    block = model.model.layers[1].self_attn
    handles = [
        part.register_forward_hook(lambda m, x, out: taken.append(out[0]))
        for part in (block.q_proj, block.k_proj, block.v_proj)
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    assert torch.allclose(inputs_of_gates(attached("llama"), ids)[1], torch.cat(taken, 1), atol=1e-5)


def test_a_gate_without_numbers_knows_the_prior():
    """Equal logits of the own key and of 16 sinks: 1 / 17."""
    gate = {name: torch.zeros_like(t) for name, t in random_gate().items()}
    assert torch.allclose(sink_gate(torch.randn(5, 24), gate), torch.full((5, 2), 1 / 17))


def test_training_finds_what_a_gate_of_its_kind_gave():
    """Another gate made the targets, on inputs that are not of unit size."""
    generator = torch.Generator().manual_seed(1)
    inputs = 20 * torch.randn(3000, 24, generator=generator)
    targets = sink_gate(inputs / 20, {name: 3 * t for name, t in random_gate().items()})
    start = random_gate(seed=2) | {"query_norm": torch.ones(16), "key_norm": torch.ones(16)}
    found = fitted_gate(
        inputs[:2000], targets[:2000], start, FastKVzipTraining(steps=600, positions=200, lr=1.0)
    )
    held_out = sink_gate(inputs[2000:], found)
    assert spearman(held_out, targets[2000:]) > 0.8 > 0.3 > abs(spearman(held_out.flip(0), targets[2000:]))


def test_the_published_variant_repeats_two_slips():
    published = trained(attached("llama"), training=dataclasses.replace(SHORT, variant="published"))
    repaired = trained(attached("llama"))
    for gate in published.layers:
        assert torch.equal(gate["sinks"], gate["sinks"][:, :1].expand_as(gate["sinks"]))
        assert float(gate["sinks"].abs().max()) > 0
    assert all(float(gate["sinks"].std(1).min()) > 1e-3 for gate in repaired.layers)
    x = torch.randn(4, 24)
    once = sink_gate(x, random_gate() | {"bias": 2 * random_gate()["bias"]})
    assert torch.allclose(sink_gate(x, random_gate(), 2.0), once)


@pytest.mark.parametrize(("label", "after"), [("scoring by KVzip", 2), ("training gates", 1)])
def test_a_stopped_training_goes_on_to_the_same_gates(tmp_path, label, after):
    model, whole = attached("llama"), trained(attached("llama"))

    def stop(items, named, total=None):
        for n, item in enumerate(items):
            if named == label and n == after:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        trained(model, work=tmp_path / "work", progress=stop)
    (job,) = (tmp_path / "work").iterdir()
    names = {path.name for path in job.iterdir()}
    assert {f"window-{n}.safetensors" for n in range(after)} <= names
    assert ("layer-0.safetensors" in names) == (label == "training gates")
    assert same(trained(model, work=tmp_path / "work"), whole)
    assert not same(trained(model, seed=1), whole)


@pytest.mark.parametrize("kept", ["window-1", "layer-0"])
@pytest.mark.parametrize("damage", ["shape", "name", "dtype", "values"])
def test_unfinished_work_of_another_shape_is_refused(tmp_path, kept, damage):
    """A file of ours, whole by its checksum, whose tensors are not those of the job."""
    model = attached("llama")

    def stop(items, named, total=None):
        for n, item in enumerate(items):
            if named == "training gates" and n == 1:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        trained(model, work=tmp_path / "work", progress=stop)
    (job,) = (tmp_path / "work").iterdir()
    tensors = files.read_work(job, kept)
    name = "2.score" if kept == "window-1" else "key"
    t = tensors.pop(name)
    if damage == "values" and kept == "layer-0":
        return  # any finite number is a weight
    tensors |= {"shape": {name: t[:-1]}, "name": {"other": t}, "dtype": {name: t.half()}}.get(
        damage, {name: t + 2}
    )
    files.write_work(job, kept, tensors)
    with pytest.raises(LowkeyError, match=r"unfinished work .* delete it and start anew"):
        trained(model, work=tmp_path / "work")


def test_facts_are_a_part_of_the_job():
    told = trained(attached("llama"), context=400, training=dataclasses.replace(SHORT, facts=2))
    assert told.settings["training"]["facts"] == 2
    assert not same(told, trained(attached("llama"), context=400))


def test_keys_have_no_bias_unless_converted():
    assert all(not bool(gate["key_bias"].any()) for gate in trained(attached("llama")).layers)


def test_impossible_trainings_are_refused():
    with pytest.raises(LowkeyError, match="variant 'better'"):
        FastKVzipTraining(variant="better")
    with pytest.raises(LowkeyError, match="lr"):
        FastKVzipTraining(lr=math.inf)
