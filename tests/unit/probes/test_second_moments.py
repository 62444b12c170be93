"""Second moments against a slow computation from stored activations."""

from __future__ import annotations

import pytest
import torch
from pico import attached, prompt, stock
from statistics_by_hand import activations, outer

from lowkey.calibration import statistics
from lowkey.calibration.statistics import gather_statistics
from lowkey.models import families

IDS = prompt(24, batch=6)


def close(a, b):
    assert a.shape == b.shape
    assert torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("name", [*families.FAMILIES, "llama-yarn", "phi3-partial"])
def test_moments_are_sums_of_outer_products(name):
    shape = families.geometry(stock(name))
    found = gather_statistics(attached(name), IDS.split(4))
    assert sorted(found) == list(shape.compressible)
    layer = shape.compressible[-1]
    seen, ours = activations(name, layer, IDS), found[layer]
    assert ours.tokens == IDS.numel() and ours.heads == shape.kv_heads
    for moment in ("keys_pre", "keys_post", "values"):
        close(getattr(ours, moment), outer(seen[moment].flatten(1)))
    close(ours.inputs, outer(seen["inputs"]))
    for moment in ("queries_pre", "queries_post"):
        stacked = seen[moment].unflatten(1, (shape.kv_heads, shape.groups))  # (n, h, g, d)
        close(
            getattr(ours, moment),
            torch.stack([outer(stacked[:, h].flatten(0, 1)) for h in range(shape.kv_heads)]),
        )
    close(ours.keys_pre_mean, seen["keys_pre"].flatten(1).mean(0))
    close(ours.keys_post_mean, seen["keys_post"].flatten(1).mean(0))
    close(ours.values_mean, seen["values"].flatten(1).mean(0))


def test_every_sum_is_kept_in_fp64():
    sums = gather_statistics(attached("llama"), IDS.split(1))[0]
    assert {n: t.dtype for n, t in vars(sums).items() if n != "tokens" and t.dtype != torch.float64} == {}


def test_each_head_reads_its_own_block():
    ours, seen = gather_statistics(attached("llama"), [IDS])[1], activations("llama", 1, IDS)
    for layout, name in (("pre_rope", "pre"), ("post_rope", "post")):
        for h in range(4):
            close(ours.keys(layout)[h], outer(seen[f"keys_{name}"][:, h]))
        assert torch.equal(ours.queries(layout), getattr(ours, f"queries_{name}"))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_sums_do_not_depend_on_the_batch_size(name):
    one, other = (gather_statistics(attached(name), IDS.split(size)) for size in (1, 6))
    for i in one:
        for moment, value in vars(one[i]).items():
            assert torch.allclose(
                torch.as_tensor(value), torch.as_tensor(getattr(other[i], moment)), rtol=1e-4, atol=1e-4
            ), moment


def test_gathering_leaves_the_logits_alone():
    """The layer that collects moments attends as stock layers do, so that later layers see no change."""
    last = gather_statistics(attached("gemma2"), [IDS])[2]
    close(last.inputs, outer(activations("gemma2", 2, IDS)["inputs"]))


class StoppedError(Exception):
    pass


def stopping(batches, at):
    for i, batch in enumerate(batches):
        if i == at:
            raise StoppedError
        yield batch


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_an_interrupted_pass_resumes_to_the_same_sums(tmp_path, monkeypatch, at):
    monkeypatch.setattr(statistics, "BATCHES_BETWEEN_SAVES", 2)
    model, batches = attached("llama"), IDS.split(1)
    with pytest.raises(StoppedError):
        gather_statistics(model, stopping(batches, at), tmp_path)
    resumed, straight = gather_statistics(model, batches, tmp_path), gather_statistics(model, batches)
    for i, layer in straight.items():
        assert all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(getattr(resumed[i], n)))
            for n, a in vars(layer).items()
        )


def test_a_resumed_pass_does_not_repeat_what_was_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "BATCHES_BETWEEN_SAVES", 2)
    model, batches, count = attached("llama"), IDS.split(1), []
    with pytest.raises(StoppedError):
        gather_statistics(model, stopping(batches, 5), tmp_path)
    observe = statistics._observe
    monkeypatch.setattr(statistics, "_observe", lambda *a: count.append(1) or observe(*a))
    gather_statistics(model, batches, tmp_path)
    assert len(count) == 2  # batches 4 and 5: four had been saved
